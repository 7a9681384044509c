"""SOURCES: what one name of --data gives, a row by its number.

    digits, shapes       held in memory, or drawn                  (this file)
    prepared folders     images encoded once, as Arrow chunks      (stored.py, tools/prepare.py)
    pairs                paths that a model has followed           (stored.py, tools/pairs.py)

    source    facts that nothing may contradict, held-out rows, its streams
    stream    the rows of one source that have one size: all pictures of a step must have one shape
    order     n → row number: each row of the stream once an epoch, in an order that a seed decides

A new kind of rows is a subclass of Source, of which DrawnShapes is the shortest. rows.py makes one
endless row of samples of them.

Shapes: K + 1 points of a path, (C, h, w) what the network sees of an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

import rf
from common.settings import Checked, Count, Natural, Options, option, rule
from inputs import digits
from inputs.encoders import Ragged, TextFormat
from inputs.shapes import MAX_WORDS, Shapes, World

SHAPES_HELD, DIGITS_HELD, PAIRS_HELD = 512, 1000, 512  # rows for the validation loss, at most
TIMES = 8  # the validation loss is asked at t = 0, 1/8, …, 7/8

Text = Tensor | Ragged | list[str]  # what an encoder's `prepare` gives, and its `expand` takes


@dataclass(frozen=True)
class DataOptions(Options):
    """What the rows need to be told: the first options of both chapters."""

    data: list[str] = option(
        ["shapes"],
        "shapes, mnist, glyphs, cifar10, or folders of tools.prepare and tools.pairs",
        group="data",
    )
    # fixed: it decides what stands at a position, or what the network is.
    data_weights: list[float] = option(
        [], "shares of several --data", above=0, most=1e6, fixed=True
    )
    data_dir: Path = option(Path("data"), "where mnist and cifar10 lie, or are downloaded to")
    window: int = option(4, "chunks whose rows are shuffled together", least=1, fixed=True)
    size: int = option(20, "pixels a side", least=1, fixed=True)
    shapes: int = option(4, "how many of the six shapes", least=0, fixed=True)
    colors: int = option(6, "how many of the ten colours", least=0, fixed=True)
    places: int = option(10, "points a side at which things may stand", least=0, fixed=True)
    text_encoder: str = option("hash", "hash, or name or folder of a T5 / UMT5", fixed=True)
    text_tokens: int = option(MAX_WORDS, "tokens of a caption", least=1, fixed=True)
    vae: str = option("pixels", "pixels, or name or folder of an AutoencoderKL", fixed=True)
    seed: int = option(0, "of weights, order, noise and time", least=0, fixed=True)

    def __post_init__(self):
        super().__post_init__()
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"--data-weights has {len(self.data_weights)} numbers, must have one for each of"
                f" the {len(self.data)} --data"
            )


# ------------------------------------------------------------------------------------------------
# Orders: n → row number, each row once an epoch
# ------------------------------------------------------------------------------------------------


KEPT = 64  # permutations that are remembered, of all streams together


@dataclass(frozen=True)
class Range(Checked):
    """Rows of one split and one size that lie one after another in a chunk."""

    chunk: Natural
    split: Annotated[str, rule(choices=("train", "validation"))]
    height: Count  # of the picture, in pixels
    width: Count
    first: Natural
    rows: Count


class WindowOrder:
    """The training rows of one size of a prepared folder, chunk after chunk.

    A permutation of all rows would read another chunk for each row, and all chunks would have to
    lie on the local disk. So an epoch is a seeded permutation of the chunks, cut into windows of
    `window` ranges, and rows are permuted inside a window only. The permutation of chunks is the
    same for all sizes, so their streams need the same chunks at about the same time.
    ranges: row number of a range's first row, and the range.
    """

    def __init__(self, ranges: list[tuple[int, Range]], window: int, seeds: tuple[int, int]):
        self.ranges, self.window, self.seeds = ranges, window, seeds
        self.rows = sum(r.rows for _, r in ranges)

    @lru_cache(KEPT)  # noqa: B019  an order lives as long as its run
    def epoch(self, epoch: int) -> tuple[list, np.ndarray]:
        """The windows, lists of ranges, and the place in the epoch at which each begins."""
        chunks = np.array([r.chunk for _, r in self.ranges])
        rng = np.random.default_rng(rf.mix_seed(self.seeds[0], "chunks", epoch))
        turn = np.argsort(rng.permutation(chunks.max() + 1))
        order = [self.ranges[i] for i in np.argsort(turn[chunks], kind="stable")]
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        sizes = [sum(r.rows for _, r in window) for window in windows]
        return windows, np.array([0, *accumulate(sizes)])

    @lru_cache(KEPT)  # noqa: B019
    def within(self, epoch: int, window: int) -> np.ndarray:
        """The row numbers of a window, permuted."""
        ranges = self.epoch(epoch)[0][window]
        rows = np.concatenate([np.arange(first, first + r.rows) for first, r in ranges])
        rng = np.random.default_rng(rf.mix_seed(self.seeds[1], f"rows {epoch}", window))
        return rows[rng.permutation(len(rows))]

    def __call__(self, numbers: Sequence[int]) -> np.ndarray:
        rows = []
        for epoch, place in (divmod(int(n), self.rows) for n in numbers):
            starts = self.epoch(epoch)[1]
            w = int(np.searchsorted(starts, place, side="right")) - 1
            rows.append(self.within(epoch, w)[place - starts[w]])
        return np.array(rows)

    def uses(self, n: int) -> Iterator[tuple[int, int, set[int]]]:
        """(first n, last n + 1, chunks) of every window, from the one that holds n on, endless.

        The copier reads ahead in it: the whole future of a run is known.
        """
        epoch, place = divmod(n, self.rows)
        while True:
            windows, starts = self.epoch(epoch)
            for window, first, last in zip(windows, starts[:-1], starts[1:], strict=True):
                if last > place:
                    begin = epoch * self.rows
                    yield begin + int(first), begin + int(last), {r.chunk for _, r in window}
            epoch, place = epoch + 1, 0


class Order(WindowOrder):
    """All rows of a source in a new permutation each epoch: each must be cheap to read.

    It is the order above with one range, and so one window, that holds them all.
    """

    def __init__(self, rows: int, seed: int):
        super().__init__([(0, Range(0, "train", 1, 1, 0, rows))], 1, (0, seed))

    @lru_cache(8)  # noqa: B019
    def within(self, epoch: int, window: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(rf.mix_seed(self.seeds[1], "epoch", epoch))
        return torch.randperm(self.rows, generator=generator).numpy()


# ------------------------------------------------------------------------------------------------
# Sources: rows by their number
# ------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """The training rows of one source that have one size."""

    source: "Source"
    order: Order | WindowOrder
    bucket: tuple[int, int]  # (h, w) that the network sees


class Held(NamedTuple):
    """Held-out rows of one size: finite, in order, always with their first caption.

    They are numbered across all sizes of a source, so each has a noise of its own.
    """

    source: "Source"
    rows: np.ndarray  # row numbers
    first: int  # the number, among the source's held-out rows, of the first of these
    bucket: tuple[int, int]
    seed: int  # of the noise: that of the data, so that all runs are asked the same

    def batches(self, size: int) -> list[range]:
        """Their numbers among the source's held-out rows, in parts of at most `size`."""
        last = self.first + len(self.rows)
        return [range(i, min(i + size, last)) for i in range(self.first, last, size)]

    def row(self, numbers: Sequence[int]) -> np.ndarray:
        return self.rows[np.asarray(numbers) - self.first]

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return self.source.captions(self.row(numbers))

    def t_index(self, numbers: Sequence[int]) -> Tensor:
        """Which of the eight times each row is asked at: always the same."""
        return torch.tensor(numbers) % TIMES

    def shown(self, most: int) -> list[int]:
        """Numbers of rows to draw pictures of: different captions first."""
        numbers, first = list(range(self.first, self.first + min(len(self.rows), 4 * most))), {}
        for number, caption in zip(numbers, self.captions(numbers), strict=True):
            first.setdefault(caption, number)
        return [*first.values(), *(n for n in numbers if n not in first.values())][:most]


