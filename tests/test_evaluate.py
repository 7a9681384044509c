"""common/evaluate.py: the validation loss and the pictures, in closed form and on several ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import isnan, nan

import numpy as np
import pytest
import torch
from helpers import SHAPES, call, exported, opened
from test_prepare import pictures, run

import rf
from common.evaluate import Ranks, asked, draw_asked, validation
from common.pipeline import fixed_noise
from inputs import digits
from inputs.encoders import to_bytes, to_unit
from inputs.shapes import TAGS, World, draw_scene, render
from tools import pairs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    source = pictures(home / "source", 60)
    run(source, home / "prepared")
    run(source, home / "few", "--validation", 1)
    run(source, home / "none", "--validation", 0)
    how = ["--number", 120, "--segments", 4, "--steps", 4, "--solver", "euler"]
    call(pairs.main, exported(home / "run", SHAPES), "--out", home / "pairs", *how)
    return home


def on_ranks(count, work):
    """What each of so many ranks gets, every one a thread."""
    values, barrier = [None] * count, threading.Barrier(count, timeout=60)

    class Rank(Ranks):
        def gather(self, value):
            values[self.rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Rank(rank, count)), range(count)))


def all_alike(work, counts=(1, 2, 3)):
    """What every rank gets, whatever their number."""
    found = [result for count in counts for result in on_ranks(count, work)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], equal_nan=True)
    return found[0]


# --- the validation loss -------------------------------------------------------------------------


def guess(x, t, text):
    """A velocity that hears of all that it is given."""
    return x * t.view(-1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind, segments", [("prepared", 1), ("pairs", 1), ("pairs", 2)])
def test_each_held_row_is_asked_at_its_time(home, kind, segments):
    """v at x_t on the row's straight line, or on its piece of it, against the slope there."""
    settings, rows = opened(home / kind, segments=segments)
    times, losses = rf.timesteps(segments, settings.shift), [[] for _ in range(8)]
    for held in rows.held:
        for number in held.batches(1):
            batch = rows.draw(number, held.seed, held)
            states, text, _, noise = rows.encode(batch, "cpu")
            if kind == "prepared":
                states = torch.stack([noise, states[:, 0]], 1)
            points = states[0, :: (states.shape[1] - 1) // segments]
            t = held.t_index(number) / 8
            i = max(i for i in range(segments) if t <= times[i])
            slope = (points[i] - points[i + 1]) / (times[i] - times[i + 1])
            x = points[i + 1] + (t - times[i + 1]) * slope
            error = guess(x[None], t, text) - slope
            losses[held.t_index(number)].append(error.square().mean().item())
    found = all_alike(lambda ranks: validation(guess, rows, settings, "cpu", ranks))
    wanted = [sum(known) / len(known) if known else nan for known in losses]
    assert found == pytest.approx(wanted, rel=1e-4, nan_ok=True)
    assert sum(map(isnan, wanted)) == {"prepared": 2, "pairs": 0}[kind]


# --- pictures ------------------------------------------------------------------------------------


def painter(text, targets):
    """v = (x − target)/t: each path ends in the picture (C, H, W) uint8 of the nearest text."""

    def model(x, t, given):
        nearest = torch.cdist(given.flatten(1), text.flatten(1)).argmin(1)
        return (x - to_unit(targets[nearest])) / t[:, None, None, None]

    return model


def drawn(model, rows, wanted, settings, **how):
    return all_alike(
        lambda ranks: draw_asked(model, rows, wanted, settings, "cpu", ranks, **how), (1, 3)
    )


def test_true_pictures_score_one_and_others_do_not(home):
    """Of shapes; on the sheet is a row for each of the first four captions of a tag."""
    settings, rows = opened("shapes")
    settings, wanted = replace(settings, cfg=1.0, sample_steps=2), asked(rows, 6)
    world, rng = World(20, 4, 6, 10), np.random.default_rng(0)
    assert [m.tag for m, _ in wanted.meanings[::6]] == list(TAGS) and len(wanted.captions) == 36
    scenes = [draw_scene(meaning, rng, world) for meaning, _ in wanted.meanings]
    true = torch.stack([torch.from_numpy(render(scene, 20, rng)) for scene in scenes])
    true = true[[wanted.captions.index(caption) for caption in wanted.captions]]  # some come twice
    text = rows.features(rows.text.prepare(wanted.captions), "cpu")
    shown = [tag * 6 + i for i in range(4) for tag in range(6)]
    frames, scores = drawn(painter(text, true), rows, wanted, settings, trajectory=True)
    assert torch.equal(frames[-1], true[shown]) and frames.shape == (3, 24, 3, 20, 20)
    noise = fixed_noise(settings.seed, range(36), (3, 20, 20))
    assert torch.equal(frames[0], to_bytes(noise[shown]))
    assert list(scores) == [*TAGS, "mean"] and scores["mean"] > 0.98
    _, scores = drawn(painter(text, true.roll(6, 0)), rows, wanted, settings)
    assert 0.25 > scores["mean"] == pytest.approx(sum(scores[tag] for tag in TAGS) / 6)


def test_words_are_drawn_ten_times_each(monkeypatch):
    images, words = torch.zeros(6, 1, 28, 28, dtype=torch.uint8), [str(i) for i in range(12)]
    one = digits.ImageSet(images, torch.arange(6), words, "mnist")
    monkeypatch.setattr(digits, "load_images", lambda *rest, **seed: (one, one))
    settings, rows = opened("mnist")
    settings, wanted = replace(settings, cfg=1.0, sample_steps=1), asked(rows, 3)
    assert wanted.captions == 10 * words[:10] and wanted.shown == list(range(100))
    greys = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 28, 28)
    frames, scores = drawn(painter(torch.eye(13)[:12, None], greys), rows, wanted, settings)
    assert torch.equal(frames[0], greys[:10].repeat(10, 1, 1, 1)) and scores == {}


def test_other_rows_are_asked_for_their_held_out_captions(home):
    """Those of the most frequent size, with the text that is stored."""
    settings, rows = opened(home / "prepared")
    settings, wanted = replace(settings, cfg=1.0, sample_steps=1), asked(rows, 3)
    held = max(rows.held, key=lambda held: len(held.rows))
    numbers = range(held.first, held.first + len(held.rows))
    assert wanted.captions == held.captions(numbers) and len(set(wanted.captions)) > 1
    images, text = held.source.read(held.rows)
    frames, _ = drawn(painter(rows.features(text, "cpu"), images), rows, wanted, settings)
    assert torch.equal(frames[0], images)


@pytest.mark.parametrize("kind, n", [("few", 1), ("none", 0)])
def test_fewer_held_rows_than_ranks(home, kind, n):
    settings, rows = opened(home / kind, cfg=1.0, sample_steps=1)
    wanted = asked(rows, 3)
    frames, scores = drawn(guess, rows, wanted, settings)
    assert frames.shape[1] == len(wanted.captions) == n and scores == {}
    found = all_alike(lambda ranks: validation(guess, rows, settings, "cpu", ranks))
    assert sum(not isnan(loss) for loss in found) == n
