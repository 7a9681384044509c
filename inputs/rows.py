"""ROWS: what a flow learns from, whatever it is.

    digits, shapes       drawn or held in memory            (digits.py, shapes.py)
    prepared folders     images encoded once, as Arrow chunks               (tools/prepare.py)
    pairs                noise and what a model made of it, for reflow        (tools/pairs.py)

A row is a path that is known at K + 1 points, and its caption. K = 0: only the data is known.
K = 1: noise and data. K > 1: points of the path between them. rf.line takes all three.

A run reads an endless row of samples, numbered by their position. Which row stands there, its
caption, its noise, its time and whether its caption is dropped are functions of (seed, position)
alone. So a run is the same on one rank and on a hundred, before and after a resume.

    position → step → stream and its batch → n → row number → chunk → what is stored

    source    one name of --data: facts that nothing may contradict, held-out rows, its streams
    stream    the rows of one source that have one size: all pictures of a step must have one shape
    order     n → row number: each row of the stream once an epoch, in an order that a seed decides
    Rows      all streams, interleaved by step

Start reading at Rows.at() and Rows.encode(): what stands at a position, and what becomes of it on
the device. A new kind of rows is a subclass of Source, of which DrawnShapes is the shortest.

Shapes: B batch, T text tokens, E text features, K + 1 points of a path, (C, h, w) what the network
sees of an image.
"""

import base64
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import merge
from itertools import accumulate
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import rf
from common.settings import Checked, Count, Natural, Options, Positive, from_json, option, rule
from common.start import write_whole
from inputs import digits
from inputs.encoders import Ragged, TextFormat, image_encoder, same_models, text_encoder
from inputs.shapes import MAX_WORDS, Shapes, World

SCHEMA = 5  # of prepared folders and pairs: a run refuses another one
SHAPES_HELD, DIGITS_HELD, PAIRS_HELD = 512, 1000, 512  # rows for the validation loss, at most
TIMES = 8  # the validation loss is asked at t = 0, 1/8, …, 7/8
COPY_TRIES = 3  # a copy that arrives broken is made again so often
FAILED = "failed"  # a file in the stage: what went wrong
POLL = 0.02  # seconds between looks at whether a file is there

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


# ------------------------------------------------------------------------------------------------
# Prepared folders
# ------------------------------------------------------------------------------------------------


def checksum(*parts) -> int:
    """The sum of the bytes of the parts, taken as 64-bit words, modulo 2⁶³: as fast as memory.

    A changed word changes the sum. It cannot see that two words have changed places, but disks and
    networks do not do that. A CRC-32 sees it, at a tenth of the speed.
    """
    total = 0
    for part in parts:
        values = np.frombuffer(part, np.uint8)
        whole = len(values) // 8 * 8
        total += int(values[:whole].view(np.uint64).sum(dtype=np.uint64))
        total += int.from_bytes(values[whole:].tobytes())
    return total % 2**63


def words_of(place: tuple, captions: list) -> bytes:
    return repr((*place, captions)).encode()


def row_checks(place: tuple, image: bytes, captions: list, text: list) -> list[int]:
    """The column "checks": of the image and the words, then of each caption's features.

    place: (made, chunk, height, width). So a chunk of another folder, or under another number, is
    noticed, too.
    """
    words = words_of(place, captions)
    return [checksum(image, words), *(checksum(x or b"") for x in text)]


def checks_check(column) -> int:
    """The checksum of a chunk's column "checks", as Arrow holds it."""
    return checksum(column.flatten().to_numpy())


@dataclass(frozen=True)
class StoredImage(Checked):
    kind: Annotated[str, rule(choices=("pixels", "moments", "latents"))]
    channels: Count
    factor: Count  # picture's side over that of what is stored


@dataclass(frozen=True)
class CaptionColumn(Checked):
    column: str
    weight: Positive


@dataclass(frozen=True)
class Chunk(Checked):
    file: str
    bytes: Count
    crc32: Natural
    checks: Natural  # the checksum of the column "checks": so the rows are those that were listed


