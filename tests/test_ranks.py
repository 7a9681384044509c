"""train_t2i.py over several processes: the same run on any number of ranks, and after any kill."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import call, close, records, stopped_once, t2i
from safetensors.torch import load_file
from test_encoders import tiny_clip
from test_prepare import pictures
from test_prepare import run as prepare
from test_train_t2i import pairs_with_a_nan

import rf
import train_t2i
from common.pipeline import Pipeline, checkpoints, read_averages

pytestmark = pytest.mark.slow

STEPS, BATCH = 40, 8
OPTIONS = f"""--seed 1 --samples {STEPS * BATCH} --batch-size {BATCH} --threads 1
--eval-every-samples {20 * BATCH} --save-every-samples {20 * BATCH} --keep 99
--eval-prompts 1 --sample-steps 2 --warmup-samples 80 --cooldown-samples 80""".split()
NAMES = [rf.average_name(width) for width in train_t2i.EMA_WIDTHS]
PROGRAM = train_t2i.__file__
CPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(out, *options, signals=(), fails=False, nodes=False):
    """The trainer on two ranks → what they said; if one fails both are killed, as launchers do.

    signals: (what to wait for, the signal that rank 1 is then sent). nodes: each on its own.
    """
    env = CPU | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, PROGRAM, *map(str, ("--out", out, *options))]
    said, signals, deadline = out.with_suffix(".txt"), list(signals), time.monotonic() + 300
    with open(said, "a") as file:
        processes = [
            subprocess.Popen(
                command,
                env=env | {"RANK": rank, "LOCAL_RANK": "0" if nodes else rank},
                stdout=file,
                stderr=file,
            )
            for rank in "01"
        ]
    while any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes) or time.monotonic() > deadline:
            for p in processes:
                p.kill()
        if signals and signals[0][0]():
            processes[1].send_signal(signals.pop(0)[1])
        time.sleep(0.01)
    said = said.read_text()
    assert any(p.returncode for p in processes) == fails and not signals, said[-3000:]
    return said


def newest(out):
    return checkpoints(out / "checkpoints")[-1]


def has(out, count):
    """Whether the run has so many checkpoints."""
    return lambda: len(checkpoints(out / "checkpoints")) >= count


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts: two ranks, by DeepSpeed's own launcher."""
    out = tmp_path_factory.mktemp("whole") / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", 2, "--master_port", free_port(), PROGRAM]
    done = subprocess.run(
        [*map(str, command), *OPTIONS, "--out", out], env=CPU, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"finished at {STEPS * BATCH} of {STEPS * BATCH} samples" in done.stdout
    return out


def same_bytes(a, b):
    for name in ("log.csv", "eval.csv", "model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def losses(path):
    return {int(row["samples"]): float(row["loss"]) for row in records(path)}


def alike(a, b, stops=()):
    """Losses, evaluations and averages differ by rounding alone. stops: samples at which a run was
    resumed; the row of the log that follows holds only the steps after it."""
    for name in ("log.csv", "eval.csv"):
        found, expected = losses(a / name), losses(b / name)
        cut = {-(-stop // 80) * 80 for stop in stops if name == "log.csv"}
        assert found.keys() >= expected.keys()
        for samples in expected.keys() - cut:
            assert found[samples] == pytest.approx(expected[samples], abs=1e-3)
    found, expected = (read_averages(newest(out), NAMES) for out in (a, b))
    for name in NAMES:
        close(found[name], expected[name], atol=2e-3)


def test_one_rank_and_two_are_the_same_run(whole, tmp_path):
    call(t2i, *OPTIONS, "--out", tmp_path)
    alike(tmp_path, whole)
    first, *_, last = losses(tmp_path / "log.csv").values()
    assert last < 0.8 * first


def test_a_run_grows_alike_on_one_rank_and_on_two(whole, tmp_path):
    """From the shards of two, with another batch size, rate, decay and length."""
    grown = ["--resume", "--threads", 1, "--samples", 480, "--batch-size", 16]
    grown += ["--lr", 0.002, "--weight-decay", 0.1]
    one, two = (shutil.copytree(whole, tmp_path / name) for name in ("one", "two"))
    call(t2i, *grown, "--out", one)
    assert "changed from here on: --samples 320 -> 480; --batch-size 8 -> 16" in run(two, *grown)
    alike(one, two)
    *_, row = records(two / "log.csv")
    assert (row["step"], row["samples"], row["lr"]) == ("50", "480", str(0.002 * 16 / 80))


def test_a_killed_rank(whole, tmp_path):
    out = tmp_path / "run"
    run(out, *OPTIONS, signals=[(has(out, 1), signal.SIGKILL)], fails=True)
    assert int(newest(out).name) < STEPS * BATCH
    partial = out / "checkpoints" / "partial"  # as if it had been killed while it saved
    partial.mkdir(exist_ok=True)
    (partial / "run.json").touch()
    run(out, "--resume", "--threads", 1, nodes=True)
    same_bytes(out, whole)
    assert not partial.exists()
    script = [sys.executable, out / "checkpoints" / "zero_to_fp32.py", out / "checkpoints"]
    subprocess.run([*script, tmp_path, "--safe_serialization"], env=CPU, check=True)
    Pipeline.open(out).model.load_state_dict(load_file(tmp_path / "model.safetensors"))


SHORT = [*OPTIONS, "--samples", 20 * BATCH, "--save-every-samples", 10 * BATCH]
SHORT += ["--micro-batch", 2, "--precision", "bf16"]


def written(path, **changes):
    """Our ds_config.json with changes; `zero` of them in its section."""
    config = json.loads(train_t2i.Settings.ds_config.read_text())
    config["zero_optimization"] |= changes.pop("zero", {})
    path.write_text(json.dumps(config | changes))
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two ranks, two passes a step, bf16, and ds_config.json as it stands."""
    return run_short(tmp_path_factory.mktemp("short"))


def run_short(folder, **changes):
    out, config = folder / "run", written(folder / "ds.json", **changes)
    run(out, *SHORT, "--ds-config", config)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"zero": {"stage": 1}},
        {"zero": {"overlap_comm": True}, "communication_data_type": "bf16"},
    ],
    ids=["stage 1", "overlap, bf16"],
)
def test_the_choices_of_ds_config(short, tmp_path, changes):
    """docs/gpu.md says when to take which: the same run up to rounding, and a resume is exact."""
    out = run_short(tmp_path, **changes)
    for name in ("log.csv", "eval.csv"):
        found, expected = losses(out / name), losses(short / name)
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=5e-3)
    assert found != expected
    average, expected = (read_averages(newest(x), NAMES[:1])[NAMES[0]] for x in (out, short))
    apart = sum((x - expected[name]).square().sum() for name, x in average.items())
    assert apart < 0.15**2 * sum(x.square().sum() for x in expected.values())
    cut = shutil.copytree(out, tmp_path / "cut")
    shutil.rmtree(newest(cut))
    run(cut, "--resume", "--threads", 1, "--ds-config", tmp_path / "ds.json")
    same_bytes(cut, out)


def test_two_ranks_share_a_stage_and_the_pictures_of_a_judge(tmp_path):
    prepare(pictures(tmp_path / "source", 50, [(48, 48)]), tmp_path / "data", "--chunk-rows", 6)
    given = [*OPTIONS, "--samples", 80, "--data", tmp_path / "data", "--window", 1]
    given += ["--judge", tiny_clip(tmp_path / "clip")]
    run(tmp_path / "two", *given, "--stage", tmp_path / "stage")
    assert list(tmp_path.glob("stage/*/*/chunks/*.arrow"))
    call(t2i, *given, "--out", tmp_path / "one")
    alike(tmp_path / "two", tmp_path / "one")
    one, two = (records(tmp_path / name / "eval.csv")[-1] for name in ("one", "two"))
    for column in ("clip_score", "clip_frechet"):
        assert float(two[column]) == pytest.approx(float(one[column]), rel=1e-2)


def test_signals_to_one_rank_and_other_numbers_of_ranks(whole, tmp_path, capsys):
    """Two ranks save and go on, save and stop; one goes on and stops; two end the run."""
    out, again = tmp_path / "run", ("--resume", "--threads", 1)
    wanted = [((out / "log.csv").exists, signal.SIGUSR1), (has(out, 1), signal.SIGTERM)]
    assert "add --resume to continue" in run(out, *OPTIONS, signals=wanted)
    stops = [int(path.name) for path in checkpoints(out / "checkpoints")]
    assert len(stops) == 2 and stops[1] < 20 * BATCH
    with stopped_once(out / "checkpoints" / f"{20 * BATCH:012d}"):
        call(t2i, *again, "--out", out)
    assert "add --resume to continue" in capsys.readouterr().out
    stops.append(int(newest(out).name))
    assert stops[2] < STEPS * BATCH
    run(out, *again)
    alike(out, whole, stops)


def test_a_step_that_is_not_finite_on_one_rank_ends_all(tmp_path):
    """Pairs of which one is not a number: the line names the ranks that read it first."""
    made, bad = pairs_with_a_nan(tmp_path, BATCH)
    step = bad.any(1).tolist().index(True)
    readers = [str(rank) for rank, row in enumerate(bad[step].view(2, -1)) if row.any()]
    options = (*OPTIONS, "--data", made, "--max-bad-steps", 1, "--workers", 1)
    said = run(tmp_path / "run", *options, fails=True)
    wanted = f"the last one step {step + 1} (on rank {', '.join(readers)}, lr"
    assert f"train_t2i.py: 1 steps in a row were not finite, {wanted}" in said
    command = [sys.executable, PROGRAM, *map(str, options), "--out", tmp_path / "one"]
    ended = subprocess.run(command, env=CPU, timeout=200)  # it does not wait for its worker
    assert ended.returncode == 1