class Damaged(OSError, ValueError):
    """A file that is not as it was written. Perhaps one rank alone reads it: so each says it."""


class Source:
    """One name of --data. begin() sets streams and held, lists of the above.

    A source is opened before the settings are known, because it knows some of them (facts): the
    size of its pictures, the encoders that made its features. begin() follows when they are
    settled.
    """

    name = id = ""  # id tells one set of rows from another
    facts: ClassVar[dict] = {}  # settings that are settled
    defaults: ClassVar[dict] = {}  # settings that it would choose
    K = 0  # points of the path besides the data
    dropout = 0.1  # share of captions that are dropped: the unconditional velocity, for guidance
    channels, words, world = 3, (), None
    models: list | None = None  # what the encoders were that made its features and latents
    format: TextFormat | None = None  # where text features are stored, and
    null: Ragged | None = None  # those of the empty caption
    ranges: tuple[Range, ...] = ()
    number, text, image = 0, None, None  # place in --data; encoders: set by Rows

    def begin(self, settings: "DataOptions", device):
        raise NotImplementedError

    def items(self, rows: np.ndarray) -> list[tuple[Tensor, str]]:
        """What is stored of each row, and its caption."""
        raise NotImplementedError

    def read(self, rows: np.ndarray, positions=None) -> tuple[Tensor, Text]:
        """What is stored of these rows: pixels, latents or states, and their text.

        positions: of the samples in the run. Where a row has several captions they choose one, so
        that a row shows another caption in another epoch. None: the first caption.
        """
        stored, captions = zip(*self.items(rows), strict=True)
        return torch.stack(stored), self.prepare(list(captions))

    def captions(self, rows: np.ndarray) -> list[str]:
        return [caption for _, caption in self.items(rows)]

    def every(self) -> Iterator[tuple[np.ndarray, bool]]:
        """All rows, in parts of one size, and whether they are held out. Before begin(), too.

        ValueError if there is no end of them.
        """
        raise ValueError(f"--data {self.name} is no collection of pictures")

    def whole(self, rows: int, held: np.ndarray, bucket: tuple[int, int], seed: int):
        """streams and held of a source with one size."""
        self.streams = [Stream(self, Order(rows, seed), bucket)]
        self.held = [Held(self, held, 0, bucket, seed)]

    def prepare(self, captions: list[str]) -> Text:
        """Captions → what travels to the device. In a worker a heavy text encoder is absent: then
        the captions themselves travel, and the trainer encodes them."""
        return captions if self.text is None else self.text.prepare(captions)

    def __getstate__(self) -> dict:
        """For the loader's workers: without heavy encoders, and without open files."""
        light = self.text if getattr(self.text, "in_workers", False) else None
        return self.__dict__ | {"text": light, "image": None, "tables": {}}


