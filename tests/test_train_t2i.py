"""train_t2i.py in one process: what it writes, how it goes on, and what it says when it cannot."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partialmethod
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from functorch.compile import make_boxed_func
from helpers import (
    SHAPES,
    call,
    close,
    exported,
    first_gradient,
    full_disk,
    opened,
    records,
    refused,
    t2i,
)
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_digits import write_mnist
from test_encoders import tiny_clip
from test_pairs import make
from test_prepare import pictures
from test_prepare import run as prepare
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import mmdit
import train_t2i
from common.evaluate import Judge, Ranks, asked, draw_asked, validation
from common.memory import largest_pass
from common.pictures import read_png
from common.pipeline import Pipeline, checkpoints, load_shard, mark_of, read_averages
from inputs.shapes import TAGS
from inputs.stored import pairs_check
from mmdit import MMDiT, fitted
from train_t2i import RECIPES, Settings, learning_rate, part_of_row, read_ds_config

QUICK = """--seed 1 --samples 80 --batch-size 4 --eval-every-samples 40 --save-every-samples 40
--threads 1 --eval-prompts 1 --sample-steps 1 --warmup-samples 16 --cooldown-samples 16"""


def train(out, *options):
    call(t2i, *QUICK.split(), "--out", out, *options)
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return train(tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Options of runs that are over sooner: twelve pictures of digits."""
    folder = tmp_path_factory.mktemp("few")
    write_mnist(folder)
    return ["--data", "mnist", "--data-dir", folder, "--samples", 20]


def refuses(capsys, out, *options):
    return refused(t2i, capsys, *QUICK.split(), "--out", out, *options)


def saved(out):
    return [int(path.name) for path in checkpoints(out / "checkpoints")]


def newest(out):
    return checkpoints(out / "checkpoints")[-1]


def same(a, b):
    for name in ("log.csv", "eval.csv", "model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_pictures_logs_and_the_averaged_weights(done):
    assert {path.name for path in done.iterdir()} == {
        *("checkpoints", "strips", "samples.png", "progress.png", "curves.png"),
        *("log.csv", "eval.csv", "model.safetensors", "config.json", "made_by.txt"),
    }
    columns = [(row["step"], row["samples"], row["skipped"]) for row in records(done / "log.csv")]
    assert columns == [("10", "40", "0"), ("20", "80", "0")]
    assert [float(row["lr"]) for row in records(done / "log.csv")] == [0.004, 0.001]
    settings, world = opened("shapes", seed=1)
    model = Pipeline.open(done).model
    first, last = records(done / "eval.csv")
    assert (first["samples"], last["samples"]) == ("40", "80")
    by_time = [float(last[f"loss_t{i}/8"]) for i in range(8)]
    assert by_time == pytest.approx(validation(model, world, settings, "cpu", Ranks()))
    assert float(last["loss"]) == pytest.approx(sum(by_time) / 8)
    assert float(last["mean"]) == pytest.approx(sum(float(last[tag]) for tag in TAGS) / 6)
    assert saved(done) == [40, 80]
    assert (done / "checkpoints" / "latest").read_text() == newest(done).name
    average = read_averages(newest(done), ["ema_0.05"])["ema_0.05"]
    close(model.state_dict(), average, atol=0, rtol=0)
    facts = Pipeline.open(done).facts
    assert (facts["size"], facts["shapes"], facts["samples"]) == (20, 4, 80)


def test_a_step_clips_the_gradient_and_each_group_has_its_rate(few, tmp_path):
    """Adam's first moment is a tenth of the gradient, Muon's a twentieth; it is clipped to 1."""
    how = ["--save-every-samples", 4, "--keep", 5, "--lr", 0.01, "--loss", "pseudo_huber"]
    how += ["--muon-lr", 0.02]
    path, *_ = checkpoints(train(tmp_path, *few, *how) / "checkpoints")
    (file,) = path.glob("*zero_pp_rank_*_optim_states.pt")
    adamw = load_shard(file)["optimizer_state_dict"]["base_optimizer_state"]
    assert first_gradient(adamw["state"].values()).norm().item() == pytest.approx(1, rel=1e-3)
    groups = Pipeline.open(path).model.param_groups(0.01, muon_lr=0.02)
    rates = [group["lr"] / 4 for group in groups]  # of a first step of 4 samples, warm-up 16
    assert [group["lr"] for group in adamw["param_groups"]] == rates and len(rates) > 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--save-every-samples 8 --keep 2", [16, 20]),
        ("--save-minutes 1e-9", [8, 16, 20]),  # each request is heard one step later
        ("--target-eval-loss 100 --eval-every-samples 8", [8]),
        ("--target-eval-loss 0 --eval-every-samples 8", [20]),
    ],
)
def test_when_a_run_saves_and_ends(few, tmp_path, capsys, options, expected):
    out = train(tmp_path / "run", *few, *options.split())
    assert saved(out) == expected
    state = "finished" if expected[-1] == 20 else "stopped"
    assert f"{state} at {expected[-1]} of 20 samples" in capsys.readouterr().out


