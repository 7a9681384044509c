"""train_mnist.py: what a run leaves, one step, stops and resumes, what it refuses."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import call, once_there, records, refused, stopped_once
from host_reads import HostReads
from PIL import Image
from test_digits import write_mnist

import train_mnist
from common.pipeline import Pipeline, settle_run
from common.settings import parse
from inputs import digits

QUICK = """--data mnist --preset digits-narrow --device cpu --seed 1 --steps 60
--batch-size 4 --warmup-steps 5 --checkpoint-every 20 --cfg 3 --solver heun --sample-steps 2"""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Options of a short run, on twelve pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    return [*QUICK.split(), "--data-dir", str(folder)]


@pytest.fixture(scope="module")
def run(quick):
    return lambda out, *options: call(train_mnist.main, *quick, "--out", out, *options)


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "run"
    run(out)
    return out


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def new_run(options, device="cpu"):
    """The settings, rows, network and optimizer of a run that begins."""
    typed, device = parse(train_mnist.Settings, list(map(str, options)), ""), torch.device(device)
    settings, rows = settle_run(train_mnist.Settings, typed, {}, device, lambda preset: {})
    return settings, rows, *train_mnist.build(settings, rows, {}, device)


# --- what comes out ------------------------------------------------------------------------------


def test_a_run_leaves_pictures_logs_and_the_averaged_weights(done):
    assert {file.name for file in done.iterdir()} == set(train_mnist.FILES)
    for name in ("samples.png", "curves.png"):
        with Image.open(done / name) as picture:
            assert min(picture.size) > 200
    with Image.open(done / "samples.gif") as film:
        assert film.n_frames == 3  # noise and two steps
    steps = [(row["step"], row["samples"]) for row in records(done / "log.csv")]
    assert steps == [("20", "80"), ("40", "160"), ("60", "240")]
    (row,) = records(done / "eval.csv")
    assert row["samples"] == "240"
    assert float(row["loss"]) == pytest.approx(
        sum(float(row[f"loss_t{i}/8"]) for i in range(8)) / 8
    )
    averages = [state["ema_0.05"] for state in checkpoint(done)["adamw"]["state"].values()]
    groups = Pipeline.open(done).model.param_groups(1.0)
    exported = [weight for group in groups for weight in group["params"]]
    assert all(map(torch.equal, exported, averages)) and len(exported) == len(averages)
    assert not torch.equal(exported[0], next(iter(checkpoint(done)["model"].values())))


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_a_run_again_and_a_run_in_two_parts_are_the_same(done, run, tmp_path, capsys, number):
    if number is None:
        run(tmp_path)
        assert (tmp_path / "log.csv").read_bytes() == (done / "log.csv").read_bytes()
    else:
        with stopped_once(tmp_path / "checkpoint.pt", number):
            run(tmp_path)
        step = checkpoint(tmp_path)["step"]
        assert f"stopped at step {step} of 60; add --resume" in capsys.readouterr().out
        assert 20 <= step < 60 and (tmp_path / "samples.gif").exists()
        call(train_mnist.main, "--resume", "--device", "cpu", "--out", tmp_path)
        steps = [int(row["step"]) for row in records(tmp_path / "log.csv")]
        assert steps == sorted({step, 20, 40, 60})
    for name in ("model.safetensors", "config.json", "eval.csv", "samples.gif"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_a_dry_run_leaves_nothing(run, tmp_path, capsys):
    run(tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()
    assert "samples.gif" in capsys.readouterr().out


def test_a_run_from_another_has_its_network_and_weights(done, quick, tmp_path):
    without = [*quick[quick.index("--device") :], "--init", done]
    settings, rows, model, _ = new_run(without)
    assert (rows.names, settings.preset, settings.shift) == (["mnist"], "digits-narrow", 1)
    exported = Pipeline.open(done).model.state_dict()
    assert all(torch.equal(p, exported[name]) for name, p in model.state_dict().items())


def test_glyphs_come_from_the_seed_of_the_run(run, tmp_path, monkeypatch):
    few = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: few(20, seed))
    run(tmp_path, "--data", "glyphs", "--steps", 1)
    call(train_mnist.main, "--resume", "--device", "cpu", "--out", tmp_path)


# --- one step ------------------------------------------------------------------------------------


def test_a_step_clips_the_gradient_and_moves_each_group_at_its_rate(quick):
    """Adam's first step moves each weight that has a gradient by its rate."""
    how = (*quick, "--loss", "pseudo_huber", "--lr", 0.01, "--ema", 0.1)
    settings, rows, model, adamw = new_run(how)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    before = {p: p.detach().clone() for p in model.parameters()}
    _, norm = train_mnist.train_step(model, adamw, rows, settings, 0, torch.Generator())
    assert norm > 2  # before clipping
    moments = torch.cat([state["exp_avg"].flatten() for state in adamw.state.values()])
    clipped = moments.norm().item() / (1 - train_mnist.BETAS[0])
    assert clipped == pytest.approx(train_mnist.CLIP, rel=1e-3)
    groups = model.param_groups(0.01)
    assert len(groups) > 1  # muP
    for group in groups:
        for p in group["params"]:
            step = (p.detach() - before[p]).abs().max().item()
            assert step == pytest.approx(group["lr"] / 5, rel=1e-3)
            assert "ema_0.10" in adamw.state[p]


