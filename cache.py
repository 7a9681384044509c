"""THE CACHE: captioned images, encoded once, as Arrow shards on disk; and how a run reads them.

    data/my/manifest.json    what is in it: encoders, buckets, shards with row counts and checksums
    data/my/shards/*.arrow   rows of one bucket each, already shuffled, opened memory-mapped
    data/my/parts/           what each process of `prepare` has finished

    a shard's columns
        row        the row's number in the source
        image      uint8 pixels (3, H, W); or fp16 latents: mean and log-variance (2, C, h, w), or
                   the mean alone (1, C, h, w)
        captions   one for each caption column, some missing
        text       its features, one blob each, at their true length
        t_index    of validation rows: 0 … 7, the time t = 0, 1/8, …, 7/8 at which it is asked

A bucket is a height and width in pixels. Text features are fp16, or 8 bits as LavenderFlow keeps
them: byte = round((x / 2r + ½) · 255), r = 0.25, values beyond ±r clipped. The format is Arrow's
stream format: `datasets.Dataset.from_file(shard)` opens it too.
"""

import base64
import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SCHEMA = 1  # of the folder: a run refuses another one
COPY_TRIES = 3  # a staging copy that arrives broken is made again so often
CHUNK = 1 << 24  # bytes copied at a time

Bucket = tuple[int, int]  # height and width in pixels

# ------------------------------------------------------------------------------------------------
# Text features ↔ bytes
# ------------------------------------------------------------------------------------------------


class Ragged(NamedTuple):
    """The features of B captions without their padding: what travels to the device."""

    values: Tensor  # (ΣL, E) as stored, fp16 or uint8
    place: Tensor  # (ΣL,) int64: caption · T + token
    captions: int  # B


class TextFormat(NamedTuple):
    """How text features (length, E) lie in a shard. bits: 16 (fp16) or 8; reach: r of 8 bits."""

    tokens: int
    dim: int
    bits: int = 16
    reach: float = 0.25

    def pack(self, features: Tensor) -> bytes:
        """(T, E) fp32, zero rows at the end → bytes without them."""
        there = features.any(dim=1).nonzero()
        x = features[: there[-1].item() + 1 if len(there) else 0].float().cpu().numpy()
        if self.bits == 16:
            return x.astype(np.float16).tobytes()
        scaled = (x.clip(-self.reach, self.reach) / (2 * self.reach) + 0.5) * 255
        return scaled.round().astype(np.uint8).tobytes()

    def read(self, blob) -> Tensor:
        """bytes → (L, E), as stored."""
        stored = np.frombuffer(blob, np.float16 if self.bits == 16 else np.uint8)
        return torch.from_numpy(stored.reshape(-1, self.dim).copy())

    def join(self, features: list[Tensor]) -> Ragged:
        """B times (L, E) as stored → one Ragged."""
        first = range(0, len(features) * self.tokens, self.tokens)
        place = [torch.arange(k, k + len(x)) for k, x in zip(first, features, strict=True)]
        return Ragged(torch.cat(features), torch.cat(place), len(features))

    def expand(self, ragged: Ragged) -> Tensor:
        """→ (B, T, E) fp32 on the device of the Ragged, zero beyond each caption's end."""
        values = ragged.values.float()
        if self.bits == 8:
            values = (values / 255 - 0.5) * (2 * self.reach)
        flat = values.new_zeros(ragged.captions * self.tokens, self.dim)
        flat.index_copy_(0, ragged.place, values)
        return flat.view(ragged.captions, self.tokens, self.dim)


# ------------------------------------------------------------------------------------------------
# Shards
# ------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """One file, as the manifest lists it."""

    file: str  # below the cache's folder
    split: str  # "train" or "validation"
    height: int
    width: int
    rows: int
    bytes: int
    crc32: int

    @property
    def bucket(self) -> Bucket:
        return self.height, self.width


def write_shard(folder: Path, file: str, split: str, bucket: Bucket, rows: list[dict]) -> Shard:
    """Write rows to folder/file, whole or not at all."""
    import pyarrow as pa

    fields = [
        ("row", pa.int64()), ("image", pa.binary(len(rows[0]["image"]))),
        ("captions", pa.list_(pa.string())), ("text", pa.list_(pa.large_binary())),
    ]  # fmt: skip
    if split == "validation":
        fields.append(("t_index", pa.int8()))
    if "embedding" in rows[0]:
        fields.append(("embedding", pa.binary(len(rows[0]["embedding"]))))
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=len(rows))
    content = memoryview(sink.getvalue())
    write_whole(folder / file, content)
    return Shard(file, split, *bucket, len(rows), len(content), zlib.crc32(content))