def test_a_resumed_run_is_the_same(done, tmp_path):
    """Of a copy that looks as if it had been killed after its first checkpoint."""
    out = shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(newest(out))
    (out / "log.csv").write_text("half a li")
    call(t2i, "--resume", "--threads", 1, "--workers", 2, "--out", out)
    same(out, done)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ("--eval-every-samples 80", 1e-9),
        ("--micro-batch 2", 1e-5),
        ("--precision bf16", 0.1),
        ("--compile on", 1e-4),
        ("--recompute blocks", 0),
        ("--recompute blocks --compile on", 1e-4),
        ("--ds-config stage1", 1e-9),
        ("--ds-config stage1 --precision bf16", 0.1),
    ],
)
def test_what_changes_the_losses_only_by_rounding(done, tmp_path, monkeypatch, options, tolerance):
    graphs, again = [], []

    def counted(function, *inputs, **how):
        again.append(function)
        return checkpoint(function, *inputs, **how)

    def backend(graph, inputs):  # inductor would take minutes
        graphs.append(graph)
        return graph.forward

    compiled = partialmethod(MMDiT.compile_blocks, backend=backend)
    monkeypatch.setattr(MMDiT, "compile_blocks", compiled)
    monkeypatch.setattr(mmdit, "checkpoint", counted)
    file = json.loads(Settings.ds_config.read_text())
    file["zero_optimization"]["stage"] = 1
    (tmp_path / "stage1").write_text(json.dumps(file))
    out = train(tmp_path / "run", *options.replace("stage1", f"{tmp_path}/stage1").split())
    a, b = ([float(row["loss"]) for row in records(x / "log.csv")] for x in (done, out))
    assert a == pytest.approx(b, rel=0, abs=tolerance)
    if "bf16" in options:
        assert a != pytest.approx(b, abs=1e-4)
        average = load_file(out / "model.safetensors").values()
        assert any((p != p.bfloat16()).any() for p in average)  # fp32 on the whole way
    assert bool(graphs) == ("compile" in options)
    # four of five blocks in 20 steps, once where the memory is counted, and once to warm up
    assert len(again) == (4 * (21 + bool(graphs)) if "recompute" in options else 0)


def test_blocks_are_compiled_in_both_directions_before_the_first_step(few, tmp_path, monkeypatch):
    """A single and a double block, each once forward and once backward; the losses do not change.

    The second run is not compiled."""
    made, before = [], []

    def compiler(way):
        return lambda graph, inputs: made.append(way) or make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler("fw"), bw_compiler=compiler("bw"))
    original = train_t2i.train

    def training(run):
        assert all(p.grad is None for p in run.engine.module.parameters())
        before.append(list(made))
        original(run)

    monkeypatch.setattr(
        MMDiT, "compile_blocks", partialmethod(MMDiT.compile_blocks, backend=backend)
    )
    monkeypatch.setattr(train_t2i, "train", training)
    outs = [train(tmp_path / how, *few, "--compile", how) for how in ("on", "off")]
    assert before == [made, made] and sorted(made) == ["bw", "bw", "fw", "fw"]
    a, b = ([float(row["loss"]) for row in records(x / "log.csv")] for x in outs)
    assert a == pytest.approx(b, rel=0, abs=1e-6)


