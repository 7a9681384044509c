"""Both trainers on all that rows can be: a run learns, draws, and goes on where it was stopped."""

import json
import os
import zlib

import numpy as np
import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, opened, records, refused, stopped_once, t2i
from PIL import Image
from test_digits import write_mnist
from test_encoders import tiny_t5, tiny_vae
from test_pairs import make
from test_prepare import pictures, run

import rf
import train_mnist
import train_t2i
from common.pipeline import Pipeline

TRAINERS = {  # main, options of all runs and of short ones, a file that is there after some steps
    "mnist": (
        train_mnist.main,
        "--device cpu --seed 3 --batch-size {0} --steps {1} --warmup-steps 5 --sample-steps 1",
        "checkpoint.pt",
    ),
    "t2i": (
        t2i,
        "--threads 1 --seed 3 --batch-size {0} --samples {2} --warmup-samples 20"
        " --cooldown-samples {2} --eval-every-samples {2} --eval-prompts 1 --sample-steps 1",
        "log.csv",
    ),
}
DATA = {
    "digits": "--data mnist --data-dir {0}",
    "shapes": "--data shapes",
    "prepared": "--data {0}/a --window 1",
    "two prepared": "--data {0}/a {0}/b --data-weights 1 3",
    "latents": "--data {0}/latents",
    "a latent world": "--data shapes --size 24 --vae {0}/vae --text-encoder {0}/t5",
    "pairs": "--data {0}/pairs-{1} --anneal 0.5",
}