class Digits(Source):
    """A data set of digits.py, as bytes on the device.

    60,000 digits are 47 MB, so a step needs no loader and no copy: it indexes. An epoch of CIFAR
    has each picture twice, the second one mirrored. A mirrored digit would be another sign.
    """

    def __init__(self, name: str, data_dir: Path, seed: int):
        training, held = digits.load_images(name, data_dir, seed=seed)
        self.channels = training.images.shape[1]
        self.name, self.words = training.source, tuple(training.classes)
        self.id = digits.fingerprint(training) + digits.fingerprint(held)
        parts = [(training.images, training.labels)]
        if self.name == "cifar10":
            parts.append((training.images.flip(3), training.labels))
        self.training = sum(len(labels) for _, labels in parts)
        parts.append((held.images[:DIGITS_HELD], held.labels[:DIGITS_HELD]))
        self.images, self.labels = map(torch.cat, zip(*parts, strict=True))
        size = self.images.shape[2]
        self.facts = {"size": size, "text_encoder": "words", "text_tokens": 1, "vae": "pixels"}

    def begin(self, settings: "DataOptions", device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        (_, held) = (rows for rows, _ in self.every())
        self.whole(self.training, held, tuple(self.images.shape[2:]), settings.seed)

    def every(self) -> Iterator[tuple[np.ndarray, bool]]:
        yield np.arange(self.training), False
        yield np.arange(self.training, len(self.images)), True

    def read(self, rows: np.ndarray, positions=None) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
        return self.images[index], self.labels[index]

    def captions(self, rows: np.ndarray) -> list[str]:
        return [self.words[label] for label in self.read(rows)[1].tolist()]


class DrawnShapes(Source):
    """The world of shapes.py, drawn when asked for. Row i ≥ 0 is of training, −1 − i held out.

    Nothing is stored: a picture is a function of (seed, row).
    """

    name = "shapes"

    def begin(self, settings: "DataOptions", device):
        self.world = World(settings.size, settings.shapes, settings.colors, settings.places)
        self.shapes = [Shapes(self.world, settings.seed, held=held) for held in (False, True)]
        if settings.size % self.image.factor:
            raise ValueError(
                f"--size {settings.size} must be a multiple of {self.image.factor}, the VAE's"
                " factor"
            )
        count, side = len(self.shapes[0]), settings.size // self.image.factor
        held = -1 - Order(count, settings.seed)(range(SHAPES_HELD))
        self.whole(count, held, (side, side), settings.seed)

    def items(self, rows: np.ndarray) -> list[tuple[Tensor, str]]:
        drawn = [self.shapes[r < 0][r if r >= 0 else -1 - r] for r in rows.tolist()]
        return [(torch.from_numpy(picture), caption) for picture, caption in drawn]
