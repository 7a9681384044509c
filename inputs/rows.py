"""ROWS: what a flow learns from, whatever it is.

A row is a path that is known at K + 1 points, and its caption. K = 0: only the data is known.
K = 1: noise and data. K > 1: points of the path between them. rf.line takes all three.

A run reads an endless row of samples, numbered by their position. Which row stands there, its
caption, its noise, its time and whether its caption is dropped are functions of (seed, position)
alone. So a run is the same on one rank and on a hundred, before and after a resume.

    position → step → stream and its batch → n → row number → chunk → what is stored

Rows are all names of --data together, their streams interleaved by step. sources.py says what a
source, a stream and an order are, stored.py how rows lie on a disk, stage.py how they get there.
Start reading at Rows.at() and Rows.encode(): what stands at a position, and what becomes of it on
the device.

Shapes: B batch, T text tokens, E text features, K + 1 points of a path, (C, h, w) what the network
sees of an image.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import merge
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import rf
from inputs import digits
from inputs.encoders import image_encoder, same_models, text_encoder
from inputs.sources import DataOptions, Digits, DrawnShapes, Held, Source, Text
from inputs.stored import PairsFolder, PreparedFolder


class Use(NamedTuple):
    """A chunk is needed by the samples `first` … `last` − 1 of the run."""

    folder: PreparedFolder
    chunk: int
    first: int
    last: int

    @property
    def file(self) -> tuple[Path, int]:
        """Where the copy lies, and its bytes."""
        return self.folder.path(self.chunk), self.folder.manifest["chunks"][self.chunk]["bytes"]


class Batch(NamedTuple):
    """What the loader's workers make; Rows.encode turns it into what the flow takes."""

    stored: Tensor  # uint8 (B, C, H, W), or fp16: latents (B, 2 or 1, C, h, w), states (B, K+1, …)
    text: Text
    dropped: Tensor | None  # (B,) bool: whose caption is left out
    u: Tensor  # (B,) fp32 in [0, 1]: where on the path to train
    noise: Tensor  # (B, C, h, w) fp32
    vae_noise: Tensor | None  # (B, C, h, w) fp32 for a VAE


def open_source(name: str, data_dir: Path, seed: int, stage: Path | None) -> Source:
    """What a name of --data means. ValueError if nothing is known by that name."""
    if name == "shapes":
        return DrawnShapes()
    if name in digits.SOURCES:
        return Digits(name, data_dir, seed)
    if (Path(name) / "pairs.json").is_file():
        return PairsFolder(name)
    try:
        return PreparedFolder(name, stage)
    except OSError as error:
        raise ValueError(
            f"--data {name} is none of shapes, {', '.join(digits.SOURCES)}, and holds no"
            f" manifest.json ({error}): python -m tools.prepare SOURCE --out {name}"
        ) from error


def open_rows(
    names: Sequence[str],
    weights: Sequence[float] = (),
    *,
    data_dir: str | Path = "data",
    seed: int = 0,
    stage: Path | None = None,
) -> "Rows":
    """The rows of --data: their headers are read, no picture is. ValueError if they do not fit."""
    sources = [open_source(name, Path(data_dir), seed, stage) for name in names]
    first = sources[0]
    for name, other in zip(names[1:], sources[1:], strict=True):
        for what in ("K", "facts", "words", "channels", "format", "models"):
            ours, its = getattr(first, what), getattr(other, what)
            if ours != its:
                raise ValueError(
                    f"--data {name} and {names[0]} cannot be mixed: {what} {its} and {ours}"
                )
    return Rows(sources, weights)