def test_a_pass_is_as_large_as_the_memory_allows(done, tmp_path, monkeypatch):
    """All of a batch of four in the ordinary case; one at a time where there is no room."""
    made = []

    def spied(*given):
        made.append(read_ds_config(*given))
        return made[-1]

    monkeypatch.setattr(train_t2i, "read_ds_config", spied)
    for room in (None, 0):
        if room is not None:
            monkeypatch.setattr(train_t2i, "room", lambda *where: 0)
        out = train(tmp_path / f"run{room}", "--eval-every-samples", 80)
        a, b = ([float(row["loss"]) for row in records(x / "log.csv")] for x in (done, out))
        # Sums in another order: rounding, which twenty steps enlarge.
        assert a[0] == pytest.approx(b[0], abs=1e-5) and a == pytest.approx(b, abs=1e-4)
    assert [config["gradient_accumulation_steps"] for config in made] == [1, 4]


def pairs_with_a_nan(folder, batch):
    """Pairs of which one is not a number, and (steps, batch): whether a sample is that one."""
    made = make(exported(folder / "first", SHAPES), folder / "pairs", "--number", 20, "--chunk", 20)
    (file,) = made.glob("*.safetensors")
    states = load_file(file)["states"]
    states[3] = torch.nan
    captions = ["a red ring"] * 20
    header = json.loads((made / "pairs.json").read_text())
    about = {"captions": captions, "check": pairs_check(header, 0, states, captions)}
    save_file({"states": states}, file, {"about": json.dumps(about)})
    _, rows = opened(made, batch_size=batch, seed=1)
    steps = [rows.at(range(batch * k, batch * (k + 1)))[0] for k in range(11)]
    return made, torch.stack([states.isnan().flatten(1).any(1) for states in steps])


def test_a_step_that_is_not_finite_is_skipped_and_many_end_the_run(tmp_path, capsys):
    """One step of each epoch of three. The samples of a skipped step count for the rate, too."""
    made, bad = pairs_with_a_nan(tmp_path, 6)
    bad = bad.any(1).tolist()
    assert sum(bad) >= 3 and (True, True) not in pairwise(bad)
    options = ["--data", made, "--batch-size", 6, "--samples", 60, "--cooldown-samples", 36]
    out = train(tmp_path / "run", *options, "--max-bad-steps", 2)
    *_, row = records(out / "log.csv")
    assert int(row["skipped"]) == sum(bad[:10]) and float(row["loss"]) < 2
    assert float(row["lr"]) == pytest.approx(0.004 * (60 - 54) / 36)
    weights = load_file(out / "model.safetensors").values()
    assert all(weight.isfinite().all() for weight in weights)
    options += ["--max-bad-steps", 1, "--save-every-samples", 6]
    line = refuses(capsys, tmp_path / "two", *options)
    first = bad.index(True)
    left = f"{tmp_path / 'two' / 'checkpoints'}/{6 * first:012d} is from before"
    if not first:
        left = "nothing was saved before it"
    assert f"1 steps in a row were not finite, the last one step {first + 1} (on rank 0, lr" in line
    assert f"{left}; start again with a lower --lr" in line


# --- a run that grows ----------------------------------------------------------------------------


def shard(path):
    (file,) = path.glob("*zero_pp_rank_*_optim_states.pt")
    return load_shard(file)["optimizer_state_dict"]


GROWN = """--samples 120 --batch-size 8 --lr 0.01 --muon-lr 0.02 --warmup-samples 400
--cooldown-samples 60 --weight-decay 0.1 --save-every-samples 30 --keep 9"""


