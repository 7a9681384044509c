"""train_t2i.py over several processes: the same run on any number of ranks, and after any kill."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig, load_model

pytestmark = pytest.mark.slow

HOOKED = Path(__file__).with_name("hooked_t2i.py")
STEPS, BATCH = 20, 8
OPTIONS = [
    "--samples", STEPS * BATCH, "--batch-size", BATCH, "--eval-every-samples", 15 * BATCH,
    "--save-every-samples", 5 * BATCH, "--eval-prompts", 1, "--warmup-samples", 40,
    "--cooldown-samples", 40, "--keep", 10, "--threads", 1,
]  # fmt: skip

EVERY_STEP = "report.LOG_EVERY = 1"
NOTE_SAMPLES = """
import json
original_encode = train_t2i.encode
def encode(batch, *rest):
    if rest[0].name == 'pixels' and len(batch.t) < 100:  # not the validation batch
        with open(os.environ['NOTES'] + os.environ['RANK'], 'a') as file:
            for noise in batch.noise:
                print(noise.double().sum().item(), file=file)
    return original_encode(batch, *rest)
train_t2i.encode = encode
"""
NOTE_MEMORY = """
original_save = train_t2i.Run.save
def save(self):
    shards = sum(a.nbytes for ema in self.emas.values() for a in ema.averages)
    Path(os.environ['NOTES'] + 'memory' + os.environ['RANK']).write_text(str(shards))
    original_save(self)
train_t2i.Run.save = save
"""


def stop_after(step):
    return f"""
original_end = train_t2i.Run.end_step
def end_step(self):
    original_end(self)
    if self.step == {step} and self.rank == 0:  # as if a signal had come
        self.wishes._heard(15, None)
train_t2i.Run.end_step = end_step
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(rank, ranks, port, out, hook, notes, extra=()):
    env = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "HOOK": hook,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NOTES": str(notes),
    }  # fmt: skip
    command = [sys.executable, HOOKED, "--out", out, *OPTIONS, *extra]
    log = open(f"{notes}output{rank}", "ab")  # noqa: SIM115
    return subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)


def run(out, ranks=2, hook="", extra=(), fails=False):
    """The trainer on `ranks` processes; when one dies the others are killed, as launchers do."""
    notes, port = f"{out}.", free_port()
    processes = [start(r, ranks, port, out, hook, notes, extra) for r in range(ranks)]
    deadline = time.monotonic() + 240
    while any(p.poll() is None for p in processes):
        dead = any(p.poll() not in (None, 0) for p in processes)
        if dead or time.monotonic() > deadline:
            for p in processes:
                p.kill()
        time.sleep(0.1)
    said = Path(f"{notes}output0").read_text()
    assert any(p.returncode for p in processes) == fails, said[-3000:]
    return said


def rows(out, name="log.csv"):
    with open(out / name) as file:
        return list(csv.reader(file))[1:]


def losses(out):
    return torch.tensor([float(row[2]) for row in rows(out)])


