"""data_t2i.py: a loader whose samples depend on (seed, position) alone."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_encoders import tiny_vae

import data_t2i
from data_t2i import RankPositions, Samples, Shuffled, loader
from encoders import VAE, HashText, Pixels
from shapes import Shapes, World

ROOT = Path(__file__).resolve().parents[1]


class Numbered:
    """n pictures that hold their own number, captioned with it."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.full((3, 2, 2), i, np.uint8), f"number {i}"


def samples(n=11, seed=0, image=None, **kwargs):
    return Samples(Shuffled(Numbered(n), seed), HashText(16, 4), image, seed=seed, **kwargs)


def numbers(batch):
    return batch.images[:, 0, 0, 0].tolist()


# --- the loader ----------------------------------------------------------------------------------


def test_the_loader_draws_noise_and_grain_of_the_latents_shape(tmp_path):
    vae = VAE(tiny_vae(tmp_path))
    batch = samples(image=vae).__getitems__([4, 9])
    assert batch.images.shape == (2, 3, 2, 2) and batch.noise.shape == (2, 4, 1, 1)
    assert batch.grain.shape == batch.noise.shape and not torch.equal(batch.grain, batch.noise)
    assert samples().__getitems__([4]).grain is None


def test_encode_hands_the_flow_what_it_takes():
    batch = samples().__getitems__([3, 5, 8])
    data, text, t, noise = data_t2i.encode(batch, Pixels(), HashText(16, 4), "cpu")
    assert torch.equal(data, Pixels().encode(batch.images)) and data.dtype == torch.float32
    later = batch._replace(text=["number 3", "number 5", ""])  # an encoder outside the workers
    assert torch.equal(
        data_t2i.encode(later, Pixels(), HashText(16, 4), "cpu")[1],
        HashText(16, 4)(["number 3", "number 5", ""]),
    )
    assert torch.equal(t, batch.t) and torch.equal(noise, batch.noise) and text.shape == (3, 4, 16)


def test_a_sample_depends_on_seed_and_position_alone():
    whole = samples().__getitems__(list(range(30)))
    for positions in ([7], [29, 3, 7], list(range(10, 20))):
        part = samples().__getitems__(positions)
        for mine, all_of_it in zip(part[:4], whole[:4], strict=True):
            assert torch.equal(mine, all_of_it[positions])
    other = samples(seed=1).__getitems__(list(range(30)))
    assert not torch.equal(other.noise, whole.noise) and numbers(other) != numbers(whole)


def test_each_epoch_shows_every_image_once_and_no_noise_twice():
    batch = samples(n=11).__getitems__(list(range(33)))
    seen = numbers(batch)
    for epoch in range(3):
        assert sorted(seen[11 * epoch : 11 * epoch + 11]) == list(range(11))
    assert seen[:11] != seen[11:22]
    assert len({tuple(x.flatten().tolist()) for x in batch.noise}) == 33


@pytest.mark.parametrize("world_size, micro_batch", [(1, 8), (2, 4), (4, 2), (2, 2)])
def test_ranks_share_the_same_row_of_samples(world_size, micro_batch):
    """The same 24 positions, whatever the ranks and micro-batches, starting in the middle."""
    rounds = 24 // (world_size * micro_batch)
    taken = []
    for rank in range(world_size):
        taken += islice(RankPositions(5, micro_batch, rank, world_size), rounds)
    flat = [p for part in taken for p in part]
    assert len(flat) == 24 and sorted(flat) == list(range(5, 29))
    first = [next(iter(RankPositions(5, micro_batch, r, world_size))) for r in range(world_size)]
    assert sorted(p for part in first for p in part) == list(range(5, 5 + world_size * micro_batch))


def test_times_cover_the_distribution_evenly_in_every_batch():
    batch = samples(distribution="uniform").__getitems__(list(range(1000, 1064)))
    gaps = batch.t.sort().values.diff()
    assert gaps.max() < 3 / 64  # 64 independent draws would leave one about twice as wide
    shifted = samples(distribution="uniform", shift=3.0).__getitems__([1000])
    assert shifted.t[0] == pytest.approx((3 * batch.t[0] / (1 + 2 * batch.t[0])).item(), rel=1e-5)


def test_captions_are_dropped_at_the_rate():
    batch = samples(n=50, dropout=0.2).__getitems__(list(range(1000)))
    dropped = ~batch.text.flatten(1).any(1)
    assert abs(dropped.float().mean() - 0.2) < 0.04
    none = samples(n=50, dropout=0.0).__getitems__(list(range(200)))
    assert none.text.flatten(1).any(1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_in_the_row(workers):
    world = Samples(Shuffled(Shapes(World(24, places=24)), 0), HashText(16, 16), seed=0)
    options = {"micro_batch": 3, "rank": 1, "world_size": 2, "workers": workers}
    whole = list(islice(loader(world, seen=0, pin_memory=False, **options), 5))
    resumed = list(
        islice(loader(world, seen=18, pin_memory=False, **options), 2)
    )  # after 3 steps of 2 x 3
    for a, b in zip(whole[3:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert whole[0].images.shape == (3, 3, 24, 24) and whole[0].images.dtype == torch.uint8


def test_a_program_that_ends_by_an_error_does_not_wait_for_its_workers():
    code = """
from data_t2i import Samples, Shuffled, loader
from encoders import HashText
from shapes import Shapes, World
samples = Samples(Shuffled(Shapes(World(24, places=24)), 0), HashText(16, 16), seed=0)
held = loader(samples, seen=0, micro_batch=2, rank=0, world_size=1, workers=2, pin_memory=False)
next(held)
raise SystemExit("as a trainer with an error")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.strip() == "as a trainer with an error"
