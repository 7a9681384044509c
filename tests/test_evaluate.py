"""common/evaluate.py: the validation loss and the pictures, in closed form and on several ranks."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from math import nan

import numpy as np
import pytest
import torch
import transformers
from helpers import SHAPES, exported, opened
from safetensors.torch import load_file
from test_digits import write_mnist
from test_encoders import tiny_clip, tiny_t5, tiny_vae
from test_pairs import make
from test_prepare import picture, pictures, run
from torchvision.transforms.functional import pil_to_tensor

import rf
from common import evaluate
from common.evaluate import (
    COLUMNS,
    ROWS,
    Judge,
    Ranks,
    asked,
    draw_asked,
    frechet_distance,
    judged,
    validation,
)
from common.pipeline import fixed_noise
from inputs.encoders import to_bytes, to_unit
from inputs.shapes import TAGS, World, draw_scene, render


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    source = pictures(home / "source", 60)
    run(source, home / "prepared")
    run(source, home / "few", "--validation", 1)
    run(source, home / "none", "--validation", 0)
    run(pictures(home / "square", 300, [(48, 48)]), home / "many", "--validation", 30)
    vae = ["--vae", tiny_vae(home / "vae"), "--validation", 30]
    run(home / "square", home / "latents", *vae)
    tiny_clip(home / "clip")
    make(exported(home / "run", SHAPES), home / "pairs", "--number", 120, "--segments", 4)
    return home


def on_ranks(count, work):
    """What each of so many ranks gets, every one a thread."""
    values, barrier = [None] * count, threading.Barrier(count, timeout=60)

    class Rank(Ranks):
        def gather(self, value):
            values[self.rank] = value
            barrier.wait()
            return values

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Rank(rank, count)), range(count)))


def all_alike(work):
    """What every rank gets, whatever their number."""
    first, *others = on_ranks(1, work) + on_ranks(3, work)
    for other in others:
        torch.testing.assert_close(other, first, equal_nan=True)
    return first


# --- the validation loss -------------------------------------------------------------------------


def guess(x, t, text):
    """A velocity that hears of all that it is given."""
    return x * t.view(-1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "kind, segments", [("prepared", 1), ("few", 1), ("none", 1), ("pairs", 1), ("pairs", 2)]
)
def test_each_held_row_is_asked_at_its_time(home, kind, segments):
    """On its own line or piece, in the mean over those of one time; few: less than ranks."""
    settings, rows = opened(home / kind, segments=segments)
    how, losses = {"segments": segments, "shift": settings.shift}, [[] for _ in range(8)]
    for held in rows.held:
        for number in held.batches(1):
            states, text, _, noise = rows.encode(rows.draw(number, held.seed, held), "cpu")
            index = held.t_index(number)
            data, noise = rf.line_at(states, noise, index / 8, **how)
            loss = rf.rf_loss(guess, data, text, t=index / 8, noise=noise)
            losses[index].append(loss.item())
    found = all_alike(lambda ranks: validation(guess, rows, settings, "cpu", ranks))
    wanted = [sum(known) / len(known) if known else nan for known in losses]
    assert found == pytest.approx(wanted, rel=1e-4, nan_ok=True)


# --- pictures ------------------------------------------------------------------------------------


def painter(text, targets):
    """v = (x − target)/t: each path ends in the picture (C, H, W) uint8 of the nearest text, or in
    the latent fp32."""
    targets = to_unit(targets) if targets.dtype == torch.uint8 else targets

    def model(x, t, given):
        nearest = torch.cdist(given.flatten(1), text.flatten(1)).argmin(1)
        return (x - targets[nearest]) / t[:, None, None, None]

    return model


def drawn(model, rows, wanted, settings, **how):
    return all_alike(lambda ranks: draw_asked(model, rows, wanted, settings, "cpu", ranks, **how))


def test_true_pictures_score_one_and_others_do_not():
    """Of shapes; on the sheet is a row for each of the first four captions of a tag."""
    settings, rows = opened("shapes", cfg=1.0, sample_steps=2)
    wanted, world, rng = asked(rows, 6), World(20, 4, 6, 10), np.random.default_rng(0)
    scenes = [draw_scene(meaning, rng, world) for meaning, _ in wanted.meanings]
    true = torch.stack([torch.from_numpy(render(scene, 20, rng)) for scene in scenes])
    true = true[[wanted.captions.index(caption) for caption in wanted.captions]]  # some come twice
    text = rows.features(rows.text.prepare(wanted.captions), "cpu")
    shown = [tag * 6 + i for i in range(4) for tag in range(6)]
    frames, scores = drawn(painter(text, true), rows, wanted, settings, trajectory=True)
    noise = fixed_noise(settings.seed, range(36), (3, 20, 20))
    assert len(frames) == 3 and torch.equal(frames[0], to_bytes(noise[shown]))
    assert torch.equal(frames[-1], true[shown])
    assert list(scores)[:7] == [*TAGS, "mean"] and scores["mean"] > 0.98
    _, scores = drawn(painter(text, true.roll(6, 0)), rows, wanted, settings)
    assert scores["mean"] < 0.25


def test_words_are_drawn_ten_times_each(tmp_path):
    write_mnist(tmp_path)
    settings, rows = opened("mnist", data_dir=tmp_path, cfg=1.0, sample_steps=1)
    wanted, greys = asked(rows, 3), torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    greys = greys.expand(10, 1, 28, 28)
    assert wanted.captions == 10 * list("0123456789")
    frames, scores = drawn(painter(torch.eye(11)[:10, None], greys), rows, wanted, settings)
    assert torch.equal(frames[0], greys.repeat(10, 1, 1, 1)) and scores == {}


@pytest.mark.parametrize("kind", ["prepared", "few"])
def test_other_rows_are_asked_for_their_held_out_captions(home, kind):
    """Those of the most frequent size, with the text that is stored."""
    settings, rows = opened(home / kind, cfg=1.0, sample_steps=1)
    wanted, held = asked(rows, 3), max(rows.held, key=lambda held: len(held.rows))
    assert wanted.captions == held.captions(range(held.first, held.first + len(held.rows)))
    assert len(set(wanted.captions)) == len(held.rows)
    images, text = held.source.read(held.rows)
    frames, _ = drawn(painter(rows.features(text, "cpu"), images), rows, wanted, settings)
    assert torch.equal(frames[0], images)


def test_nothing_is_drawn_where_no_row_is_held_out(home):
    settings, rows = opened(home / "none")
    frames, scores = drawn(guess, rows, asked(rows, 3), settings)
    assert frames.shape[1] == 0 and scores == {}


# --- a judge -------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians():
    """tr (Σ₁Σ₂)^½ from the roots of both matrices: the nuclear norm of Σ₁^½ Σ₂^½."""
    torch.manual_seed(0)
    both = [torch.randn(n, 4).double() @ torch.randn(4, 4).double() + n for n in (500, 499)]
    (a, b), roots = both, []
    for x in both:
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        roots.append(vectors * values.sqrt() @ vectors.T)
    expected = (a.mean(0) - b.mean(0)).square().sum()
    expected += sum(root.square().sum() for root in roots)  # tr Σ
    expected -= 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_few_features_have_a_distance_from_themselves_and_a_single_one_has_none():
    few = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))  # no matrix of full rank
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-3)
    for bad in (torch.ones(1, 4), torch.full((3, 4), torch.nan)):  # a crash of LAPACK once
        with pytest.raises(ValueError, match="features must be finite, and at least two each"):
            frechet_distance(bad, torch.randn(5, 4))


def test_the_clip_score_is_that_of_transformers(home):
    """Of pictures that are not square, and of captions of which one is too long."""
    folder, images = home / "clip", [picture(i, [(24, 20)]) for i in range(8)]
    captions = ["number 3", "a red ring", "number 4 and many other words", "", *"abcd"]
    judge = Judge(str(folder), "cpu")
    seen, read = judge.look(torch.stack(list(map(pil_to_tensor, images)))), judge.read(captions)
    model = transformers.CLIPModel.from_pretrained(folder)
    process = transformers.CLIPProcessor.from_pretrained(folder)
    how = {"padding": True, "truncation": True, "max_length": 12, "return_tensors": "pt"}
    with torch.no_grad():
        logits = model(**process(text=captions, images=images, **how)).logits_per_image
    cosines = logits.diag() / model.logit_scale.exp()
    assert (cosines < -0.1).any() and (cosines > 0.1).any()
    wanted = 100 * cosines.clamp(min=0).mean().item()
    found = judged(torch.stack([seen, read, seen], dim=1))
    assert found["clip_score"] == pytest.approx(wanted, abs=0.1)  # PIL rounds to bytes in between


@pytest.mark.parametrize("kind", ["many", "latents"])
def test_a_judge_compares_pictures_with_real_ones_and_captions(home, monkeypatch, kind):
    """Drawn are the real pictures, at their captions or at others', and their negatives; in several
    batches, on one rank and on three."""
    monkeypatch.setattr(evaluate, "EVAL_BATCH", 8)
    settings, rows = opened(home / kind, cfg=1.0, sample_steps=1)
    judge = Judge(str(home / "clip"), "cpu")
    wanted, (held,) = asked(rows, 3, judge, 30), rows.held
    numbers = held.shown(30)
    assert wanted.captions == held.captions(numbers) and len(wanted.captions) == 30
    assert wanted.shown == list(range(COLUMNS * ROWS))
    stored, text = held.source.read(held.row(numbers))
    states, text = rows.states(stored)[:, 0], rows.features(text, "cpu")
    real = rows.image.decode(states)
    if kind == "many":
        assert torch.equal(real, stored)
    seen, read = judge.look(real), judge.read(wanted.captions)
    near = torch.nn.functional.cosine_similarity

    def figures(states, count=1):
        how = painter(text, states), rows, wanted, settings, "cpu"
        (frames, found), *others = on_ranks(count, lambda ranks: draw_asked(*how, ranks))
        assert frames.shape[:2] == (1, 24) and all(other[1] == found for other in others)
        return found

    true, turned, other = figures(states), figures(states.roll(1, 0)), figures(-states)
    for found, cosines in (
        (true, near(seen, read)),
        (turned, near(seen.roll(1, 0), read)),
        (other, near(judge.look(rows.image.decode(-states)), read)),
    ):
        assert found["clip_score"] == pytest.approx(
            100 * cosines.clamp(min=0).mean().item(), rel=1e-3
        )
    assert abs(true["clip_frechet"]) < 1e-4 and abs(turned["clip_frechet"]) < 1e-4
    distance = frechet_distance(judge.look(rows.image.decode(-states)), seen)
    assert distance > 0.1 and other["clip_frechet"] == pytest.approx(distance, rel=1e-3)
    assert figures(-states, 3) == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("clip", "shapes", "--judge is for images of your own"),
        ("clip", "none", "needs at least 2 held-out rows, not 0: prepare again with --validation"),
        ("t5", "many", "t5 could not be loaded: its files lack"),
        ("whole", "many", "whole is a 't5' model, must be clip"),
        ("pickle", "many", "pickle could not be loaded"),
        ("nowhere", "many", "--judge .*nowhere could not be loaded"),
    ],
)
def test_what_is_no_judge_is_refused(home, tmp_path, name, data, message):
    clip = tmp_path / name
    if name in ("t5", "whole"):
        tiny_t5(clip)
        if name == "whole":  # with a decoder: nothing is missing
            config = transformers.T5Config.from_pretrained(clip)
            transformers.T5Model(config).save_pretrained(clip)
    elif name == "pickle":
        shutil.copytree(home / "clip", clip)
        torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
        (clip / "model.safetensors").unlink()
    elif name == "clip":
        clip = home / "clip"
    _, rows = opened(data if data == "shapes" else home / data)
    with pytest.raises(ValueError, match=message):
        asked(rows, 1, Judge(str(clip), "cpu"), 10)