@dataclass(frozen=True)
class Manifest(Checked):
    """What manifest.json of a prepared folder must hold."""

    schema: Annotated[int, rule(choices=(SCHEMA,))]
    size: Count
    text_encoder: str
    text_tokens: Count
    vae: str
    text_format: TextFormat
    models: list[str]  # of the files of text encoder and VAE (encoders.files_check)
    null_text: str  # the packed features of the empty caption, base64
    image: StoredImage
    captions: list[CaptionColumn]
    ranges: list[Range]
    chunks: list[Chunk]
    noise_seed: Natural
    made: str  # a checksum of all options: it tells the chunks of one folder from another's
    check: Natural


def manifest_check(manifest: dict) -> int:
    """The checksum of a manifest, which stands in it: of all its other keys."""
    return zlib.crc32(json.dumps(manifest | {"check": 0}, sort_keys=True).encode())


def read_header(path: str, cls: type[Checked]) -> tuple[dict, str]:
    """A folder's manifest.json or pairs.json, checked, and its checksum: the id of these rows."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    except Exception as error:  # of a dozen file systems; an unknown protocol; no package for it
        raise OSError(f"{path} cannot be read: {error}") from error
    try:
        return from_json(content, path, cls), f"{zlib.crc32(content):08x}"
    except ValueError as error:
        raise ValueError(f"{error}: make it again") from error


class PreparedFolder(Source):
    """A folder of tools.prepare, or its URL (hf://, s3://, https:// …, then with a stage).

    Encoding an image costs more than a training step of a small network, so it is done once, and
    chunks hold what the network reads. They are Arrow files, mapped into memory: the operating
    system reads only the rows that are asked for, and all workers share them. Rows are numbered as
    the manifest lists them. Pictures of one shape form a bucket; each bucket is a stream.
    """

    def __init__(self, location: str, stage: Path | None):
        self.name, self.location, self.stage = location, location.rstrip("/"), stage
        if "://" in self.location and stage is None:
            raise ValueError(f"--data {location} is far away: give --stage, a folder on this disk")
        self.manifest, self.id = read_header(f"{self.location}/manifest.json", Manifest)
        self.format = TextFormat(**self.manifest["text_format"])
        self.models = self.manifest["models"]
        self.stored, self.tables = self.manifest["image"], {}
        self.ranges = tuple(Range(**r) for r in self.manifest["ranges"])
        chunks, self.counts = self.manifest["chunks"], Counter()
        for r in self.ranges:
            self.counts[r.chunk] += r.rows
        try:
            if self.manifest["check"] != manifest_check(self.manifest):
                raise ValueError("it has changed since it was written")
            self.null_blob = base64.b64decode(self.manifest["null_text"], validate=True)
            self.null = self.format.join([self.null_blob])
            if not all(re.fullmatch(r"chunks/\d+\.arrow", c["file"]) for c in chunks):
                raise ValueError("a file outside chunks/")
            if max(self.counts, default=0) >= len(chunks):
                raise ValueError("rows of a chunk that is not listed")
            if not {"train"} <= {r.split for r in self.ranges} or not self.manifest["captions"]:
                raise ValueError("no rows to train on, or no captions")
        except ValueError as error:
            raise ValueError(
                f"{self.location}/manifest.json is damaged: {error}: delete it, prepare again"
            ) from error
        self.firsts = np.array([0, *accumulate(r.rows for r in self.ranges)])
        self.weights = np.array([c["weight"] for c in self.manifest["captions"]], float)
        self.facts = {k: self.manifest[k] for k in ("size", "text_encoder", "text_tokens", "vae")}

    def begin(self, settings: "DataOptions", device):
        groups: dict[tuple, list[tuple[int, Range]]] = {}
        for first, r in zip(self.firsts.tolist(), self.ranges, strict=False):
            groups.setdefault((r.split, r.height, r.width), []).append((first, r))
        self.streams, self.held, held, self.seed = [], [], 0, settings.seed
        for (split, *size), ranges in sorted(groups.items()):
            bucket = self.sides(*size)
            if split == "train":
                names = (f"folder {self.number}", f"stream {self.number} {size[0]}x{size[1]}")
                seeds = tuple(rf.mix_seed(settings.seed, name, 0) for name in names)
                order = WindowOrder(ranges, settings.window, seeds)
                self.streams.append(Stream(self, order, bucket))
            else:
                rows = np.concatenate([np.arange(first, first + r.rows) for first, r in ranges])
                self.held.append(Held(self, rows, held, bucket, self.manifest["noise_seed"]))
                held += len(rows)

    def every(self) -> Iterator[tuple[np.ndarray, bool]]:
        for first, r in zip(self.firsts.tolist(), self.ranges, strict=False):
            yield np.arange(first, first + r.rows), r.split == "validation"

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """What the network sees of a picture of so many pixels."""
        return height // self.stored["factor"], width // self.stored["factor"]

    def path(self, chunk: int) -> Path:
        """Where to read a chunk: as it was prepared, or where the stage puts it."""
        home = Path(self.location) if self.stage is None else self.stage / self.id
        return home / self.manifest["chunks"][chunk]["file"]

    def fetch(self, chunk: int, target: Path):
        """Copy a chunk, checked. OSError if it arrives broken again and again."""
        import fsspec

        entry = self.manifest["chunks"][chunk]
        target.parent.mkdir(parents=True, exist_ok=True)
        for tries_left in reversed(range(COPY_TRIES)):
            try:
                with fsspec.open(f"{self.location}/{entry['file']}", "rb") as file:
                    content = file.read()
            except OSError:
                if not tries_left:
                    raise
                time.sleep(1)  # a network's hiccup, perhaps
                continue
            size, crc = len(content), zlib.crc32(content)
            if (size, crc) == (entry["bytes"], entry["crc32"]):
                write_whole(target, content)
                return
        raise OSError(
            f"{self.location}/{entry['file']} arrives with {size} bytes and CRC {crc:08x}, must"
            f" have {entry['bytes']} and {entry['crc32']:08x}: prepare it again"
        )

    def table(self, chunk: int):
        """A chunk's Arrow table, mapped into memory and opened once."""
        import pyarrow as pa

        if chunk not in self.tables:
            path = self.path(chunk)
            if self.stage is not None:
                wait_for(path, self.stage / FAILED)
                self.tables = {c: t for c, t in self.tables.items() if self.path(c).exists()}
            try:
                table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()
                table.validate(full=True)  # no cell lies outside the file
                if table.num_rows != self.counts[chunk]:
                    listed = self.counts[chunk]
                    raise ValueError(f"{table.num_rows} rows, the manifest has {listed}")
                columns = {n: table.column(n).chunk(0) for n in table.column_names}
                if checks_check(columns["checks"]) != self.manifest["chunks"][chunk]["checks"]:
                    raise ValueError("its rows are not those that the manifest lists")
            except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors, too
                raise self.broken(path, error) from error
            self.tables[chunk] = columns
        return self.tables[chunk]

    def broken(self, path: Path, error) -> "Damaged":
        return Damaged(f"{path} is broken ({error}): delete it and its .json, prepare again")

    def find(self, row: int) -> tuple[dict, int, Range]:
        """The columns of the chunk that holds a row, its place there, and its range."""
        k = int(np.searchsorted(self.firsts, row, side="right")) - 1
        r = self.ranges[k]
        return self.table(r.chunk), r.first + int(row - self.firsts[k]), r

    def stored_row(self, row: int, u: float) -> tuple[Tensor, memoryview | bytes]:
        """What is stored of an image, and the packed text of one of its captions.

        The image: uint8 (3, H, W), or fp16 (2, C, h, w), the mean and the log-variance of its
        latent, or (1, C, h, w), a latent alone. The caption: one that is not empty; u in [0, 1)
        picks it by the captions' weights. Mixing long and short captions keeps a model good at
        both. ValueError if the row is not as it was written: damage must not train.
        """
        columns, i, r = self.find(row)
        captions, checks = columns["captions"][i].as_py(), columns["checks"][i].as_py()
        buffer, text = columns["image"][i].as_buffer(), self.null_blob
        place = (self.manifest["made"], r.chunk, r.height, r.width)
        words = words_of(place, captions)
        fine = checks[0] == checksum(buffer, words)
        present = [k for k, caption in enumerate(captions) if caption]
        if present:
            steps = np.cumsum(self.weights[present])
            k = present[int(np.searchsorted(steps, u * steps[-1], side="right"))]
            text = columns["text"][i].values[k].as_buffer()
            fine = fine and checks[1 + k] == checksum(text)
        if not fine:
            raise self.broken(self.path(r.chunk), f"row {columns['row'][i]} has changed")
        shape, dtype = (-1, self.stored["channels"], *self.sides(r.height, r.width)), np.float16
        if self.stored["kind"] == "pixels":
            shape, dtype = (3, r.height, r.width), np.uint8
        return torch.from_numpy(np.frombuffer(buffer, dtype).reshape(shape).copy()), text

    def read(self, rows: np.ndarray, positions=None) -> tuple[Tensor, Ragged]:
        us = [0.0] * len(rows)
        if positions is not None and len(self.weights) > 1:
            us = rf.uniform_at(self.seed, "caption", positions)
        images, texts = zip(*map(self.stored_row, rows, us), strict=True)
        return torch.stack(images), self.format.join(texts)

    def captions(self, rows: np.ndarray) -> list[str]:
        found = (self.find(row) for row in rows)
        every = (columns["captions"][i].as_py() for columns, i, _ in found)
        return [next((c for c in captions if c), "") for captions in every]


def wait_for(path: Path, failed: Path):
    """Until the copier has brought the file. OSError if it says that it cannot, or the run died."""
    parent = os.getppid()
    while not path.exists():
        if failed.exists():
            raise OSError(failed.read_text() or "staging failed")
        if os.getppid() != parent:
            raise OSError("the run has died")
        time.sleep(POLL)


# ------------------------------------------------------------------------------------------------
# Pairs
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts(Checked):
    """What a run's weights need to be used; config.json and run.json hold it."""

    size: Count  # pixels a side
    text_encoder: str
    text_tokens: Count
    text_format: TextFormat | None  # how the features of its captions were rounded
    vae: str
    channels: Count  # of the image
    words: list[str]  # the classes, if captions are words
    shapes: Natural  # the world of shapes, if there is one, with the next two
    colors: Natural
    places: Natural
    cfg: Annotated[float, rule(least=-100, most=100)]
    cfg_below: Annotated[float, rule(least=0, most=1)]
    steps: Count
    solver: Annotated[str, rule(choices=rf.SOLVERS)]
    shift: Annotated[float, rule(least=0.01, most=100)]
    preset: str
    patch_size: Count
    residual: str
    samples: Natural  # seen in training
    source: str  # --data
    seed: Natural  # which decides what glyphs are
    rows: str  # a checksum of what --data was
    models: list[str]  # of the files of text encoder and VAE (encoders.files_check)


@dataclass(frozen=True)
class PairsMade(Checked):
    """How a path was followed, and from which captions (a checksum)."""

    cfg: Annotated[float, rule(least=-100, most=100)]
    cfg_below: Annotated[float, rule(least=0, most=1)]
    steps: Count
    shift: Annotated[float, rule(least=0.01, most=100)]
    solver: Annotated[str, rule(choices=rf.SOLVERS)]
    seed: Natural
    origin: str
    prompts: int


@dataclass(frozen=True)
class PairsHeader(Checked):
    """What pairs.json must hold."""

    schema: Annotated[int, rule(choices=(SCHEMA,))]
    facts: Facts  # of the run that made them
    settings: PairsMade
    number: Count
    chunk: Count
    segments: Count
    shape: list[Count]  # (C, h, w)


def pairs_check(header: dict, chunk: int, states: Tensor, captions: list[str]) -> int:
    """The checksum of a chunk of pairs, which stands in its own header. It is also of what
    pairs.json says and of the chunk's number, so a chunk of other pairs is noticed, too."""
    made = {key: value for key, value in header.items() if key != "number"}  # which may grow
    words = json.dumps([made, chunk, captions], sort_keys=True).encode()
    return checksum(states.numpy().reshape(-1).view(np.uint8), words)


def read_pairs(path: Path, header: dict) -> tuple[Tensor, list[str]]:
    """A chunk of pairs: states fp16, mapped into memory, and captions. ValueError if broken."""
    try:
        file, chunk = safe_open(path, "pt"), int(path.stem)
        about, states = json.loads(file.metadata()["about"]), file.get_tensor("states")
        rows = min(header["chunk"], header["number"] - chunk * header["chunk"])
        check = pairs_check(header, chunk, states, about["captions"])
        if states.dtype != torch.float16:
            raise ValueError(f"it holds {states.dtype}")
        if about["check"] != check or not len(states) == len(about["captions"]) == rows:
            raise ValueError("it has changed, or is of other pairs")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path} is broken ({error}): run tools.pairs again") from error
    return states, about["captions"]


