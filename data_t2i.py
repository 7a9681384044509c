"""CHAPTER 2's DATA: captioned images → the same batches on any number of ranks.

    python data_t2i.py prepare SOURCE --out data/my      encode a set of images once (prepare.py)
    python data_t2i.py show data/my                      what is in it, and a sheet of pictures

    source    (image, caption) by position: `shapes` drawn on the fly, or caches that were prepared
    loader    for one rank: batch k from (seed, samples seen, rank, world size) alone

A run is an endless row of samples, numbered by their position. Which image stands there, its noise,
its time and whether its caption is dropped are functions of (seed, position) alone. So a run means
the same on one rank and on a hundred, before and after a resume: ranks only share the row out.

Shapes: B batch, T text tokens, E text features, (C, h, w) what the network sees of an image.
"""

import argparse
import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from heapq import merge
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rf
from cache import Bucket, Cache, Ragged, Row, Shard, Use
from data_mnist import mix_seed
from encoders import Pixels, image_encoder
from pairs import Pairs

GOLDEN = (5**0.5 - 1) / 2  # steps of this size cover the unit interval evenly, however many

# ------------------------------------------------------------------------------------------------
# Sources: position → image and caption
# ------------------------------------------------------------------------------------------------


class Shuffled:
    """A map-style set of (picture, caption), in a new permutation each epoch."""

    def __init__(self, pictures, seed: int):
        self.pictures, self.seed = pictures, seed
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "epoch", epoch))
        return torch.randperm(len(self.pictures), generator=generator)

    def at(self, position: int) -> int:
        """The number of the picture that stands there."""
        epoch, place = divmod(position, len(self.pictures))
        return int(self.permutation(epoch)[place])

    def fetch(self, position: int, dropped: bool) -> tuple[Tensor, str]:
        """→ image (3, H, W) uint8, and its caption, empty if dropped."""
        picture, caption = self.pictures[self.at(position)]
        return torch.from_numpy(picture), "" if dropped else caption