def write_whole(path: Path, content: bytes | memoryview):
    """The file appears complete or not at all, also when the disk is full or the process dies."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def open_shard(path: Path):
    """The shard's Arrow table; its bytes stay on disk until they are looked at."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().combine_chunks()


def cell(table, column: str, row: int) -> memoryview:
    return memoryview(table.column(column).chunk(0)[row].as_buffer())


# ------------------------------------------------------------------------------------------------
# The cache as a run sees it
# ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One image and its captions; features[i] belongs to captions[i], None where one is missing."""

    image: Tensor
    captions: list[str | None]
    features: list[Tensor | None]  # (L, E) each, as stored


class Cache:
    """A prepared folder, or the URL of one (hf://, s3://, https:// …, then only with a stage).

    ValueError if there is none, or if it is of another schema.
    """

    def __init__(self, location: str | Path, stage: Path | None = None):
        import fsspec

        self.location, self.stage = str(location).rstrip("/"), stage
        try:
            with fsspec.open(f"{self.location}/manifest.json", "rb") as file:
                content = file.read()
        except (OSError, ValueError, ImportError) as error:  # an unknown protocol, or its package
            raise ValueError(
                f"--data {location} has no manifest.json ({error}): python data_t2i.py prepare"
                f" SOURCE --out {location}"
            ) from error
        self.manifest, self.id = json.loads(content), f"{zlib.crc32(content):08x}"
        schema = self.manifest.get("schema")
        if schema != SCHEMA:
            raise ValueError(
                f"--data {location} has schema {schema}, this program reads {SCHEMA}: prepare it"
                " again"
            )
        if "://" in self.location and stage is None:
            raise ValueError(f"--data {location} is far away: give --stage, a folder on this disk")
        self.text = TextFormat(**self.manifest["text_format"])
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self.weights = np.array([c["weight"] for c in self.manifest["captions"]], float)
        self.null_text = self.text.read(base64.b64decode(self.manifest["null_text"]))  # (L, E)
        self.tables: dict[Shard, object] = {}  # open, memory-mapped

    def of(self, split: str) -> dict[Bucket, list[Shard]]:
        """The shards of a split, by bucket, in the manifest's order."""
        found: dict[Bucket, list[Shard]] = {}
        for shard in self.shards:
            if shard.split == split:
                found.setdefault(shard.bucket, []).append(shard)
        return found

    def latent(self, bucket: Bucket) -> tuple[int, int, int]:
        """(C, h, w) of what the network sees of an image of this bucket."""
        image = self.manifest["image"]
        return image["channels"], bucket[0] // image["factor"], bucket[1] // image["factor"]

    def path(self, shard: Shard) -> Path:
        """Where to read it: as it was prepared, or where the stage puts it."""
        home = Path(self.location) if self.stage is None else self.stage / self.id
        return home / shard.file

    def table(self, shard: Shard):
        """The shard's table, opened once. What the stage dropped is let go, so that it frees."""
        if shard not in self.tables:
            if self.stage is not None:
                wait_for(self.path(shard), self.stage / Stage.FAILED)
                for other in [s for s in self.tables if not self.path(s).exists()]:
                    del self.tables[other]
            self.tables[shard] = open_shard(self.path(shard))
        return self.tables[shard]

    def row(self, shard: Shard, row: int) -> Row:
        table = self.table(shard)
        kind, latent = self.manifest["image"]["kind"], self.latent(shard.bucket)
        shape = (3, *shard.bucket) if kind == "pixels" else (-1, *latent)
        dtype = np.uint8 if kind == "pixels" else np.float16
        image = np.frombuffer(cell(table, "image", row), dtype).reshape(shape)
        captions = table.column("captions").chunk(0)[row].as_py()
        blobs = table.column("text").chunk(0)[row].values
        features = [
            self.text.read(blobs[i].as_buffer()) if blobs[i].is_valid else None
            for i in range(len(captions))
        ]
        return Row(torch.from_numpy(image.copy()), captions, features)


def wait_for(path: Path, failed: Path):
    """Until the stage has brought the file. OSError if it says that it cannot, or the run died."""
    parent = os.getppid()
    while not path.exists():
        if failed.exists():
            raise OSError(failed.read_text() or "the stage failed")
        if os.getppid() != parent:
            raise OSError("the run has died")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------
# The stage: shards on fast local storage, ahead of their use
# ------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A shard is needed by the samples `first` … `last` − 1 of the run."""

    cache: Cache
    shard: Shard
    first: int
    last: int


