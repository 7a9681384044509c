"""STORED ROWS: prepared folders and pairs, their files and checksums.

    manifest.json, chunks/00017.arrow      tools/prepare.py: images and captions, encoded once
    pairs.json, 00017.safetensors          tools/pairs.py: paths that a model has followed

Whatever a run reads from a disk is checked: each row carries checksums, each list of rows its own,
and a changed byte ends the run with the file's name. It is never trained on.

Shapes: K + 1 points of a path, (C, h, w) what the network sees of an image.
"""

import base64
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import rf
from common.settings import Checked, Count, Natural, Positive, from_json, rule
from common.start import write_whole
from inputs.encoders import Ragged, TextFormat
from inputs.shapes import World
from inputs.sources import (
    PAIRS_HELD,
    Damaged,
    DataOptions,
    Held,
    Range,
    Source,
    Stream,
    WindowOrder,
)

SCHEMA = 5  # of prepared folders and pairs: a run refuses another one
COPY_TRIES = 3  # a copy that arrives broken is made again so often
FAILED = "failed"  # a file in the stage: what went wrong
POLL = 0.02  # seconds between looks at whether a file is there

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
