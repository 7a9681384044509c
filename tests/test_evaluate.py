"""common/evaluate.py: the validation loss and the pictures, in closed form and on several ranks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import nan

import numpy as np
import pytest
import torch
from helpers import SHAPES, exported, opened
from test_digits import write_mnist
from test_pairs import make
from test_prepare import pictures, run

import rf
from common.evaluate import Ranks, asked, draw_asked, validation
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
    """v = (x − target)/t: each path ends in the picture (C, H, W) uint8 of the nearest text."""

    def model(x, t, given):
        nearest = torch.cdist(given.flatten(1), text.flatten(1)).argmin(1)
        return (x - to_unit(targets[nearest])) / t[:, None, None, None]

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
