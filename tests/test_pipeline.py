"""common/pipeline.py: what is opened, what it draws, and the averages of a real checkpoint."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import SHAPES, close, exported
from test_encoders import tiny_t5, tiny_vae
from test_ranks import run

import rf
import train_t2i
from common import pipeline as pipeline_module
from common.pipeline import (
    Pipeline,
    Sampling,
    checkpoints,
    load_shard,
    read_averages,
    settle_run,
)
from inputs.encoders import HashText, Pixels, to_bytes

STEPS, WIDTHS = 6, train_t2i.EMA_WIDTHS

# --- drawing -------------------------------------------------------------------------------------

GREYS = {"dark": -0.5, "light": 0.5, "": 0.0}
TEXT = HashText(8, 4)


def greys(factor=1):
    """On the field v = (x − c)/t every path ends in c: a grey that the caption names."""
    image, batches = Pixels(), []
    image.factor = factor
    facts = {"size": 4 * factor, "cfg": 1.0, "cfg_below": 1.0, "steps": 4, "shift": 3.0}
    facts |= {"solver": "euler"}

    def model(x, t, text):
        batches.append(len(x))
        near = torch.cdist(text.flatten(1), TEXT(list(GREYS)).flatten(1)).argmin(1)
        return (x - torch.tensor(list(GREYS.values()))[near].view(-1, 1, 1, 1)) / t[0]

    return Pipeline(model, TEXT, image, facts), batches


@pytest.mark.parametrize(
    "how, gain, times, runs",
    [
        ({}, 1, rf.timesteps(4, 3.0), 1),  # the run's own values
        ({"cfg": 1.5, "steps": 2, "shift": 1.0}, 1.5, [1, 0.5, 0], 2),
    ],
)
def test_a_picture_is_its_captions_in_batches_of_any_size(how, gain, times, runs):
    """The way is straight: x(t) = grey + t·(noise − grey). With guidance: 0 + 1.5 · (grey − 0)."""
    (pipeline, batches), captions = greys(), ["dark", "light", "light", "dark", "dark"]
    noise = pipeline.noise(0, range(5))
    path = pipeline.draw(captions, noise, batch=2, trajectory=True, **how)
    grey = gain * torch.tensor([GREYS[caption] for caption in captions]).view(5, 1, 1, 1)
    close(path, to_bytes(torch.stack([grey + t * (noise - grey) for t in times])), atol=1, rtol=0)
    assert torch.equal(pipeline.draw(captions, noise, **how), path[-1])
    assert batches[:: len(times) - 1] == [n * runs for n in (2, 2, 1, 5)]


def test_large_pictures_are_drawn_few_at_a_time():
    pipeline, batches = greys(factor=128)
    pipeline.draw(["dark"] * 40, pipeline.noise(0, range(40)), steps=1)
    assert batches == [32, 8]  # as many pixels as 128 pictures of 256²


def test_noise_depends_on_seed_and_number_alone():
    pipeline, _ = greys()
    a = pipeline.noise(0, range(5), "4x6")
    assert torch.equal(pipeline.noise(0, [3, 1], "4x6"), a[[3, 1]])
    assert not torch.equal(a, pipeline.noise(1, range(5), "4x6"))
    assert len(a.unique(dim=0)) == 5 and abs(a.std() - 1) < 0.15


@pytest.mark.parametrize(
    "size, message",
    [
        ("7", "--size 7 must be a multiple of 2, the VAE's factor"),
        ("8x8x8", "--size 8x8x8 must be a number of pixels or HEIGHTxWIDTH"),
        ("-8", "--size -8 must be a number"),
    ],
)
def test_size_in_pixels_becomes_a_shape(size, message):
    pipeline, _ = greys(factor=2)
    assert [pipeline.latent(size) for size in (16, "16x12")] == [(3, 8, 8), (3, 8, 6)]
    with pytest.raises(ValueError, match=message):
        pipeline.latent(size)


def test_text_is_rounded_as_the_rows_stored_it():
    (pipeline, _), plain = greys(), TEXT(["light dark"])
    pipeline.facts["text_format"] = {"tokens": 4, "dim": 8, "bits": 8, "reach": 0.25}
    assert plain.abs().max() > 0.25
    with pytest.raises(ValueError, match="captions 'light' must be a list"):
        pipeline.features("light")
    close(pipeline.features(["light dark"]), plain.clamp(-0.25, 0.25), atol=0.25 / 255)


# --- what is opened ------------------------------------------------------------------------------


def test_exported_weights_draw_the_same(tmp_path):
    pipeline = Pipeline.open(exported(tmp_path / "run", SHAPES))
    assert pipeline.facts == SHAPES and f"{tmp_path}/run after 80 samples" in pipeline.origin
    pipeline.save(tmp_path / "again")
    pipelines, noise = (pipeline, Pipeline.open(tmp_path / "again")), pipeline.noise(0, [0, 1])
    assert torch.equal(*(each.draw(["a red ring", ""], noise) for each in pipelines))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: only its exported weights"):
        Pipeline.open(tmp_path / "run", ema=0.1)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r'config.json is damaged.* "model" is missing'):
        Pipeline.open(tmp_path / "run")


@pytest.mark.parametrize("auraflow", [False, True])
@pytest.mark.parametrize("device, dtype", [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_gpus_draw_in_half_precision(monkeypatch, device, dtype, auraflow):
    opened = {
        "auraflow": lambda name, device, dtype: (name, device.type, dtype),
        "open": lambda name, device, ema, dtype: (name, device.type, dtype),
    }
    for name, record in opened.items():
        monkeypatch.setattr(Pipeline, name, record)
    monkeypatch.setattr(pipeline_module, "choose_device", torch.device)
    monkeypatch.setattr(pipeline_module, "begin", lambda device: None)
    sampling = Sampling(run="run", device=device, auraflow=auraflow)
    assert sampling.open() == ("run", device, dtype)
    assert sampling.open("other") == ("other", device, dtype)


def test_half_precision_draws_nearly_the_same(tmp_path):
    """Network and text alike; the noise is the same, and so are the weights' names."""
    facts = {"text_encoder": tiny_t5(tmp_path / "t5"), "text_tokens": 7}
    run = exported(tmp_path / "run", SHAPES | facts)
    full, half = Pipeline.open(run), Pipeline.open(run, dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {half.text.model.dtype} == {torch.bfloat16}
    assert {p.dtype for p in full.model.parameters()} == {full.text.model.dtype} == {torch.float32}
    assert half.origin == full.origin
    noise, captions = full.noise(0, range(3)), ["a red ring", "a ring", ""]
    a, b = (each.draw(captions, noise).int() for each in (full, half))
    assert 0 < (a - b).abs().float().mean() < 2


# --- averages ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two ranks that saved every step, and each step's weights."""
    out = tmp_path_factory.mktemp("trained") / "run"
    how = ["--samples", 8 * STEPS, "--batch-size", 8, "--save-every-samples", 8, "--keep", STEPS]
    how += ["--threads", 1, "--warmup-samples", 0, "--cooldown-samples", 0, "--lr", 0.02]
    run(out, *how, "--eval-prompts", 1, "--sample-steps", 1)
    files = [next(c.glob("mp_rank_*")) for c in checkpoints(out / "checkpoints")]
    return out, [load_shard(file)["module"] for file in files]


def average(steps, width):
    """θ̂ ← β·θ̂ + (1 − β)·θ with β = (1 − 1/t)^{γ+1} (EDM2, eq. 127)."""
    gamma, mean = rf.gamma_from_sigma_rel(width), {}
    for t, weights in enumerate(steps, 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        mean = {k: beta * mean.get(k, 0) + (1 - beta) * w for k, w in weights.items()}
    return mean


def distance(a, b):
    return sum((a[name] - b[name]).square().sum() for name in b).sqrt()


def test_averages_are_read_from_the_shards_of_all_ranks(trained, tmp_path, monkeypatch):
    out, steps = trained
    last = shutil.copytree(checkpoints(out / "checkpoints")[-1], tmp_path / "last")
    for rank, other in ((1, 10), (0, 9)):  # as of many ranks: 9 comes before 10
        name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        (last / name.format(rank)).rename(last / name.format(other))
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # none of its code is needed
    monkeypatch.setattr(pipeline_module, "same_checkpoint", lambda *given: None)  # ranks are new
    found = read_averages(last, [rf.average_name(width) for width in WIDTHS])
    assert len(steps) == STEPS
    for width, mean in zip(WIDTHS, found.values(), strict=True):
        close(mean, average(steps, width))
    with pytest.raises(ValueError, match=r"last holds no average ema_0.20"):
        read_averages(last, ["ema_0.20"])


def test_a_run_opens_with_any_average(trained):
    out, steps = trained
    middle, pipeline = checkpoints(out / "checkpoints")[2], Pipeline.open(out, ema=0.1)
    close(pipeline.model.state_dict(), average(steps, 0.1), atol=1e-5)
    assert f"average 0.1, after {8 * STEPS} samples" in pipeline.origin
    close(Pipeline.open(middle).model.state_dict(), average(steps[:3], 0.05), atol=1e-5)
    for path, number in ((out, STEPS), (middle, 3)):  # one that was never kept
        between = Pipeline.open(path, ema=0.075).model.state_dict()
        near, far = (distance(between, average(steps[:number], w)) for w in (0.075, 0.1))
        assert near < 0.02 * far


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"module": Trap()}, tmp_path / "mp_rank_00")
    with pytest.raises(pickle.UnpicklingError):
        load_shard(tmp_path / "mp_rank_00")
    assert not (tmp_path / "sprung").exists()


def test_the_shift_of_latents_follows_the_size_of_the_pictures(tmp_path):
    """SD3's 3 at 1024 pixels, and √(m/n) of it elsewhere: not more at each --init."""
    vae, known = tiny_vae(tmp_path / "vae"), {"data": ["shapes"], "batch_size": 8, "places": 64}
    older, found = (
        exported(tmp_path / "older", SHAPES | {"vae": vae, "size": 256, "shift": 1.5}),
        [],
    )
    for size in (64, 512, 1024):
        for more in ({"vae": vae}, {"init": older}, {"vae": vae, "shift": 7.0}, {}):
            settings, _ = settle_run(
                train_t2i.Settings, known | {"size": size} | more, {}, "cpu", train_t2i.recipe_of
            )
            found.append(settings.shift)
    assert found == [1, 1.5, 7, 2, 1.5, 2.25, 7, 2, 3, 4.5, 7, 2]