def test_a_finished_run_grows(done, tmp_path, capsys):
    """Length, batch, rates and decay are new from the checkpoint on, and it is said."""
    for name in "ab":
        out = shutil.copytree(done, tmp_path / name)
        call(t2i, "--resume", "--threads", 1, "--out", out, *GROWN.split())
    changed = (
        "--samples 80 -> 120; --batch-size 4 -> 8; --lr 0.004 -> 0.01; --muon-lr 0.04 -> 0.02;"
        " --warmup-samples 16 -> 400; --cooldown-samples 16 -> 60; --weight-decay 0.0 -> 0.1;"
        " --save-every-samples 40 -> 30; --keep 3 -> 9"
    )
    assert capsys.readouterr().out.count(f"changed from here on: {changed}\n") == 2
    same(out, tmp_path / "a")  # the same commands, the same run
    for how in (["--cfg", 4], []):  # what was given to the finished run stays
        call(t2i, "--resume", "--threads", 1, "--out", tmp_path / "a", *how)
    assert Pipeline.open(tmp_path / "a").facts["cfg"] == 4
    rows, older = records(out / "log.csv"), records(done / "log.csv")
    assert rows[:2] == older and not any(row["changed"] for row in older)
    found = [(row["step"], row["samples"], row["changed"]) for row in rows[2:]]
    assert found == [("22", "96", changed), ("25", "120", "")]
    assert [float(row["lr"]) for row in rows[2:]] == pytest.approx([0.01 * 96 / 400, 0.01 * 8 / 60])
    assert [row["samples"] for row in records(out / "eval.csv")] == ["40", "80", "120"]
    assert saved(out) == [40, 80, 96, 120]
    adamw = shard(newest(out))["base_optimizer_state"]
    expected = Pipeline.open(out).model.param_groups(0.01, 0.1, muon_lr=0.02)
    for group, wanted in zip(adamw["param_groups"], expected, strict=True):
        for key in ("base_lr", "weight_decay"):
            assert group[key] == wanted[key]
        assert group["lr"] == pytest.approx(wanted["lr"] * 8 / 60) and group["updates"] == 25
    assert {state["step"].item() for state in adamw["state"].values()} == {25}


def test_at_a_constant_rate_a_run_that_grew_is_the_longer_run(few, tmp_path):
    """To the last bit. Its last step may go beyond --samples; the command that made it is right."""
    how = [*few, "--cooldown-samples", 0]
    whole = train(tmp_path / "whole", *how, "--samples", 40)
    for options in ("--samples 18", "--samples 18 --resume", "--samples 40 --resume"):
        train(tmp_path / "grown", *how, *options.split())
    a, b = (load_file(out / "model.safetensors") for out in (whole, tmp_path / "grown"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert records(whole / "eval.csv")[-1] == records(tmp_path / "grown" / "eval.csv")[-1]


def test_a_run_goes_on_in_another_precision(few, tmp_path):
    """Nothing of the fp32 weights is lost: at a rate of next to 0 they stay."""
    how = [
        "--resume",
        "--threads",
        1,
        "--out",
        train(tmp_path, *few),
        "--lr",
        0,
        "--muon-lr",
        1e-12,
    ]
    for precision, samples in (("bf16", 24), ("fp32", 28)):
        call(t2i, *how, "--precision", precision, "--samples", samples)
    paths = checkpoints(tmp_path / "checkpoints")
    first, *others = (shard(path)["single_partition_of_fp32_groups"] for path in paths)
    assert len(others) == 2 and any((row != row.bfloat16()).any() for row in first)
    for other in others:
        close(other, first, atol=1e-9, rtol=1e-6)
    losses = [float(row["loss"]) for row in records(tmp_path / "eval.csv")]
    assert losses == pytest.approx([losses[0]] * 3, abs=0.02) and len({*losses}) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ("--samples 79", "--samples 79 is less than the 80 that the run in"),
        ("--muon-lr 0", "--muon-lr 0.0 differs from the run to resume, which has 0.04, and Muon"),
        (
            "--loss pseudo_huber",
            "--loss pseudo_huber differs from the run to resume, which has mse",
        ),
        ("--seed 2", "--seed 2 differs from the run to resume, which has 1: drop it, or start"),
    ],
)
def test_what_a_resumed_run_keeps(done, tmp_path, capsys, options, message):
    out = shutil.copytree(done, tmp_path / "run")
    given = ("--resume", "--threads", 1, "--out", out, *options.split())
    assert message in refused(t2i, capsys, *given)
    same(out, done)