def options(trainer, batch, steps):
    return TRAINERS[trainer][1].format(batch, steps, batch * steps).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Twelve digits, folders of pictures of one size and of three, pairs of each chapter."""
    home = tmp_path_factory.mktemp("home")
    write_mnist(home)
    square = pictures(home / "square", 30, [(48, 48)])
    run(square, home / "a", "--chunk-rows", 6, "--validation", 1)
    encoders = ["--vae", tiny_vae(home / "vae"), "--text-encoder", tiny_t5(home / "t5")]
    run(square, home / "latents", *encoders, "--text-tokens", 4)
    run(pictures(home / "source", 30), home / "b")
    for name, facts in {"mnist": DIGITS, "t2i": SHAPES}.items():
        make(exported(home / f"first-{name}", facts), home / f"pairs-{name}", "--segments", 2)
    return home


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_learns_draws_and_goes_on_where_it_was_stopped(home, tmp_path, capsys, trainer, data):
    """The second part of chapter 2's run on a prepared folder reads it through a stage."""
    main, _, begun = TRAINERS[trainer]
    how = [*options(trainer, 4, 60), *DATA[data].format(home, trainer).split()]
    how += ["--checkpoint-every", 20] if trainer == "mnist" else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(main, *how, "--out", whole)
    losses = [float(row["loss"]) for row in records(whole / "log.csv")]
    assert losses[-1] < 0.9 * losses[0]
    with Image.open(whole / "samples.png") as sheet:
        assert min(sheet.size) > 100 and len(sheet.getcolors(2**24)) > 100
    with stopped_once(parts / begun):
        call(main, *how, "--out", parts)
    assert "add --resume to continue" in capsys.readouterr().out
    Pipeline.open(parts)  # what was stopped has weights, and those of chapter 1 are drawn
    assert trainer == "t2i" or (parts / "samples.png").exists()
    later = how[:2]
    if (trainer, data) == ("t2i", "prepared"):
        sizes = [c["bytes"] for c in json.loads((home / "a/manifest.json").read_text())["chunks"]]
        limit = (sum(sizes) - 1) / 1e9  # one must go before the last can come
        later += ["--workers", 2, "--stage", tmp_path / "stage", "--stage-limit", limit]
    call(main, "--resume", "--out", parts, *later)
    for name in ("model.safetensors", "config.json", "eval.csv"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    own = f"stage/t2i-{zlib.crc32(os.path.realpath(parts).encode()):08x}/*/chunks/*.arrow"
    assert bool(list(tmp_path.glob(own))) == ("--stage" in later)
    pipeline = Pipeline.open(whole)
    if data == "latents":  # drawn with the encoders that made the rows
        assert (pipeline.text.name, pipeline.image.name) == (str(home / "t5"), str(home / "vae"))
        assert pipeline.features(["a red ring"]).shape[:2] == (1, 4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_few_held_out_rows_or_none(home, tmp_path, trainer):
    """The mean is over the times that are asked; without any the run comes to its end."""
    for few in (3, 0):
        run(home / "square", tmp_path / f"data{few}", "--validation", few)
        out = tmp_path / f"run{few}"
        how = ["--data", tmp_path / f"data{few}", "--residual", "auraflow", "--out", out]
        call(TRAINERS[trainer][0], *options(trainer, 4, 2), *how)
        row = records(out / "eval.csv")[-1]
        by_time = np.array([float(row[f"loss_t{i}/8"]) for i in range(8)])
        assert np.isfinite(by_time).tolist() == 3 * [few > 0] + 5 * [False]
        assert float(row["loss"]) == pytest.approx(by_time[:3].mean(), nan_ok=True)
        assert (out / "samples.png").exists() == (few > 0)
        config = Pipeline.open(out).model.config
        assert (config.residual, config.n_registers) == ("auraflow", 8)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_from_another_on_larger_pictures(home, tmp_path, capsys, trainer):
    """The size is that of the data. Of pixels the shift stays."""
    main, first = TRAINERS[trainer][0], home / "first-t2i"
    run(home / "square", tmp_path / "data", "--size", 40, "--text-tokens", 12)
    how = [*options(trainer, 4, 2), "--data", tmp_path / "data", "--init", first]
    call(main, *how, "--out", tmp_path / "run")
    pipeline = Pipeline.open(tmp_path / "run")
    assert (pipeline.facts["size"], pipeline.facts["shift"]) == (40, 2.0)
    assert pipeline.model.config.max_grid == 10
    (first / "made_by.txt").write_text("train_mnist.py" if trainer == "mnist" else "train_t2i.py")
    said = refused(main, capsys, *how, "--out", first, "--overwrite")
    assert "lies in --out, which is replaced: choose another --out" in said
    assert (first / "model.safetensors").exists()


@pytest.mark.parametrize(
    "how, line",
    [
        ("--time logit_normal", {"segments": 1, "time": "logit_normal"}),
        ("--anneal 0.5", {"segments": 1, "time": "u_shaped"}),
        ("--segments 2 --time start", {"segments": 2, "time": "start"}),
    ],
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_loss_of_a_network_that_stands_still(home, tmp_path, monkeypatch, trainer, how, line):
    """At --lr 0: the flow's own, from what the rows draw. shift is 2; pairs have u-shaped times."""
    first = home / "first-t2i"
    data = "shapes" if "normal" in how else home / "pairs-t2i"
    for program in (train_mnist, train_t2i):
        monkeypatch.setattr(program, "LOG_EVERY", 1)
    given = ["--init", first, "--data", data, "--lr", 0, "--muon-lr", 0, "--out", tmp_path]
    call(TRAINERS[trainer][0], *options(trainer, 4, 8), *given, *how.split())
    settings, rows = opened(data, batch_size=4, seed=3)
    model = Pipeline.open(first).model
    for step, row in enumerate(records(tmp_path / "log.csv")):
        if trainer == "mnist":
            batch = train_mnist.draw(rows, settings, step, torch.Generator())
        else:
            batch = rows.draw(range(4 * step, 4 * step + 4), 3)
        states, text, u, noise = rows.encode(batch, "cpu")
        beta = max(0, 1 - step / 4) if "anneal" in how else 0.0
        clean, noise, t = rf.line(states, noise, u, shift=2.0, beta=beta, **line)
        loss = rf.rf_loss(model, clean, text, t=t, noise=noise).mean()
        assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.nn.utils.get_total_norm(gradients).item()  # before it is clipped
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    assert step == 7


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_grows_reads_what_comes_next(home, tmp_path, monkeypatch, trainer):
    """A network that stands still: the losses after a resume, at new times. 20 samples are seen.

    Chapter 2 goes on with another batch size, of which they are no multiple, and through a stage.
    """
    first, how = home / "first-t2i", options(trainer, 4, 5)
    run(home / "square", tmp_path / "data", "--size", 20, "--text-tokens", 12, "--chunk-rows", 6)
    for program in (train_mnist, train_t2i):
        monkeypatch.setattr(program, "LOG_EVERY", 1)
    given = ["--init", first, "--data", tmp_path / "data", "--lr", 0, "--muon-lr", 0, "--window", 1]
    call(TRAINERS[trainer][0], *how, *given, "--out", tmp_path / "run")
    grown, B, end = ["--steps", 8], 4, 32
    if trainer == "t2i":
        grown, B, end = ["--samples", 60, "--batch-size", 8, "--stage", tmp_path / "stage"], 8, 60
    again = ["--resume", *how[:2], "--shift", 1, "--time", "uniform", "--out", tmp_path / "run"]
    call(TRAINERS[trainer][0], *again, *grown)
    settings, rows = opened(tmp_path / "data", batch_size=4, seed=3, window=1)
    model, seen = Pipeline.open(first).model, 20
    for row in records(tmp_path / "run" / "log.csv")[5:]:
        if trainer == "mnist":
            batch = train_mnist.draw(rows, settings, seen // B, torch.Generator())
        else:
            batch = rows.draw(range(seen, seen + B), 3)
        states, text, u, noise = rows.encode(batch, "cpu")
        clean, noise, t = rf.line(states, noise, u, time="uniform")
        loss = rf.rf_loss(model, clean, text, t=t, noise=noise).mean().item()
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        seen += B
        assert row["samples"] == str(seen)
    assert seen == end


def test_rows_that_take_turns_keep_their_batch_size(home, tmp_path, capsys):
    """What stands where would be another; all else may change."""
    how = ["--resume", "--threads", 1, "--samples", 16, "--lr", 0.001, "--out", tmp_path]
    call(t2i, *options("t2i", 4, 2), *DATA["two prepared"].format(home).split(), *how[-2:])
    said = refused(t2i, capsys, *how, "--batch-size", 8)
    assert "--batch-size 8 differs from the run to resume, which has 4, and the sizes or" in said
    call(t2i, *how)
    assert records(tmp_path / "log.csv")[-1]["samples"] == "16"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_pictures_have_the_colour_of_their_caption(tmp_path, trainer):
    colours = ("red", "green", "blue")
    (tmp_path / "source").mkdir()
    for i in range(60):
        pixels = np.full((16, 16, 3), 40, np.uint8)
        pixels[..., i % 3] = 210
        Image.fromarray(pixels).save(tmp_path / f"source/{i}.png")
        (tmp_path / f"source/{i}.txt").write_text(f"a {colours[i % 3]} one")
    run(tmp_path / "source", tmp_path / "data")
    steps = {"mnist": 400, "t2i": 150}[trainer]
    how = [*options(trainer, 16, steps), "--data", tmp_path / "data", "--out", tmp_path / "run"]
    call(TRAINERS[trainer][0], *how)
    pipeline = Pipeline.open(tmp_path / "run")
    captions = [f"a {colour} one" for colour in colours] * 4
    how = {"steps": 8, "cfg": 3.0, "cfg_below": 1.0}  # short runs need all of it
    drawn = pipeline.draw(captions, pipeline.noise(0, range(12)), **how).float().mean((2, 3))
    assert torch.equal(drawn.argmax(1), torch.arange(3).repeat(4))
    assert (drawn.view(4, 3, 3).median(0).values - 40 - 170 * torch.eye(3)).abs().max() < 30