class PairsFolder(Source):
    """A folder of tools.pairs: states of paths from noise to data, made by a model, for reflow.

    The pairs were made with guidance. A flow that learns them needs none, so no caption is dropped
    and cfg is 1. The last rows are held out.
    """

    dropout = 0.0

    def __init__(self, folder: str):
        self.name, self.folder = folder, Path(folder)
        self.about, self.id = read_header(str(self.folder / "pairs.json"), PairsHeader)
        number, chunk = self.about["number"], self.about["chunk"]
        self.files = [self.folder / f"{i:05d}.safetensors" for i in range(-(-number // chunk))]
        there = {*self.folder.glob("*.safetensors")}
        if there != {*self.files}:
            more = sorted(file.name for file in there - {*self.files})
            raise ValueError(
                f"--data {folder} is not finished, or its number has changed: {len(there)} chunks"
                f" are there, must be {len(self.files)}: "
                + (f"move {more[0]} away" if more else "run its tools.pairs command again")
            )
        self.tables = {}
        self.chunk(len(self.files) - 1)  # the last one has as many as the number says
        run = self.about["facts"]
        self.K, self.channels = self.about["segments"], run["channels"]
        self.models = run["models"]
        self.words = tuple(run["words"])
        keys = ("size", "text_encoder", "text_tokens", "vae", "shapes", "colors", "places")
        self.facts = {key: run[key] for key in keys} | {"shift": self.about["settings"]["shift"]}
        # RF++ (2405.20320) trains reflow at both ends of time; guidance is in the pairs.
        self.defaults = {k: run[k] for k in ("preset", "residual", "patch_size")}
        self.defaults |= {"time": "u_shaped", "cfg": 1.0}
        if run["shapes"]:
            self.world = World.of(run)

    def begin(self, settings: "DataOptions", device):
        number = self.about["number"]
        training = number - min(PAIRS_HELD, number // 10)
        bucket = tuple(self.about["shape"][1:])
        self.whole(training, np.arange(training, number), bucket, settings.seed)

    def chunk(self, i: int) -> tuple[Tensor, list[str]]:
        """states (N, K + 1, C, h, w) fp16, mapped into memory, and captions."""
        if i not in self.tables:
            self.tables[i] = read_pairs(self.files[i], self.about)
        return self.tables[i]

    def items(self, rows: np.ndarray) -> list[tuple[Tensor, str]]:
        size, found = self.about["chunk"], []
        for chunk, place in (divmod(row, size) for row in rows.tolist()):
            states, captions = self.chunk(chunk)
            found.append((states[place], captions[place]))
        return found


# ------------------------------------------------------------------------------------------------
# Rows: all of --data
# ------------------------------------------------------------------------------------------------


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