# --- other data ----------------------------------------------------------------------------------


def test_a_run_from_another_at_a_larger_size(done, tmp_path):
    """At rates of 0 the weights stay those it started with. A resume needs the first no more."""
    first = shutil.copytree(done, tmp_path / "first")
    how = ["--init", first, "--size", 24, "--samples", 4, "--lr", 0, "--muon-lr", 0]
    out = train(tmp_path / "run", *how)
    shutil.rmtree(first)
    call(t2i, "--resume", "--threads", 1, "--out", out)
    large, small = Pipeline.open(out), Pipeline.open(done)
    assert large.facts["shift"] == 2
    stretched = MMDiT(replace(small.model.config, max_grid=6))
    stretched.start_from(small.model, 24 / 20)
    close(large.model.state_dict(), stretched.state_dict(), atol=0, rtol=0)


def test_what_lies_in_the_runs_folder_is_refused_before_it_is_made(tmp_path, capsys):
    text = json.loads(Settings.ds_config.read_text())
    where = {"enabled": True, "output_path": str(tmp_path / "run")}
    (tmp_path / "ds.json").write_text(json.dumps(text | {"csv_monitor": where}))
    prepare(pictures(tmp_path / "source", 20, [(48, 48)]), tmp_path / "data")
    for how, reason in (
        (["--ds-config", tmp_path / "ds.json"], '"output_path" of csv_monitor lies in --out'),
        (["--data", tmp_path / "data", "--stage", tmp_path / "run" / "s"], "lies in --out, which"),
    ):
        assert reason in refused(t2i, capsys, *QUICK.split(), *how, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_judge_scores_own_images_and_monitors_show_them(tmp_path, monkeypatch, capsys):
    """Wandb is a stand-in; tensorboard's file is read."""
    clip, logged = tiny_clip(tmp_path / "clip"), []
    stub = SimpleNamespace(init=lambda **how: None, Image=lambda path: read_png(path))
    stub.log = lambda data, step, commit=None: logged.append((step, data))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    where = {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}
    text = json.loads(Settings.ds_config.read_text()) | {"wandb": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(text | {"tensorboard": where}))
    data = tmp_path / "data"
    prepare(pictures(tmp_path / "source", 60, [(48, 48)]), data)
    how = ["--data", data, "--samples", 40, "--eval-every-samples", 20]
    how += ["--judge", clip, "--judge-images", 5, "--ds-config", tmp_path / "ds.json"]
    out = train(tmp_path / "run", *how)
    first, last = records(out / "eval.csv")
    settings, rows = opened(data, seed=1, sample_steps=1)
    wanted = asked(rows, 1, Judge(clip, "cpu"), 5)
    model = Pipeline.open(out).model
    _, scores = draw_asked(model, rows, wanted, settings, "cpu", Ranks())
    assert list(scores) == ["clip_score", "clip_frechet"] == list(last)[-2:]
    for name, value in scores.items():
        assert float(last[name]) == pytest.approx(value, rel=1e-4)
        assert float(first[name]) != pytest.approx(value, rel=1e-4)
    said = "".join(f", {name} {float(last[name]):.3f}" for name in scores)
    assert f"40 samples: validation loss {float(last['loss']):.4f}{said}" in capsys.readouterr().out
    board, sheet = EventAccumulator(str(tmp_path / "board")).Reload(), read_png(out / "samples.png")
    assert [event.step for event in board.Scalars("Eval/clip_frechet")] == [20, 40]
    shown = board.Images("Eval/pictures")
    assert [event.step for event in shown] == [20, 40]
    assert torch.equal(read_png(BytesIO(shown[1].encoded_image_string)), sheet)
    sheets = [(step, x["Eval/pictures"]) for step, x in logged if "Eval/pictures" in x]
    assert [step for step, _ in sheets] == [20, 40] and torch.equal(sheets[1][1], sheet)
    for option in (["--judge", "other"], ["--judge-images", 4]):
        said = refused(t2i, capsys, "--resume", "--out", out, *option)
        assert f"{option[0]} {option[1]} differs from the run to resume" in said


# --- pieces --------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_cools_down():
    settings = Settings(samples=800, batch_size=8, warmup_samples=80, cooldown_samples=160)
    rates = [learning_rate(settings, seen) for seen in (0, 72, 400, 640, 720, 800)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0])
    sudden = Settings(samples=10, batch_size=8, warmup_samples=0, cooldown_samples=0)
    assert [learning_rate(sudden, seen) for seen in (0, 8)] == [1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_the_shards_of_some_ranks_become_those_of_others(ranks):
    """A row of eight, written by three ranks with padding: no value is lost."""
    row = torch.arange(1.0, 10)
    row[8:], size = 0, -(-8 // ranks)
    parts = [part_of_row(row.split(3), r * size, size) for r in range(ranks)]
    whole = torch.cat(parts)
    assert torch.equal(whole[:8], row[:8]) and not whole[8:].any() and len(whole) == ranks * size


@pytest.mark.parametrize("preset", RECIPES)
def test_every_recipe_fits_its_network(preset):
    size = RECIPES[preset]["size"]
    config = fitted(preset, channels=3, text_dim=128, sides=[(size, size)])
    assert config.patch_values <= config.dim and size == config.max_grid * config.patch_size


TURNING = {"stage": 2, "round_robin_gradients": True}
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "typed, ranks, config, expected",
    [
        ({}, 1, {}, [64, 16, 4]),
        ({}, 4, {"zero_optimization": {"stage": 1}}, [64, 16, 1]),
        ({"batch_size": 12, "micro_batch": 2}, 2, {"train_batch_size": 12}, [12, 2, 3]),
        ({"precision": "bf16"}, 1, {"bf16": {"enabled": True}}, [64, 16, 4]),
        ({"batch_size": 4, "micro_batch": 8}, 1, {}, "4 / 8 = 0.50: take --batch-size 8"),
        ({}, 3, {}, "x 3 ranks x a whole number of passes, but 64 / 63 = 1.02: take .* 63"),
        ({}, 1, {"train_batch_size": 32}, r"size 32 contradicts .* 64 \(64 = 16 x 1 ranks x 4"),
        ({}, 1, {"zero_optimization": {"stage": 3}}, '"stage" 3 must be 1 or 2'),
        ({}, 1, {"zero_optimization": {"stage": 0}}, '"stage" 0 must be 1 or 2: see docs'),
        ({}, 1, {"zero_optimization": OFFLOADED}, '"offload_optimizer" is not supported'),
        ({}, 1, {"fp16": {}}, '"fp16" is not supported here: take it out'),
        ({}, 1, {"zero_optimization": TURNING}, '"round_robin_gradients" is not supported'),
        ({}, 1, {"zero_optimization": {"stage": 2, "cpu_offload": True}}, '"cpu_offload" is not'),
        ({}, 1, {"torch_autocast": {"enabled": True}}, '"torch_autocast" is not supported'),
        ({}, 1, {"zero_optimization": {"stage": "2"}}, "\"stage\" '2' must be 1 or 2"),
        ({}, 1, {"bf16": {"enabled": True}}, "bf16 contradicts --precision fp32"),
    ],
)
def test_deepspeeds_configuration(tmp_path, typed, ranks, config, expected):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads(Settings.ds_config.read_text()) | config))
    settings = Settings(ds_config=path, **{"precision": "fp32"} | typed)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_ds_config(settings, ranks, lambda file, share: 16 if share == 64 else share)
        return
    found = read_ds_config(settings, ranks, lambda file, share: 16 if share == 64 else share)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [found[key] for key in keys] == expected
    assert found["bf16"]["enabled"] == (settings.precision == "bf16")
    assert found["timers"]["throughput"] == {"enabled": False}  # it waits for the GPU