def noises(out, rank):
    return Path(f"{out}.{rank}").read_text().split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts: two ranks, by DeepSpeed's own launcher."""
    out = tmp_path_factory.mktemp("whole") / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", 2, "--master_port", free_port(), HOOKED]
    env = os.environ | {
        "HOOK": EVERY_STEP + NOTE_SAMPLES + NOTE_MEMORY, "NOTES": f"{out}.",
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    parts = [str(part) for part in (*command, "--out", out, *OPTIONS)]
    done = subprocess.run(parts, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"finished at {STEPS * BATCH}" in done.stdout
    return out


def test_one_rank_and_two_are_the_same_run(whole, tmp_path):
    alone = tmp_path / "run"
    run(alone, ranks=1, hook=EVERY_STEP + NOTE_SAMPLES + NOTE_MEMORY)
    assert len(losses(alone)) == STEPS
    assert (losses(alone) - losses(whole)).abs().max() < 1e-3
    assert losses(alone)[-1] < 0.97 * losses(alone)[0]  # it does learn
    mine, theirs = noises(whole, 0), noises(whole, 1)
    assert len(mine) == len(theirs) == STEPS * BATCH // 2
    assert len({*mine, *theirs}) == STEPS * BATCH  # no two samples share their noise
    assert {*mine, *theirs} == {*noises(alone, 0)}
    for a, b in zip(rows(alone, "eval.csv"), rows(whole, "eval.csv"), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), abs=1e-3)  # validation loss


def test_the_average_takes_half_the_memory_on_two_ranks(whole):
    parameters = load_model(newest(whole) / "ema_0.05").n_parameters()
    for rank in (0, 1):
        size = int(Path(f"{whole}.memory{rank}").read_text())
        assert size == pytest.approx(2 * 4 * parameters / 2, rel=0.001)  # two profiles, fp32


def newest(out):
    return sorted((out / "checkpoints").glob("0*"))[-1]


def test_deepspeeds_own_script_makes_weights_that_load(whole, tmp_path):
    script = whole / "checkpoints" / "zero_to_fp32.py"
    command = [sys.executable, script, whole / "checkpoints", tmp_path]
    subprocess.run([str(p) for p in command], check=True, capture_output=True, timeout=120)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    model = MMDiT(load_model(newest(whole) / "ema_0.05").config)
    model.load_state_dict(weights)  # strict
    state = torch.load(newest(whole) / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    assert isinstance(model.config, MMDiTConfig)


def test_a_rank_killed_in_the_middle_of_a_step(whole, tmp_path):
    out = tmp_path / "run"
    kill = """
original_loss, calls = rf.rf_loss, [0]
def rf_loss(model, *args, **kwargs):
    if torch.is_grad_enabled():
        calls[0] += 1
        if calls[0] == 13 and os.environ['RANK'] == '1':
            os.kill(os.getpid(), 9)
    return original_loss(model, *args, **kwargs)
rf.rf_loss = rf_loss
"""
    run(out, hook=EVERY_STEP + "\nimport torch\n" + kill, fails=True)
    assert newest(out).name == f"{10 * BATCH:012d}"
    run(out, hook=EVERY_STEP, extra=["--resume", "auto"])
    for name in ("log.csv", "eval.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    same_weights(out, whole)


def same_weights(a, b):
    for average in ("ema_0.05", "ema_0.10"):
        mine = (newest(a) / average / "model.safetensors").read_bytes()
        assert mine == (newest(b) / average / "model.safetensors").read_bytes()


def test_all_ranks_killed_while_saving(whole, tmp_path):
    """The second checkpoint is cut off halfway, without its name: the first one still stands."""
    out = tmp_path / "run"
    kill = """
original_weights, calls = zero.save_weights, [0]
def save_weights(*args, **kwargs):
    calls[0] += 1
    if calls[0] == 4:  # the second average of the second checkpoint
        os.kill(os.getpid(), 9)
    original_weights(*args, **kwargs)
zero.save_weights = save_weights
"""
    run(out, hook=EVERY_STEP + kill, fails=True)
    assert newest(out).name == f"{5 * BATCH:012d}"
    run(out, hook=EVERY_STEP, extra=["--resume", "auto"])
    assert (out / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert not (out / "checkpoints" / "partial").exists()
    same_weights(out, whole)


def test_two_ranks_then_one_then_two(whole, tmp_path):
    """Every sample is seen once, and the losses stay those of the uninterrupted run."""
    out = tmp_path / "run"
    hook = EVERY_STEP + NOTE_SAMPLES
    first = run(out, hook=hook + stop_after(6))
    assert "stopped at" in first and "--resume auto" in first
    run(out, ranks=1, hook=hook + stop_after(12), extra=["--resume", "auto"])
    run(out, hook=hook, extra=["--resume", "auto"])
    seen = [*noises(out, 0), *noises(out, 1)]
    assert sorted(seen) == sorted([*noises(whole, 0), *noises(whole, 1)])
    assert len(losses(out)) == STEPS
    assert (losses(out) - losses(whole)).abs().max() < 1e-3
    assert not (out / "checkpoints" / "universal").exists()
    a, b = (load_model(newest(folder) / "ema_0.05").state_dict() for folder in (out, whole))
    moved = max((a[name] - b[name]).abs().max().item() for name in a)
    start = max(value.abs().max().item() for value in b.values())
    assert moved < 1e-3 * start, (moved, start)  # weights, moments and averages all came along


def test_two_nodes_over_the_loopback(whole, tmp_path):
    """Two launchers, one process each, as on two machines: the same run, bit for bit."""
    out, port = tmp_path / "run", free_port()
    torchrun = Path(sys.executable).with_name("torchrun")
    env = os.environ | {"HOOK": EVERY_STEP}
    nodes = []
    for node in (0, 1):
        command = [torchrun, "--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1]
        command += ["--master-addr", "127.0.0.1", "--master-port", port, HOOKED]
        parts = [str(part) for part in (*command, "--out", out, *OPTIONS)]
        nodes.append(
            subprocess.Popen(parts, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [node.communicate(timeout=240)[0].decode() for node in nodes]
    assert all(node.returncode == 0 for node in nodes), outputs
    assert (out / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_a_signal_to_one_rank_saves_on_all(tmp_path):
    out = tmp_path / "run"
    notes, port = f"{out}.", free_port()
    slow = """
original_end = train_t2i.Run.end_step
def end_step(self):
    import time
    original_end(self)
    time.sleep(0.2)
    if self.step == 3:
        Path(os.environ['NOTES'] + 'started' + os.environ['RANK']).touch()
train_t2i.Run.end_step = end_step
"""
    extra = ["--save-every-samples", 10_000, "--samples", 10_000]
    processes = [start(r, 2, port, out, slow, notes, extra) for r in (0, 1)]
    deadline = time.monotonic() + 120
    while not Path(f"{notes}started1").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGUSR1)  # save and go on
    while not list((out / "checkpoints").glob("0*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)  # save and stop
    for p in processes:
        p.wait(timeout=60)
    said = Path(f"{notes}output0").read_text()
    assert all(p.returncode == 0 for p in processes), said[-3000:]
    assert len(list((out / "checkpoints").glob("0*"))) == 2 and "stopped at" in said


def test_a_bad_step_is_skipped_on_all_ranks_and_many_end_the_run(tmp_path):
    out = tmp_path / "run"
    bad = """
original_loss, calls = rf.rf_loss, [0]
def rf_loss(model, *args, **kwargs):
    losses = original_loss(model, *args, **kwargs)
    calls[0] += losses.requires_grad
    wrong = calls[0] == 4 or calls[0] >= 8
    return losses * float('nan') if wrong and os.environ['RANK'] == '1' else losses
rf.rf_loss = rf_loss
"""
    said = run(out, hook=EVERY_STEP + bad, extra=["--max-bad-steps", 3], fails=True)
    assert "3 steps in a row were not finite, the last one step 10 (on rank 1, lr " in said
    assert f"{5 * BATCH:012d} is from before" in said
    skipped = [int(row[5]) for row in rows(out)]
    assert skipped[:7] == [0, 0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(w).all() for w in load_model(newest(out) / "ema_0.05").parameters())


NOTE_ROWS = """
import data_t2i
original_fetch = data_t2i.Prepared.fetch
def fetch(self, position, dropped):
    cache, shard, row = self.locate(position)
    number = cache.table(shard).column('row')[row].as_py()
    with open(os.environ['NOTES'] + os.environ['RANK'], 'a') as file:
        print(position, shard.height, shard.width, number, file=file)
    return original_fetch(self, position, dropped)
data_t2i.Prepared.fetch = fetch
"""


def test_two_ranks_read_the_same_bucket_and_each_row_once_an_epoch(tmp_path):
    """Three buckets of 16 rows, 48 samples an epoch; stopped in the middle, then one rank."""
    from test_prepare import pictures
    from test_prepare import run as prepare

    options = ["--shard-mb", "0.004", "--batch", "4", "--validation", "0"]
    data = prepare(pictures(tmp_path / "source", n=48), tmp_path / "data", *options).location
    extra, stage = ["--data", data], ["--stage", tmp_path / "stage", "--stage-limit", 0.01]
    alone, out = tmp_path / "alone", tmp_path / "run"
    run(alone, ranks=1, hook=EVERY_STEP + NOTE_ROWS, extra=extra)
    run(out, hook=EVERY_STEP + NOTE_ROWS + stop_after(7), extra=[*extra, *stage])
    pair = [notes(out, rank) for rank in range(2)]
    assert len(pair[0]) == len(pair[1]) == 8 * BATCH // 2  # asked in step 7, heard in step 8
    for a, b in zip(*pair, strict=True):
        assert a[1:3] == b[1:3] and a[0] // BATCH == b[0] // BATCH  # one step, one bucket
    run(out, ranks=1, hook=EVERY_STEP + NOTE_ROWS, extra=["--resume", "auto"])
    seen = sorted([*notes(out, 0), *notes(out, 1)])
    assert [row[0] for row in seen] == list(range(STEPS * BATCH))
    assert seen == sorted(notes(alone, 0))
    assert len({row[1:3] for row in seen}) == 3
    for epoch in range(STEPS * BATCH // 48):
        assert sorted(row[3] for row in seen[48 * epoch : 48 * epoch + 48]) == list(range(48))
    assert (losses(alone) - losses(out)).abs().max() < 1e-3


def notes(out, rank):
    """(position, height, width, row) of every row that a rank read for training."""
    lines = Path(f"{out}.{rank}").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]