class Rows:
    """The streams of all sources, interleaved by step.

    Every rank must know without asking which stream a step reads, and a resume at step k must not
    replay k steps. So the turns are planned: a stream takes a share of all steps, by its rows and
    its source's weight. One lap has about LAP steps; batch j of a stream that has n in a lap stands
    at (j + ½) / n of it, and the steps are the batches of all streams in that order. Every lap is
    the same plan with the next batches. So every stream keeps its share at any moment, and each row
    comes once in its stream's epoch. If there is one stream, the batch size does not matter.
    """

    LAP = 2**16  # shares are met to 1/65536

    def __init__(self, sources: list[Source], weights: Sequence[float] = ()):
        self.sources, self.weights = sources, list(weights) or [1.0] * len(sources)
        first = sources[0]
        self.facts, self.defaults, self.K = first.facts, first.defaults, first.K
        self.dropout, self.words, self.channels = first.dropout, first.words, first.channels
        self.names = [source.name for source in sources]
        self.id = " ".join(source.id for source in sources)

    def __getstate__(self) -> dict:
        """For the loader's workers: without encoders that belong on the device."""
        return self.__dict__ | {"text": None, "image": None, "null_text": None}

    def step_defaults(self, settings: dict) -> dict:
        """Pieces of a path are learned for as many Euler steps."""
        segments = settings.get("segments", 1)
        pieces = self.K and (segments > 1 or settings.get("time") == "start")
        return {"sample_steps": segments, "solver": "euler"} if pieces else {}

    def begin(self, settings: DataOptions, device="cpu") -> "Rows":
        """Encoders, orders and held-out rows, once the settings are known."""
        first, self.batch_size = self.sources[0], settings.batch_size
        pieces = settings.segments
        if self.K % pieces or pieces > max(1, self.K):
            raise ValueError(f"--segments {pieces} must divide the {self.K} of --data")
        if settings.time == "start" and not self.K:
            raise ValueError("--time start is for pairs (tools.pairs): drop it")
        if settings.anneal and (self.K == 0 or pieces > 1):
            raise ValueError(
                f"--anneal {settings.anneal:g} is for pairs (tools.pairs) with --segments 1"
            )
        self.image = image_encoder(settings.vae, device, self.channels)
        self.latent_channels, self.factor = self.image.channels, self.image.factor
        self.random = self.image.random and not self.K
        self.text, self.null, self.null_text = first.format, first.null, None
        if self.text is None:
            tokens = settings.text_tokens
            self.text = text_encoder(settings.text_encoder, tokens, device, self.words)
            self.null = self.text.prepare([""])
        self.models = first.models or [getattr(self.text, "files", ""), self.image.files]
        same_models(self.models, self.text, self.image)
        self.streams, self.held, shares = [], [], []
        for number, (source, weight) in enumerate(zip(self.sources, self.weights, strict=True)):
            source.number, source.text, source.image = number, self.text, self.image
            source.begin(settings, device)
            self.streams += source.streams
            self.held += [held for held in source.held if len(held.rows)]
            rows = [stream.order.rows for stream in source.streams]
            shares += [weight * n / sum(rows) for n in rows]
        self.plan(shares)
        self.epoch = sum(stream.order.rows for stream in self.streams)
        self.world = first.world
        return self

    def sides(self) -> dict[tuple[int, int], float]:
        """(h, w) that the network sees → share of the samples; 0 for what only held rows have."""
        found = Counter({held.bucket: 0.0 for held in self.held})
        for stream, share in zip(self.streams, self.shares, strict=True):
            found[stream.bucket] += share
        return dict(found)

    # --- which stream a step reads ---

    def plan(self, shares: list[float]):
        counts = [max(1, round(share / sum(shares) * self.LAP)) for share in shares]
        self.counts = np.array(counts if len(counts) > 1 else [1])
        self.shares = self.counts / self.counts.sum()
        stands = np.concatenate([(np.arange(n) + 0.5) / n for n in self.counts])
        order = np.argsort(stands, kind="stable")
        self.stream_of = np.repeat(range(len(self.counts)), self.counts)[order]
        self.steps_of = [np.flatnonzero(self.stream_of == s) for s in range(len(self.counts))]

    def turn(self, step: int) -> tuple[int, int]:
        """(stream, its batch) of a step."""
        s = int(self.stream_of[step % len(self.stream_of)])
        return s, self.batches_before(s, step)

    def batches_before(self, stream: int, step: int) -> int:
        lap, step = divmod(step, len(self.stream_of))
        inside = np.searchsorted(self.steps_of[stream], step)
        return lap * int(self.counts[stream]) + int(inside)

    def step_of(self, stream: int, j: int) -> int:
        """The step that reads batch j of a stream."""
        lap, j = divmod(j, int(self.counts[stream]))
        return lap * len(self.stream_of) + int(self.steps_of[stream][j])

    # --- samples ---

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Text]:
        """What stands at these positions, all of one step: as it is stored, and its text."""
        step, B = positions[0] // self.batch_size, self.batch_size
        s, j = self.turn(step)  # this step is batch j of stream s
        source, order, _ = self.streams[s]
        return source.read(order([(j - step) * B + p for p in positions]), positions)

    def draw(self, positions: Sequence[int], seed: int, held: Held | None = None) -> Batch:
        """Samples, each from (seed, position) alone. held: held-out rows, by their numbers.

        A sample draws, in this order: whether its caption is dropped, its noise, its VAE's noise.
        Each sample has a generator of its own, so it does not matter in which batch it lies.
        """
        generators = rf.generators(seed, "sample", positions)
        dropout = 0.0 if held else self.dropout
        dropped = [torch.rand((), generator=g).item() < dropout for g in generators]
        stored, text = held.source.read(held.row(positions)) if held else self.at(positions)
        shape = self.shape(stored)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        vae_noise = None
        if self.random:
            vae_noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        u = rf.spread_at(seed, positions)
        return Batch(stored, text, torch.tensor(dropped), u, noise, vae_noise)

    def shape(self, stored: Tensor) -> tuple[int, int, int]:
        """(C, h, w) of what the network sees of stored images."""
        if stored.ndim == 5:
            return tuple(stored.shape[2:])
        return self.latent_channels, *(side // self.factor for side in stored.shape[2:])

    def encode(self, batch: Batch, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """→ states (B, K + 1, C, h, w), text (B, T, E), u (B,), noise (B, C, h, w).

        All fp32 and on the device. What travels there is small: bytes or fp16, and text without
        padding. It is widened, scaled and padded where that costs nothing.
        """
        stored, dropped, u, noise, vae_noise = (
            x if x is None else x.to(device, non_blocking=True)
            for x in (batch.stored, batch.dropped, batch.u, batch.noise, batch.vae_noise)
        )
        return self.states(stored, vae_noise), self.features(batch.text, device, dropped), u, noise

    def states(self, stored: Tensor, vae_noise: Tensor | None = None) -> Tensor:
        """What is stored, on the device → (B, K + 1, C, h, w) fp32."""
        return stored.float() if self.K else self.image.encode(stored, vae_noise)[:, None]

    def features(self, text: Text, device, dropped: Tensor | None = None) -> Tensor:
        """→ (B, T, E) fp32 on the device; a dropped caption becomes the null text."""
        features = self.text.expand(text, device)
        if dropped is None:
            return features
        return torch.where(dropped[:, None, None], self.null_features(device), features)

    def null_features(self, device) -> Tensor:
        """The encoded empty caption, (1, T, E) fp32 on the device."""
        if self.null_text is None:
            self.null_text = self.text.expand(self.null, device)
        return self.null_text

    def shown_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the pictures that an evaluation draws."""
        return self.latent_channels, *(self.shown_held() or self.streams[0]).bucket

    def shown_held(self) -> Held | None:
        """The held-out rows of the most frequent size."""
        return max(self.held, key=lambda held: len(held.rows), default=None)

    # --- chunks, ahead of their use ---

    def uses(self, seen: int) -> Iterator["Use"]:
        """The chunks in the order in which a run at `seen` samples will need them, endless."""

        def of_stream(s: int, j: int) -> Iterator[Use]:
            stream = self.streams[s]
            for first, last, chunks in stream.order.uses(j * B + rest):
                begin = self.step_of(s, (first - rest) // B) * B + rest
                end = (self.step_of(s, (last - 1 - rest) // B) + 1) * B + rest
                for chunk in sorted(chunks):
                    yield Use(stream.source, chunk, begin, end)

        B = self.batch_size
        step, rest = divmod(seen, B)  # rest: not 0 if a resume has changed --batch-size
        each = (of_stream(s, self.batches_before(s, step)) for s in range(len(self.streams)))
        return merge(*each, key=lambda use: use.first)