def test_room_is_most_of_a_gpu_or_a_share_of_the_host(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "total_memory", lambda: 1000)
    monkeypatch.setattr(get_accelerator(), "memory_allocated", lambda: 50)  # by the encoders
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = [train_t2i.room(torch.device(name), Ranks()) for name in ("cuda", "cpu")]
    assert found == pytest.approx([850 - 50, 850 / 4 - 50])


@pytest.mark.parametrize("preset", ["tiny", "tiny-image", "tiny-wide"])
def test_on_cpus_a_batch_is_one_pass(preset):
    """In a tenth of what a small laptop has, for each of two ranks."""
    share = RECIPES[preset]["batch_size"] // 2
    config = fitted(preset, channels=3, text_dim=128, sides=[(20, 20)])
    settings = Settings(preset=preset, precision="fp32", text_tokens=12)
    ds = json.loads(Settings.ds_config.read_text())
    assert largest_pass(4e8, share, config, settings, 2, (20, 20), ds) == share


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ("--micro-batch 3", "4 / 3 = 1.33: take --batch-size 3"),
        ("--shapes 9", "2 to 6 shapes"),
        ("--init nowhere", "nowhere holds no weights: train it first"),
        ("--ds-config nowhere", "--ds-config nowhere cannot be read"),
        ("--anneal 1.5", "--anneal 1.5 must be at most 1"),
        ("--stage here", "--stage is for the folders of tools.prepare: drop it"),
        ("--judge nowhere", "--judge nowhere could not be loaded"),
        ("--judge-images 1", "--judge-images 1 must be at least 2"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, message):
    line = refuses(capsys, tmp_path / "run", *options.split())
    assert line.startswith("train_t2i.py: ") and message in line
    assert not (tmp_path / "run").exists()