class Stage(threading.Thread):
    """Copies shards into `folder` in the order of their use, never more than `limit` bytes at once,
    and drops them when the run has passed them. One on each node; ranks only wait for files.

    A copy is checked by length and CRC-32 and made again if it differs. What an earlier run left in
    the folder is thrown away: it may have been cut off. So the folder must be the stage's own, and
    one run's: claim() sees to that.
    """

    FAILED, OWN = "failed", "t2i-stage"  # OWN: the folder's name below --stage

    def __init__(self, folder: Path, limit: int, source):
        """source.uses(seen) → the shards in the order of their use, as Use, without an end;
        source.epoch: samples, and as far as that the stage looks ahead.
        """
        super().__init__(daemon=True)
        self.folder, self.limit, self.source = folder, limit, source
        self.staged: dict[Path, tuple[int, int]] = {}  # file → bytes, end of its use
        self.seen, self.moved, self.closed = 0, threading.Condition(), False

    @staticmethod
    def claim(folder: Path):
        """Empty the folder, for this process alone as long as it holds what is returned."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")  # held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--stage {folder.parent} is in use: give each run its own") from error
        for file in (*folder.rglob("*.arrow"), *folder.rglob(".*.copy"), folder / Stage.FAILED):
            file.unlink(missing_ok=True)
        return lock

    def begin(self, seen: int):
        self.seen = seen
        self.start()

    def advance(self, seen: int):
        """The run has finished the samples before `seen`."""
        with self.moved:
            self.seen = seen
            self.moved.notify()

    def close(self):
        """Stop, and let no reader wait any longer."""
        with self.moved:
            self.closed = True
            self.moved.notify()
        if self.is_alive():
            self.join()
        self._tell("the run has ended")

    def _tell(self, reason: str):
        with suppress(OSError):  # a full disk, say: an empty file is heard too
            (self.folder / self.FAILED).touch()
            write_whole(self.folder / self.FAILED, reason.encode())

    def run(self):
        try:
            for use in self.source.uses(self.seen):
                target = use.cache.path(use.shard)
                if not self._make_room(target, use):
                    return
                if target not in self.staged:
                    fetch(use.cache, use.shard, target)
                _, last = self.staged.get(target, (0, 0))
                self.staged[target] = (use.shard.bytes, max(last, use.last))
        except Exception as error:  # of a dozen file systems: the ranks that wait must hear of it
            self._tell(f"staging failed: {error}")

    def _make_room(self, target: Path, use: Use) -> bool:
        """Wait until it is time and there is room, dropping what is passed. False when closed."""
        with self.moved:
            while not self.closed:
                for file, (_, last) in list(self.staged.items()):
                    if last <= self.seen and file != target:
                        file.unlink()
                        del self.staged[file]
                used = sum(size for size, _ in self.staged.values())
                fits = target in self.staged or used + use.shard.bytes <= self.limit
                if fits and use.first <= self.seen + self.source.epoch:
                    return True
                self.moved.wait()
        return False


def fetch(cache: Cache, shard: Shard, target: Path):
    """Copy a shard, checked. OSError if it arrives broken again and again."""
    import fsspec

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.copy")
    try:
        for tries_left in reversed(range(COPY_TRIES)):
            size = crc = 0
            try:
                source = fsspec.open(f"{cache.location}/{shard.file}", "rb")
                with source as reader, open(temporary, "wb") as writer:
                    for chunk in iter(lambda reader=reader: reader.read(CHUNK), b""):
                        writer.write(chunk)
                        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            except OSError:
                if not tries_left:
                    raise
                time.sleep(1)  # a network's hiccup, perhaps
                continue
            if (size, crc) == (shard.bytes, shard.crc32):
                os.replace(temporary, target)
                return
        raise OSError(
            f"{cache.location}/{shard.file} arrives with {size} bytes and CRC {crc:08x}, must have"
            f" {shard.bytes} and {shard.crc32:08x}: prepare it again"
        )
    finally:
        temporary.unlink(missing_ok=True)


def load_caches(locations: Iterable[str | Path], stage: Path | None = None) -> list[Cache]:
    """The caches of one run. ValueError if their encoders, size or kind of images differ."""
    caches = [Cache(location, stage) for location in locations]
    for other in caches[1:]:
        for key in ("text_encoder", "text_tokens", "text_format", "vae", "image", "size"):
            mine, its = caches[0].manifest[key], other.manifest[key]
            if mine != its:
                raise ValueError(
                    f"--data {other.location} has {key} {its}, but {caches[0].location} has {mine}:"
                    " prepare both alike"
                )
    return caches