def test_a_step_draws_from_seed_and_step_alone(quick):
    settings, rows, *_ = new_run(quick)
    generator = torch.Generator()
    cases = [(settings, 0), (settings, 1), (replace(settings, seed=2), 0), (settings, 0)]
    batches = [train_mnist.draw(rows, how, step, generator) for how, step in cases]
    for field in ("u", "noise"):
        first, *others, again = (getattr(batch, field) for batch in batches)
        assert torch.equal(first, again) and not any(torch.equal(first, x) for x in others)
    assert torch.equal((batches[0].u * 4).long(), torch.arange(4))  # stratified
    many = train_mnist.draw(rows, replace(settings, batch_size=4000), 0, generator)
    assert 0.08 < many.dropped.float().mean() < 0.12


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_step_never_reads_a_value_back(quick, device):
    settings, rows, model, adamw = new_run(quick, device)
    log, generator = train_mnist.Log(None, 100), torch.Generator(device)
    for step in range(2):  # the first draws the epoch's permutation, on the host
        if step and device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with HostReads() as reads:
            loss, norm = train_mnist.train_step(model, adamw, rows, settings, step, generator)
            log.add(loss)
            assert log.end_step(step + 1, 0, norm, lr=0.1) is None
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    assert reads.seen == []


def test_the_rate_warms_up_and_falls_to_zero_and_annealing_ends():
    settings = train_mnist.Settings(steps=100, warmup_steps=10, anneal=0.4)
    rates = [train_mnist.learning_rate(settings, step) for step in (0, 4, 9, 50, 100)]
    assert rates == pytest.approx([0.1, 0.5 * 0.96, 0.91, 0.5, 0])
    betas = [train_mnist.annealing(settings, step) for step in (0, 10, 39, 40, 99)]
    assert betas == pytest.approx([1, 0.75, 0.025, 0, 0])


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("every, saved", [(1, [1]), (50, [])])
def test_a_loss_that_is_not_finite_ends_the_run(done, quick, tmp_path, capsys, every, saved):
    """A rate of 1e30 does it in the second step. --overwrite: what was there is gone."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    how = ["--overwrite", "--lr", 1e30, "--warmup-steps", 1, "--checkpoint-every", every]
    line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path, *how)
    left = f"{tmp_path / 'checkpoint.pt'} is from before" if saved else "nothing was saved"
    assert line == (
        "train_mnist.py: loss or gradient is not finite at step 2 (lr"
        f" {1e30 * (1 - 1 / 60 if saved else 1 - 19 / 60):.3g}); {left}; start again with"
        " --overwrite and a lower --lr"
    )
    assert (
        [checkpoint(tmp_path)["step"]] == saved
        if saved
        else not (tmp_path / "checkpoint.pt").exists()
    )
    assert not (tmp_path / "model.safetensors").exists()


def test_a_full_disk_leaves_the_last_checkpoint(done, run, quick, tmp_path, capsys):
    """No file may grow beyond 100 kB once there is a checkpoint: that is how a full disk looks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, limits[1]))
    path = tmp_path / "checkpoint.pt"
    try:
        with once_there(path, fill):
            line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path} could not be written: File too large" in line
    assert checkpoint(tmp_path)["step"] < 60 and len(list(tmp_path.iterdir())) == 2
    run(tmp_path, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == (
        done / "model.safetensors"
    ).read_bytes()


def test_a_folder_with_a_run_is_not_overwritten_by_accident(done, run, quick, tmp_path, capsys):
    (tmp_path / "log.csv").write_text("a log alone is a run")
    for out in (done, tmp_path):
        line = refused(train_mnist.main, capsys, *quick, "--out", out)
        assert (
            f"--out {out} already holds a run: continue it with --resume, replace it with" in line
        )
    run(tmp_path, "--resume", "--steps", 1)  # killed before its first checkpoint: it begins
    run(tmp_path, "--overwrite", "--steps", 2)
    assert [row["step"] for row in records(tmp_path / "log.csv")] == ["2"]


def spoil(**changes):
    def change(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return change


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, ["--lr", 0.1], "--lr 0.1 differs from the run to resume, which has 0.006"),
        (None, ["--steps", 61], "--steps 61 differs from the run to resume, which has 60"),
        (lambda path: path.write_bytes(b"x"), [], "is no checkpoint of this script"),
        (lambda path: torch.save({"model": {}}, path), [], "is no checkpoint of this script (KeyE"),
        (spoil(rows="0"), [], "was trained on other rows: give its --data"),
        (spoil(config={"dim": 3}), [], "is of another network: choose another --out"),
    ],
)
def test_what_cannot_be_resumed_is_refused(done, tmp_path, capsys, change, options, message):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    if change:
        change(tmp_path / "checkpoint.pt")
    how = ("--resume", "--device", "cpu", "--out", tmp_path, *options)
    assert message in refused(train_mnist.main, capsys, *how)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--preset huge", "--preset 'huge' must be one of digits, tiny, small"),
        ("--solver rk4", "--solver 'rk4' must be one of euler, heun, rf_solver"),
        ("--data imagenet", "--data imagenet is none of shapes, auto, mnist, glyphs, cifar10"),
        ("--data mnist mnist --data-weights 1", "--data-weights has 1 numbers, must have one for"),
        ("--size 20", "--size 20 does not fit --data, which was made with 28: drop it"),
        ("--patch-size 5", "a patch of 5 must divide what the network sees, 28x28"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--device tpu", "--device 'tpu' is not here; this machine has: "),
        ("--residual post", "--residual 'post' must be one of prenorm, auraflow"),
        ("--ema 0.5", "sigma_rel = 0.5 must lie in (0, 0.2887)"),
        ("--shift 0", "--shift 0.0 must be above 0"),
        ("--lr nan", "--lr nan must be finite"),
        ("--seed -1", "--seed -1 must be at least 0"),
        ("--anneal 2", "--anneal 2 must lie in [0, 1]"),
        ("--anneal 0.5", "--anneal 0.5 is for pairs (tools.pairs) with --segments 1"),
        ("--segments 2", "--segments 2 must divide the 0 of --data"),
        ("--init nowhere", "nowhere holds no weights: train it first"),
        ("--resume --dry-run", "--resume goes with none of --overwrite, --dry-run and --init"),
        ("--resume --init {done}", "--resume goes with none of --overwrite, --dry-run and --init"),
    ],
)
def test_bad_options_end_in_one_line(done, quick, tmp_path, capsys, options, message):
    how = options.format(done=done).split()
    line = refused(train_mnist.main, capsys, *quick, "--out", tmp_path / "run", *how)
    assert line.startswith("train_mnist.py: ") and message in line
    assert not (tmp_path / "run").exists()


# --- what it needs -------------------------------------------------------------------------------


def test_chapter_1_needs_no_large_package_and_nothing_that_windows_lacks():
    absent = ("deepspeed", "datasets", "diffusers", "transformers", "pyarrow", "fsspec", "fcntl")
    code = (
        f"import signal, sys; sys.modules.update(dict.fromkeys({absent})); del signal.SIGUSR1\n"
        "import train_mnist\nwith train_mnist.Signals(): pass"
    )
    root = os.path.dirname(train_mnist.__file__)
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