def test_what_a_machine_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_NTASKS", "abc"), ("LOCAL_WORLD_SIZE", "x")):
        monkeypatch.setenv(name, value)
        assert f"{name} '{value}' in the environment must be a number" in refused(t2i, capsys)
        monkeypatch.setenv(name, "")  # as good as none
        monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "several Slurm tasks without RANK: see the srun line" in refused(t2i, capsys)
    monkeypatch.setenv("RANK", "0")
    wanted = "the launcher has set RANK, but not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR"
    for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    assert wanted in refused(t2i, capsys)
    alone = {"WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for bad in ({"RANK": 5}, {"LOCAL_RANK": "x"}, {"MASTER_PORT": "x"}):  # would wait for ever
        for key, value in (alone | {"RANK": 0} | bad).items():
            monkeypatch.setenv(key, str(value))
        assert "must be numbers, RANK < WORLD_SIZE" in refused(t2i, capsys)
    for key, value in (alone | {"RANK": 0}).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "tpu")
    monkeypatch.setattr(get_accelerator(), "is_available", lambda: False)
    assert "DS_ACCELERATOR tpu is not here: unset it" in refused(t2i, capsys)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "deepspeed is not installed: pip install -r requirements.txt" in refused(t2i, capsys)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"csv_monitor": {"enabled": "perhaps"}}, "is refused by DeepSpeed: "),
        ({"gradient_cliping": 0.1}, "gradient_cliping is not known here: take it out"),
        ({"elasticity": {"enabled": True}}, "elasticity is not known here"),
        ({"optimizer": {"type": "SGD"}}, '"optimizer" is not supported here'),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler" is not supported here'),
        ({"gradient_clipping": float("nan")}, '"gradient_clipping" nan must be'),
        ({"gradient_clipping": -1}, '"gradient_clipping" -1 must be at least 0'),
        ({"gradient_clipping": "1.0"}, '"gradient_clipping"'),
        ({"gradient_clipping": None}, '"gradient_clipping"'),
        ({"steps_per_print": 0}, '"steps_per_print" 0 must be at least 1'),
        ({"communication_data_type": "fp16"}, '"communication_data_type" must be fp32 or bf16'),
        ({"zero_optimization": {"stage": True}}, '"stage" True must be 1 or 2'),
    ],
)
def test_what_a_ds_config_may_not_say(tmp_path, capsys, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(json.loads(Settings.ds_config.read_text()) | change))
    line = refuses(capsys, tmp_path / "run", "--ds-config", path)
    assert str(path) in line and message in line