class Order:
    """n → (shard, row), for the endless row of epochs of one set of shards.

    An epoch is a seeded permutation of the shards, cut into windows of `window` shards, whose rows
    are permuted together. So each row comes once an epoch, and disks and networks read whole shards
    one after another.
    """

    def __init__(self, rows: Sequence[int], window: int, seed: int):
        self.rows, self.window, self.seed, self.total = rows, window, seed, sum(rows)
        self.epoch = lru_cache(maxsize=4)(self._epoch)
        self.within = lru_cache(maxsize=4)(self._within)

    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The windows' shards, and the place in the epoch where each window starts."""
        rng = np.random.default_rng(mix_seed(self.seed, "shards", epoch))
        order = rng.permutation(len(self.rows))
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        sizes = [sum(self.rows[s] for s in shards) for shards in windows]
        return windows, np.array([0, *accumulate(sizes)])

    def _within(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of a window's rows, and where each of its shards begins in it."""
        shards = self.epoch(epoch)[0][window]
        begins = np.array([0, *accumulate(self.rows[s] for s in shards)])
        rng = np.random.default_rng(mix_seed(self.seed, f"rows {epoch}", window))
        return rng.permutation(begins[-1]), begins

    def __call__(self, n: int) -> tuple[int, int]:
        epoch, place = divmod(n, self.total)
        windows, starts = self.epoch(epoch)
        w = int(np.searchsorted(starts, place, side="right")) - 1
        order, begins = self.within(epoch, w)
        row = order[place - starts[w]]
        k = int(np.searchsorted(begins, row, side="right")) - 1
        return int(windows[w][k]), int(row - begins[k])

    def uses(self, n: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first n, last n + 1, shards) of every window, from the one that holds n on."""
        epoch, place = divmod(n, self.total)
        while True:
            windows, starts = self.epoch(epoch)
            for shards, first, last in zip(windows, starts, starts[1:], strict=False):
                if last > place:
                    yield epoch * self.total + int(first), epoch * self.total + int(last), shards
            epoch, place = epoch + 1, 0


class Prepared:
    """The training rows of one or several caches: every step's samples come from one bucket.

    A stream is one bucket of one cache; it takes the share r of all steps, by its rows and its
    cache's weight. Its batch j has the time (j + ½) / r; the steps of a run are the batches of all
    streams in the order of time. So every stream keeps its share at any moment, each row comes once
    in its stream's epoch, and which stream a step reads depends on the step alone, not on ranks.
    """

    def __init__(
        self, caches: list[Cache], batch_size: int, *, seed: int, weights: Sequence[float] = (),
        window: int = 4,
    ):  # fmt: skip
        self.batch_size, self.seed = batch_size, seed
        self.streams: list[tuple[Cache, list[Shard]]] = []
        self.orders, shares = [], []
        weights = weights or [1.0] * len(caches)
        for k, (cache, weight) in enumerate(zip(caches, weights, strict=True)):
            buckets = cache.of("train")
            total = sum(s.rows for shards in buckets.values() for s in shards)
            for bucket, shards in sorted(buckets.items()):
                rows = [s.rows for s in shards]
                name = f"stream {k} {bucket[0]}x{bucket[1]}"
                self.streams.append((cache, shards))
                self.orders.append(Order(rows, window, mix_seed(seed, name, 0)))
                shares.append(weight * sum(rows) / total)
        self.shares = [share / sum(shares) for share in shares]
        self.epoch = sum(order.total for order in self.orders)
        self.at = lru_cache(maxsize=4096)(self._at)

    def before(self, time: float, stream: int) -> list[int]:
        """How many batches of each stream come before the one of `stream` at this time."""
        counts = []
        for s, share in enumerate(self.shares):
            j = max(0, ceil(time * share - 0.5))
            while j > 0 and ((j - 0.5) / share, s) >= (time, stream):
                j -= 1
            while ((j + 0.5) / share, s) < (time, stream):
                j += 1
            counts.append(j)
        return counts

    def _at(self, step: int) -> tuple[int, int]:
        """(stream, its batch) of a step. Step k's time is within ± streams of k."""
        reach = len(self.shares) + 2
        low, high = (self.before(time, -1) for time in (step - reach, step + reach))
        near = sorted(
            ((j + 0.5) / share, s, j)
            for s, share in enumerate(self.shares)
            for j in range(low[s], high[s])
        )
        _, stream, j = near[step - sum(low)]
        return stream, j

    def step_of(self, stream: int, j: int) -> int:
        """The step that reads batch j of a stream."""
        return sum(self.before((j + 0.5) / self.shares[stream], stream))

    def bucket(self, step: int) -> Bucket:
        stream, _ = self.at(step)
        return self.streams[stream][1][0].bucket

    def locate(self, position: int) -> tuple[Cache, Shard, int]:
        step, i = divmod(position, self.batch_size)
        stream, j = self.at(step)
        cache, shards = self.streams[stream]
        shard, row = self.orders[stream](j * self.batch_size + i)
        return cache, shards[shard], row

    def fetch(self, position: int, dropped: bool) -> tuple[Tensor, Tensor]:
        """→ image and the features (L, E) of one of its captions, as they are stored."""
        cache, shard, number = self.locate(position)
        row = cache.row(shard, number)
        return row.image, cache.null_text if dropped else self.pick(row, cache, position)

    def pick(self, row: Row, cache: Cache, position: int) -> Tensor:
        """One of the captions that are there, by the columns' weights."""
        there = [i for i, caption in enumerate(row.captions) if caption]
        if not there:
            return cache.null_text
        if len(there) == 1:
            return row.features[there[0]]
        u = np.random.default_rng(mix_seed(self.seed, "caption", position)).random()
        steps = np.cumsum(cache.weights[there])
        return row.features[there[int(np.searchsorted(steps, u * steps[-1], side="right"))]]

    def uses(self, seen: int) -> Iterator[Use]:
        """The shards in the order in which a run at `seen` will need them, endless: for a stage."""

        def of_stream(stream: int, j: int) -> Iterator[Use]:
            cache, shards = self.streams[stream]
            B = self.batch_size
            for first, last, numbers in self.orders[stream].uses(j * B):
                begin = self.step_of(stream, first // B) * B
                end = (self.step_of(stream, (last - 1) // B) + 1) * B
                for number in sorted(numbers):
                    yield Use(cache, shards[number], begin, end)

        stream, j = self.at(seen // self.batch_size)
        counts = self.before((j + 0.5) / self.shares[stream], stream)
        rows = [of_stream(s, count) for s, count in enumerate(counts)]
        return merge(*rows, key=lambda use: use.first)

    def stage_bytes(self) -> int:
        """What a stage must hold at least: of every stream the windows that one step may touch,
        and the next one."""
        total = 0
        for (_, shards), order in zip(self.streams, self.orders, strict=True):
            smallest = sum(sorted(order.rows)[: order.window])
            windows = 2 + ceil(self.batch_size / smallest)
            total += sum(sorted((s.bytes for s in shards), reverse=True)[: windows * order.window])
        return total


class HeldOut:
    """The validation rows of caches: position → row, with its first caption, always the same."""

    def __init__(self, caches: list[Cache]):
        self.rows: list[tuple[Cache, Shard, int]] = [
            (cache, shard, row)
            for cache in caches
            for _, shards in sorted(cache.of("validation").items())
            for shard in shards
            for row in range(shard.rows)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, position: int) -> Row:
        cache, shard, row = self.rows[position]
        return cache.row(shard, row)

    def fetch(self, position: int, dropped: bool) -> tuple[Tensor, Tensor]:
        cache = self.rows[position][0]
        return self.row(position).image, cache.null_text if dropped else self.caption(position)[1]

    def caption(self, position: int) -> tuple[str, Tensor]:
        """The first caption there is, and its features."""
        row = self.row(position)
        pairs = zip(row.captions, row.features, strict=True)
        return next((pair for pair in pairs if pair[0]), ("", self.rows[position][0].null_text))

    def t_index(self, positions: list[int]) -> Tensor:
        """0 … 7 for t = 0, 1/8, …, 7/8: fixed when the row was prepared."""
        found = [
            cache.table(shard).column("t_index")[row].as_py()
            for cache, shard, row in (self.rows[p] for p in positions)
        ]
        return torch.tensor(found)

    def batches(self, size: int) -> list[list[int]]:
        """All positions, in parts of one bucket and at most `size`."""
        groups: dict[Bucket, list[int]] = {}
        for position, (_, shard, _) in enumerate(self.rows):
            groups.setdefault(shard.bucket, []).append(position)
        return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


class KnownText:
    """Stands for the text encoder of caches: recalls the features that were stored."""

    in_workers = True

    def __init__(self, cache: Cache):
        self.name, self.format = cache.manifest["text_encoder"], cache.text
        self.tokens, self.dim = cache.text.tokens, cache.text.dim
        self.known = {"": cache.null_text}

    def __call__(self, captions: list[str]) -> Tensor:
        return self.format.expand(self.format.join([self.known[c] for c in captions]))


# ------------------------------------------------------------------------------------------------
# The loader
# ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the workers make; encode() turns it into what the flow takes."""

    images: Tensor  # (B, 3, H, W) uint8, what a cache stores, (B, 2 or 1, C, h, w) fp16, or data
    text: Tensor | Ragged | list[str]  # (B, T, E) fp32; what a cache stores; captions to encode
    t: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, h, w) fp32
    grain: Tensor | None  # (B, C, h, w) fp32, see VAE; None for pixels


def encode(batch: Batch, image, text, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ data (B, C, h, w), text (B, T, E), t (B,), noise (B, C, h, w), on the device, fp32."""
    features = text(batch.text) if isinstance(batch.text, list) else batch.text
    if isinstance(features, Ragged):
        values, place, captions = features
        values, place = (x.to(device, non_blocking=True) for x in (values, place))
        features = text.format.expand(Ragged(values, place, captions))
    images, features, t, noise, grain = (
        x if x is None else x.to(device, non_blocking=True)
        for x in (batch.images, features, batch.t, batch.noise, batch.grain)
    )
    data = images if images.dtype == torch.float32 else image.encode(images, grain)
    return data, features, t, noise


class Samples(Dataset):
    """The row of samples: positions → a Batch, each sample from (seed, position) alone."""

    def __init__(
        self, source, text, image=None, *, seed: int, dropout: float = 0.1,
        distribution: str = "logit_normal", shift: float = 1.0,
    ):  # fmt: skip
        self.source, self.seed, self.dropout = source, seed, dropout
        image = image or Pixels()
        self.text = text if text.in_workers else list  # captions travel as they are
        if isinstance(text, KnownText):
            self.text = text.format.join
        self.channels, self.factor, self.random = image.channels, image.factor, image.random
        self.distribution, self.shift = distribution, shift

    def __getitems__(self, positions: list[int]) -> Batch:
        images, captions, noise, grain, generator = [], [], [], [], torch.Generator()
        for position in positions:
            generator.manual_seed(mix_seed(self.seed, "sample", position))
            dropped = torch.rand((), generator=generator).item() < self.dropout
            image, caption = self.source.fetch(position, dropped)
            images.append(image)
            captions.append(caption)
            encoded = image.ndim == 4  # (mean and log-variance, C, h, w)
            sides = image.shape[-2:] if encoded else [n // self.factor for n in image.shape[1:]]
            shape = (self.channels, *sides)
            noise.append(torch.randn(shape, generator=generator))
            if self.random:
                grain.append(torch.randn(shape, generator=generator))
        t = rf.time_at(golden(self.seed, positions), self.distribution, self.shift)
        grain = torch.stack(grain) if self.random else None
        return Batch(torch.stack(images), self.text(captions), t, torch.stack(noise), grain)


def golden(seed: int, positions: list[int]) -> Tensor:
    """u (B,) fp32 in [0, 1) for the time. Neighbouring positions lie a golden step apart: every
    batch covers all of time evenly, whichever rank it lies on (a stratified draw without a batch).
    """
    u = np.random.default_rng((seed, 1)).random() + np.array(positions, float) * GOLDEN
    return torch.tensor(u % 1, dtype=torch.float32).clamp(max=1 - 2**-24)


class PairSamples(Dataset):
    """The row of samples where they are pairs: positions → a Batch of straight pieces (reflow).

    held: the pairs kept from training, each at one of eight times: t = (position % 8) / 8.
    """

    def __init__(
        self, pairs: Pairs, text, *, seed: int, segments: int = 1, distribution: str = "u_shaped",
        held: bool = False,
    ):  # fmt: skip
        self.pairs, self.seed, self.held = pairs, seed, held
        self.text = text if text.in_workers else list
        self.segments, self.distribution = segments, distribution
        self.shift = pairs.about["shift"]
        self.order = Shuffled(range(len(pairs) - pairs.held), seed)

    def __getitems__(self, positions: list[int]) -> Batch:
        first_held = len(self.pairs) - self.pairs.held
        rows = [first_held + p if self.held else self.order.at(p) for p in positions]
        states, captions = zip(*(self.pairs.row(row) for row in rows), strict=True)
        states = self.pairs.coarser(torch.stack(states), self.segments)
        if self.held:
            t = torch.tensor(positions) % 8 / 8
        else:
            u = golden(self.seed, positions)
            t = rf.segment_time(u, self.segments, self.distribution, self.shift)
        data, noise = rf.segment_line(states, t, self.shift)
        return Batch(data, self.text(list(captions)), t, noise, None)


class RankPositions:
    """The positions of one rank's micro-batches, from `seen` on: an endless iterator of lists.

    A step takes world_size · accumulation · micro_batch positions in a row; ranks share them out.
    """

    def __init__(self, seen: int, micro_batch: int, rank: int, world_size: int):
        self.seen, self.micro_batch = seen, micro_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.seen + self.rank * self.micro_batch
        while True:
            yield list(range(first, first + self.micro_batch))
            first += self.world_size * self.micro_batch


def loader(
    samples: Samples, *, seen: int, micro_batch: int, rank: int, world_size: int, workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:  # fmt: skip
    """Endless micro-batches of one rank, made ahead by worker processes."""
    if workers:
        atexit.register(_end_workers)
    return iter(
        DataLoader(
            samples,
            batch_sampler=RankPositions(seen, micro_batch, rank, world_size),
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_trainer,
            persistent_workers=workers > 0,
        )
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _end_workers():
    """They ignore SIGTERM: a program that ends by an error would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an accident
    for worker in multiprocessing.active_children():
        worker.kill()


def _leave_signals_to_the_trainer(worker: int):
    """Launchers signal the whole process tree: the trainer still needs batches to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------
# python data_t2i.py show
# ------------------------------------------------------------------------------------------------


def show(args: argparse.Namespace):
    """Counts, buckets, caption lengths, and a sheet of decoded rows with their captions."""
    from sample_t2i import captioned_grid
    from train_mnist import choose_device

    cache = Cache(args.data)
    manifest, counts = cache.manifest, cache.manifest["rows"]
    print(f"{args.data}: {manifest['source']} at about {manifest['size']}² pixels")
    print(f"  text {manifest['text_encoder']}, {cache.text.bits} bits; images {manifest['vae']}")
    print("  rows " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))
    for bucket in manifest["buckets"]:
        print(f"  {bucket['height']:5} x {bucket['width']:<5} {bucket['rows']:>12,} rows")
    shards = [shard for shard in cache.shards if shard.split == "train"]
    rng = np.random.default_rng(args.seed)
    lengths, pictures, captions = [], [], []
    image = image_encoder(manifest["vae"], choose_device(args.device))
    share = np.array([shard.rows for shard in shards], float) / sum(s.rows for s in shards)
    for i in range(max(args.rows, args.lengths)):
        shard = shards[rng.choice(len(shards), p=share)]
        row = cache.row(shard, int(rng.integers(shard.rows)))
        lengths += [len(x) for x in row.features if x is not None]
        if i < args.rows:
            x = image.encode(row.image[None].to(getattr(image, "device", "cpu")))
            pictures.append(image.decode(x)[0].cpu())
            captions.append(" | ".join(caption for caption in row.captions if caption))
    if lengths:
        spread = ", ".join(f"{q:.0%} {np.quantile(lengths, q):.0f}" for q in (0.05, 0.5, 0.95, 1))
        print(f"  caption lengths in tokens of {cache.text.tokens}: {spread}")
    out = args.out or Path(args.data) / "show.png"
    captioned_grid(pictures, captions, out)
    print(f"  wrote {out}")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_prepare_options(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("source", metavar="SOURCE",
        help="a folder, .jsonl, .csv, .parquet or .tar file, or a hub data set")  # fmt: skip
    add("--out", type=Path, required=True, help="folder of the cache")
    add("--size", type=int, default=256, help="buckets have about size² pixels (default: 256)")
    add("--max-aspect", type=float, default=2.0, help="long side over short (1: square; default 2)")
    add("--max-upscale", type=float, default=1.0, help="images needing more are left out")
    add("--patch", type=int, help="sides are multiples of it x the VAE's factor (pixels 4, VAE 2)")
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--caption", action="append", metavar="COLUMN[:WEIGHT]", default=[],
        help="a caption column; of several one is drawn, by weight (default: text …)")  # fmt: skip
    add("--label", metavar="COLUMN", help="a column of class labels, for captions")
    add("--label-template", default="a photo of {a}",
        help="{}: the name, {a}: with a or an (default: 'a photo of {a}')")  # fmt: skip
    add("--recaption", metavar="MODEL", help="also write captions with an image-to-text model")
    add("--recaption-weight", type=float, default=1.0, help="of these captions (default: 1)")
    group = parser.add_argument_group("encoders")
    add = group.add_argument
    add("--text-encoder", default="hash", help="hash, or name or folder of a T5 / UMT5")
    add("--text-tokens", type=int, help="captions are cut there (default: hash 32, else 256)")
    add("--text-bits", type=int, default=16, help="16: fp16; 8: bytes (default: 16)")
    add("--text-reach", type=float, default=0.25, help="8 bits cover ± this (default: 0.25)")
    add("--vae", default="pixels", help="pixels, or name or folder of an AutoencoderKL")
    add("--latent", metavar="COLUMN", help="rows are encoded already, by the --vae; taken as")
    add("--latent-shape", default="4x32x32", help="channels x rows x columns")
    add("--latent-dtype", default="uint8", help="of raw bytes (default: uint8)")
    add("--latent-scale", type=float, default=1.0, help="latent = raw · scale + offset, so that")
    add("--latent-offset", type=float, default=0.0, help="it is the VAE's mean, unscaled")
    group = parser.add_argument_group("what stays")
    add = group.add_argument
    add("--dedup", metavar="MODEL", help="drop near-duplicates by `pixels` or an image model")
    add("--dedup-threshold", type=float, default=0.95, help="cosine from which on (default: 0.95)")
    add("--validation", type=int, default=512, help="rows kept from training; at most a tenth")
    add("--bad-limit", type=float, default=0.01, help="share of rows that may be bad (0.01)")
    group = parser.add_argument_group("work")
    add = group.add_argument
    add("--part", default="0/1", help="i/n: this process does the i-th of n shares (from 0)")
    add("--split", default="train", help="of a hub data set (default: train)")
    add("--streaming", action="store_true",
        help="read without a copy on disk; shuffled within 10,000 rows only")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order (default: 0)")
    add("--batch", type=int, default=32, help="images encoded at a time (default: 32)")
    add("--shard-mb", type=float, default=64, help="a shard's images, about (default: 64)")
    add("--workers", type=int, default=os.cpu_count(), help="threads that decode images")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_prepare_options(commands.add_parser("prepare", help="encode a set of images once"))
    look = commands.add_parser("show", help="what is in a cache, and a sheet of its pictures")
    look.add_argument("data", metavar="DATA", help="the folder of a cache")
    look.add_argument("--out", type=Path, help="the sheet (default: DATA/show.png)")
    look.add_argument("--rows", type=int, default=24, help="pictures on it (default: 24)")
    look.add_argument("--lengths", type=int, default=1000, help="captions measured (default: 1000)")
    look.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    look.add_argument("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    return parser


def launch(args: argparse.Namespace):
    from prepare import prepare
    from train_mnist import choose_device

    if args.command == "show":
        show(args)
        return
    manifest = prepare(args, choose_device(args.device))
    if manifest is None:
        print(f"part {args.part} is done; the last part to end writes {args.out}/manifest.json")
        return
    rows = ", ".join(f"{number:,} {name}" for name, number in manifest["rows"].items())
    print(f"{args.out} is ready: {rows}")


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        launch(args)
    except (ValueError, OSError) as error:
        sys.exit(f"data_t2i.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data_t2i.py: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