def of_other_rows(file):
    record = json.loads(file.read_text()) | {"rows": "0"}
    file.write_text(json.dumps(record | {"mark": mark_of(record)}))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("run.json", of_other_rows, "was trained on other rows: give its --data"),
        (
            "run.json",
            lambda file: file.write_text("{"),
            "run.json is damaged, or of another version",
        ),
        ("*zero_pp*", Path.unlink, "is partial: it holds 0 of 1 optimizer shards"),
        ("mp_rank*", Path.unlink, "and 0 mp_rank_*; delete it"),
    ],
)
def test_what_cannot_be_resumed_is_refused(done, tmp_path, capsys, name, change, message):
    out = shutil.copytree(done, tmp_path / "run")
    for file in newest(out).glob(name):
        change(file)
    assert message in refused(t2i, capsys, "--resume", "--threads", 1, "--out", out)


def test_a_folder_with_a_run_is_overwritten_only_when_all_is_well(done, few, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path / "run")
    line = refuses(capsys, out)
    assert "already holds a run: continue it with --resume, replace it with --overwrite" in line
    refuses(capsys, out, "--overwrite", "--size", 22)
    assert saved(out) == [40, 80]
    train(out, *few, "--overwrite")
    assert saved(out) == [20] and [path.stem for path in (out / "strips").iterdir()] == [
        f"{20:012d}"
    ]


def linked(path):
    """The folder lies elsewhere, and a link stands in its place."""
    path.rename(elsewhere := path.parents[2] / f"elsewhere-{path.name}")
    path.symlink_to(elsewhere)
    return elsewhere


@pytest.mark.parametrize(
    "jam",
    [
        lambda folder: linked(folder / f"{40:012d}"),
        lambda folder: (folder / "partial").write_text("a file"),
        lambda folder: (folder / "partial").symlink_to(folder.parent),
        lambda folder: ((folder / "latest").unlink(), (folder / "latest").mkdir()),
    ],
)
def test_what_stands_in_the_way_of_a_checkpoint(done, tmp_path, jam):
    out = shutil.copytree(done, tmp_path / "run")
    jam(out / "checkpoints")
    before = {path for path in out.iterdir() if path.name != "checkpoints"}
    how = ["--resume", "--threads", 1, "--samples", 88, "--keep", 1, "--out", out]
    call(t2i, *how)
    assert saved(out) == [88] and (out / "checkpoints" / "latest").read_text() == f"{88:012d}"
    assert before <= set(out.iterdir())  # what a link leads to is not ours to delete
    elsewhere = out / f"elsewhere-{40:012d}"
    assert not elsewhere.exists() or (elsewhere / "run.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(done, tmp_path, capsys):
    out = tmp_path / "run"
    with full_disk(out / "checkpoints" / "latest"):
        line = refuses(capsys, out)
    assert f"{80:012d} could not be written" in line and f"{40:012d} still stands" in line
    assert sorted(path.name for path in (out / "checkpoints").iterdir() if path.is_dir()) == [
        f"{40:012d}"
    ]
    call(t2i, "--resume", "--threads", 1, "--out", out)
    same(out, done)
