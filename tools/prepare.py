"""PREPARE: captioned images → encoded rows on disk, once, by any number of processes.

    python -m tools.prepare SOURCE --out data/my

    read      a row's image and captions; bad rows are listed and left out
    fit       crop and scale to the bucket whose shape is nearest (equal area, multiples of a unit)
    encode    the VAE's mean and log-variance, text features
    write     a chunk: --chunk-rows places of the shuffled source, sorted by bucket
    finish    once all chunks are there: manifest.json, which inputs/stored.py reads

    data/my/prepare.json         the options: another attempt, or another part, must have the same
    data/my/chunks/00000.arrow   the rows of a chunk, in Arrow's stream format
    data/my/chunks/00000.json    where its buckets begin, and which rows were left out, and why
    data/my/manifest.json        the encoders and all chunks; written last

Chunk i is a function of (source, options, i), and its files appear whole or not at all. So any
process can make any chunk, and after a kill only the missing ones are made: with --part 0/8 … 7/8
eight processes share the work, on one machine or on several that see the same disk.

Why at all: a VAE and a T5 cost more time per image than a training step of a small network, and
they give the same result in every epoch. Encoded once, a run reads rows at the speed of its disk.

What is random in training must not be settled here. A caption dropped here would stay dropped in
every epoch, so the trainer drops captions. The VAE's mean and log-variance are stored, not a sample
of them, for the same reason. A process holds about four times the bytes of a chunk in memory.

Start reading at main(), then make_chunks().
"""

import base64
import glob
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from math import inf, log, prod
from pathlib import Path
from typing import Annotated, NamedTuple

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import rf
from common.settings import (
    Checked,
    Natural,
    Options,
    Parted,
    flag,
    option,
    parse,
    read_json,
    rule,
)
from common.start import (
    begin,
    choose_device,
    claim,
    line_of,
    mark,
    program,
    sweep,
    write_new,
    write_whole,
)
from inputs.encoders import TextFormat, image_encoder, text_encoder
from inputs.sources import Range
from inputs.stored import SCHEMA, Chunk, PreparedFolder, checks_check, manifest_check, row_checks

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")  # if none has the type
CAPTION_COLUMNS = ("text", "caption", "txt", "prompt")  # looked for if none is named
EVERY = 10  # at most every tenth row is for validation
FEW_ROWS = 200  # the limit on bad rows is a share of at least so many
SIDE = 512  # pixels: dedup and recaption see images no larger than this
AHEAD = 16  # batches that threads read while one after another is encoded


@dataclass(frozen=True)
class Reading(Options):
    """Of dedup and recaption too."""

    source: str = option(None, "a folder, file or hub data set", positional=True)
    out: Path = option(None, "what to write")
    split: str = option("train", "of a hub data set")
    streaming: bool = option(False, "read without a copy on disk, in the source's order")
    batch: int = option(32, "images encoded at a time", least=1)
    workers: int = option(os.cpu_count(), "threads that decode images", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")


# ------------------------------------------------------------------------------------------------
# Sources: numbered rows, with the same numbers in every run, so that --with can name them.
# `datasets` reads all but .txt captions. No code of a source is run, and no pickle is opened.
# ------------------------------------------------------------------------------------------------

UNREAD = {".heic", ".heif", ".avif", ".jxl"}  # images that Pillow does not read
LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".csv": "csv"}
INSIDE = ("metadata.jsonl", "metadata.csv", "*.parquet", "*.tar")  # a folder: the first found


class Source(NamedTuple):
    """Where rows come from, whatever it is; `table` gives them by number.

    A row is a dict of columns. A stream (IterableDataset) has no length; it is read in order.
    """

    table: object  # list[dict], Dataset or IterableDataset
    columns: list[str]
    image: str  # the column of images: paths, bytes, or {"bytes", "path"}
    folder: Path  # where paths start
    id: int  # rows have the same numbers while it is the same; 0: unknown, of the hub
    named: bool  # whether `image` holds names of files

    def file(self, row: dict) -> bytes:
        """A row's image, as it is stored."""
        cell = row[self.image]
        if isinstance(cell, dict):
            cell = cell["bytes"] or cell["path"]
        if not cell:
            raise ValueError("no image")
        return cell if isinstance(cell, bytes) else (self.folder / cell).read_bytes()

    def picture(self, row: dict) -> Image.Image:
        """A row's image, upright (phones store them sideways), in RGB."""
        with Image.open(io.BytesIO(self.file(row))) as image:
            if image.mode[0] in "IF":  # Pillow would cut 16 bits or floats off at 255
                raise ValueError(f"image of mode {image.mode}, must have 8 bits")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # on white; convert alone would show what is hidden
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def open_source(args: Reading) -> Source:
    """What SOURCE means. ValueError in one line if it holds no images.

    A folder of images, of parquet or of webdataset's .tar files; metadata.jsonl, .csv (file_name
    and captions) or another such file; a name of the hub.
    """
    name, columns, id = args.source, IMAGE_COLUMNS, 0
    path, options = Path(name), {"path": name, "split": args.split}
    found = (f for p in INSIDE for f in inside(path, p) if "*" in p or f.parent == path)
    files = [path] if path.is_file() else [*found]
    if files:
        kind = files[0].suffix
        others = [file for file in files if file.suffix != kind]
        if kind in (".parquet", ".tar"):
            others += [file for file in inside(path) if file.suffix.lower() in IMAGES]
        if others:
            raise ValueError(
                f"SOURCE {name} holds {others[0].name} and {files[0].name}: move one away"
            )
        known = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, end_of(f)) for f in files]
        id = zlib.crc32(repr(known).encode())
        for file in files if kind == ".tar" else ():
            check_tar(file)
        options = {
            "path": LOADERS.get(kind, name),
            "data_files": [glob.escape(str(f)) for f in files],
        }
        options["split"] = "train"
        # Or `datasets` takes a copy that it made of another file with this name and time.
        options["name"] = f"{id:08x}"
        if kind in (".csv", ".jsonl"):
            columns = ("file_name", *columns)
        if kind == ".csv":
            options["na_filter"] = False  # the caption "None" is a caption
    elif path.is_dir():
        return read_folder(path)
    try:
        if options.get("path") == "csv":  # all cells are words: the label 007 is not 7
            header = pandas.read_csv(files[0], nrows=0).columns
            options["features"] = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
        table = datasets.load_dataset(**options, streaming=args.streaming)
        table = table if table.features else table._resolve_features()
    except Exception as error:  # of `datasets`, pyarrow, the hub or the file system
        reason = line_of(error.__cause__ or error).replace("StopIteration", "it is empty")
        raise ValueError(f"SOURCE {name} could not be loaded: {reason}") from error
    typed = [c for c, kind in table.features.items() if isinstance(kind, datasets.Image)]
    typed = ["image"] if "image" in typed else typed
    if len(typed) > 1:
        raise ValueError(f"SOURCE {name} has images in {', '.join(typed)}: call one of them image")
    for column in typed:  # bytes: we decode, and leave out the bad
        table = table.cast_column(column, datasets.Image(decode=False))
    image = next((c for c in (*typed, *columns) if c in table.features), "image")
    named = "file_name" in columns
    return Source(table, list(table.features), image, Path(*files[:1]).parent, id, named)


def end_of(file: Path) -> int:
    """The checksum of its last 64 KiB (a parquet file's table of contents)."""
    with open(file, "rb") as opened:
        opened.seek(-min(2**16, file.stat().st_size), os.SEEK_END)
        return zlib.crc32(opened.read())


def check_tar(file: Path):
    """ValueError unless it ends after its last member, with two empty blocks and nothing else.

    tarfile, and so `datasets`, stops without a word at a header that is broken or empty.
    """
    end = 0
    with suppress(tarfile.TarError), tarfile.open(file, "r:") as tar:
        for _ in tar:
            end = tar.offset  # of the next header
    if os.path.getsize(file) < end + 1024 or np.memmap(file, mode="r")[end:].any():
        raise ValueError(f"SOURCE {file} is cut off or damaged at byte {end}: make it again")


def inside(folder: Path, pattern: str = "*") -> list[Path]:
    """Its files of such a name, sorted, without what is hidden; linked folders are looked into.

    OSError if a folder in it cannot be read: its files would be missing without a word.
    """

    def refuse(error: OSError):
        raise OSError(f"SOURCE {error.filename} cannot be read: {error.strerror}") from error

    found = []
    walk = os.walk(folder, followlinks=True, onerror=refuse) if folder.is_dir() else ()
    for here, folders, files in walk:
        above = {os.path.realpath(path) for path in (here, *Path(here).parents)}
        linked = {f: os.path.realpath(os.path.join(here, f)) for f in folders if f[0] != "."}
        folders[:] = [f for f, target in linked.items() if target not in above]
        found += [Path(here, f) for f in files if f[0] != "." and Path(here, f).is_file()]
    return sorted(file for file in found if file.match(pattern))


def read_folder(folder: Path) -> Source:
    """Images of any format; "text" is the .txt file beside each, "label" the folder it lies in."""
    files = inside(folder)
    rows = [
        {"file_name": file, "text": file.with_suffix(".txt"), "label": file.parent.name}
        for file in files
        if file.suffix.lower() in IMAGES
    ]
    unread = [file.name for file in files if file.suffix.lower() in UNREAD]
    if unread:
        print(
            f"SOURCE {folder}: {len(unread)} files such as {unread[0]} are left out: convert them"
        )
    if not rows:
        raise ValueError(
            f"SOURCE {folder} holds no images: put images and .txt captions of the same names there"
        )
    names = [str(row["file_name"].relative_to(folder)) for row in rows]
    return Source(rows, list(rows[0]), "file_name", Path(), zlib.crc32(repr(names).encode()), True)


def blocks(table, size: int, seed: int):
    """Chunk by chunk: (rows by their number, numbers in the order of their places).

    A table is shuffled as a whole: neighbours in a source are alike, and a step should not be. A
    stream stays in its order, and the trainer shuffles chunks, and the rows of several together.
    """
    if hasattr(table, "__len__"):
        order = np.random.default_rng(rf.mix_seed(seed, "prepare", 0)).permutation(len(table))
        for first in range(0, len(table), size):
            yield table, order[first : first + size].tolist()
    else:
        rows = enumerate(table)
        while block := dict(islice(rows, size)):
            yield block, list(block)


def pictures(source: Source, args):
    """For dedup and recaption: lists of (row number, CRC-32 of its file, image), a batch each,
    without the bad ones."""

    def read(item):
        with suppress(Exception):
            image = source.picture(item[1])
            image.thumbnail((SIDE, SIDE))
            return item[0], zlib.crc32(source.file(item[1])), image

    rows = enumerate(tqdm(source.table, unit="row"))
    with ThreadPoolExecutor(args.workers) as pool:
        while items := list(islice(rows, AHEAD * args.batch)):
            images = filter(None, pool.map(read, items))
            while batch := list(islice(images, args.batch)):
                yield batch


def write_table(path: Path, columns: dict[str, list], source: int = 0):
    """A file for --with: "row", the number in SOURCE, and columns to join by it. source: its id."""
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(columns, metadata={"source_files": str(source)}), sink)
    write_whole(path, sink.getvalue())


# ------------------------------------------------------------------------------------------------
# Geometry: images → buckets
# ------------------------------------------------------------------------------------------------


def make_buckets(size: int, unit: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) of about size² pixels, multiples of `unit`, long ≤ max_aspect · short.

    Training on squares alone cuts heads off portraits, and the model learns to draw them so. A few
    shapes of equal area keep most of each picture and cost the network the same (NovelAI's aspect
    ratio bucketing). unit is patch x VAE factor, so each side is a whole number of patches. The
    buckets come in both orientations, sorted.
    """
    found = set()
    for short in range(unit, size + 1, unit):
        long = max(round(size * size / short / unit) * unit, short)
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


class TooSmall(ValueError):
    """An image that would have to be enlarged: left out, but not a bad row."""

    kind = "small"


class Dropped(ValueError):
    """A row that a file of --with drops, say as a duplicate."""

    kind = "dropped"


def fit(image: Image.Image, buckets: list[tuple[int, int]], max_upscale: float) -> Tensor:
    """The RGB image cropped and scaled to its bucket, (3, H, W) uint8.

    The bucket is the one whose aspect ratio is nearest, on a logarithmic scale, since twice as wide
    and twice as high are equally far from square. TooSmall if it would be enlarged too much.
    """
    aspect = image.height / image.width
    height, width = min(buckets, key=lambda b: abs(log(b[0] / b[1] / aspect)))
    scale = max(height / image.height, width / image.width)
    if scale > max_upscale:
        raise TooSmall(f"{image.width}x{image.height} would be enlarged {scale:.2f} times")
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return pil_to_tensor(fitted).contiguous()


# ------------------------------------------------------------------------------------------------
# What a row holds
# ------------------------------------------------------------------------------------------------


def nested(row: dict, column: str):
    """row["json"]["caption"] for the column "json.caption"; None where there is none."""
    value = row.get(column)
    if value is None:
        value = reduce(lambda inner, key: (inner or {}).get(key), column.split("."), row)
    return value


def caption(row: dict, column: str, args, label) -> str | None:
    """What a caption column says; None if it is missing or empty. label: the type of --label.

    A label becomes a sentence (--label-template): text encoders have read sentences, not class
    names.
    """
    value = nested(row, column)
    if isinstance(value, Path):
        value = value.read_text(encoding="utf-8-sig") if value.is_file() else None
    if column == args.label and value is not None:
        if type(value) not in (str, int, bool):
            raise ValueError(f"label {value!r:.80} must be a name or a number")
        name = label.int2str(value) if isinstance(label, datasets.ClassLabel) else str(value)
        name = name.replace("_", " ").strip()
        if not name:
            return None
        article = "an" if name[0] in "aeiouAEIOU" else "a"
        words = {"{}": name, "{a}": f"{article} {name}"}
        return re.sub("{a?}", lambda found: words[found[0]], args.label_template)
    if not isinstance(value, str | None):
        raise ValueError(f"caption column {column} holds {value!r}, must be text")
    return (value or "").strip() or None


def latent(raw, args) -> Tensor:
    """A ready-made latent = raw · scale + offset, as the VAE's mean is; (1, C, h, w) fp32."""
    raw = np.frombuffer(raw, args.latent_dtype) if isinstance(raw, bytes) else np.array(raw)
    if raw.ndim > 1 and raw.shape != tuple(args.shape):  # lists in lists know their shape
        raise ValueError(f"the latent is {raw.shape}, --latent-shape says {args.latent_shape}")
    values = torch.from_numpy(raw.astype(np.float32)).view(1, *args.shape)
    values = values * args.latent_scale + args.latent_offset
    if not values.half().isfinite().all():
        raise ValueError("the latent is not finite in fp16")
    return values


# ------------------------------------------------------------------------------------------------
# Chunks and the manifest
# ------------------------------------------------------------------------------------------------

COLUMNS = pa.schema(
    {
        "row": pa.int64(),
        "image": pa.large_binary(),
        "captions": pa.list_(pa.string()),
        "text": pa.list_(pa.large_binary()),
        "checks": pa.list_(pa.int64()),
    }
)


def make_chunks(args, source: Source, joins, captions, buckets, vae, text, form, made):
    """This part's chunks that are missing, or whose bad rows were repaired. → all .json files.

    Threads read and decode (`read`), the device encodes whole batches of one size (`encode`), and a
    finished chunk is written at once: a kill loses one chunk's work and nothing that was written.
    A bad row must not end a work of days, and many bad rows mean a mistake: hence --bad-limit.
    """
    label = getattr(source.table, "features", {}).get(args.label)
    kind, factor = ("latents", vae.factor) if args.latent else (vae.kind, 1)

    def read(item: tuple[int, int]) -> dict:
        """(place, number) → a row that is ready to be encoded; or why it is left out."""
        place, number = item
        name = f"row {number}"  # for people
        try:
            row, more = rows[number], joined[number]
            name = str(row.get("file_name") or row.get("__key__") or name)
            if not isinstance(more.get("drop"), bool | None):
                raise ValueError(f"drop {more['drop']!r} of --with must be true or false")
            check = more.get("image_crc32")  # of dedup and recaption
            if check is not None and check != zlib.crc32(source.file(row)):
                raise ValueError("its image has changed since --with was made: make that again")
            if more.get("drop"):
                raise Dropped("--with says drop")
            row = row | more
            said = [caption(row, column, args, label) for column in captions]
            if not any(said):
                raise ValueError("no caption")
            kept = nested(row, args.held) if args.held else None
            if isinstance(kept, str):  # of a CSV
                kept = {"true": True, "false": False, "": None}.get(kept.lower(), kept)
            if kept not in (True, False, None):
                raise ValueError(f"{args.held} {kept!r:.80} must be true or false")
            if args.latent:
                image = latent(row[args.latent], args)
            else:
                image = fit(source.picture(row), buckets, args.max_upscale)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            kind = getattr(error, "kind", "bad")
            return {"row": number, "name": name, "kind": kind, "reason": line_of(error)}
        # Every tenth place of the shuffled source is held out, up to --validation of them: by its
        # place, so it does not depend on what happens to other rows. With --held the source itself
        # says which rows.
        turn, late = divmod(place, EVERY)
        held = late == EVERY - 1 and turn < args.validation
        if args.held:
            held = kept
        split = "validation" if held else "train"
        where = (split, *(side * factor for side in image.shape[-2:]))
        return {"row": number, "image": image, "captions": said, "where": where}

    def encode(batch: list[dict]) -> list[dict]:
        """Rows of one bucket → what is stored of them."""
        images = torch.stack([row["image"] for row in batch])
        if kind == "moments":
            images = vae.moments(images)
        images = images.to("cpu", torch.uint8 if kind == "pixels" else torch.float16)
        features = iter(text([c for row in batch for c in row["captions"] if c]))
        finite = images.flatten(1).isfinite().all(dim=1).tolist()
        for row, image, fine in zip(batch, images, finite, strict=True):
            if not fine:
                raise ValueError(
                    f"row {row['row']} is not finite in fp16: drop it by --with, or take a --vae"
                    " that does not overflow"
                )
            row["image"] = image.numpy().tobytes()
            row["text"] = [form.pack(next(features)) if c else None for c in row["captions"]]
        return batch

    def encode_all(places) -> tuple[list[dict], list[dict]]:
        """The places of a chunk → what is stored of its rows, and which rows are left out.

        A batch has one size, so rows wait by split and bucket until a batch is full. Meanwhile
        threads read the next ones.
        """
        done, waiting = [], defaultdict(list)
        while items := list(islice(places, AHEAD * args.batch)):
            for row in pool.map(read, items):
                bar.update()
                where = row.get("where")  # None: left out
                waiting[where].append(row)
                if where and len(waiting[where]) == args.batch:
                    done += encode(waiting.pop(where))
        left_out = waiting.pop(None, [])
        for batch in waiting.values():
            done += encode(batch)
        return done, left_out

    files, seen, bad, part = [], 0, [], args.share
    total = len(source.table) // part.step if hasattr(source.table, "__len__") else None
    with ThreadPoolExecutor(args.workers) as pool, tqdm(unit="row", total=total) as bar:
        for i, block in enumerate(blocks(source.table, args.chunk_rows, args.seed)):
            file = args.out / "chunks" / f"{i:05d}.json"
            files.append(file)
            if i % part.step != part.start:
                continue
            rows, numbers = block
            joined = defaultdict(dict)
            for join in joins:
                wanted = pa.compute.is_in(join["row"], pa.array(numbers, join["row"].type))
                for row in join.filter(wanted).to_pylist():
                    if not joined[row["row"]].get("drop"):  # once dropped, it stays so
                        joined[row["row"]] |= row
            entry = read_json(file, Entry) if file.exists() else None
            if entry and not there(args.out, entry):
                entry = None
            # A chunk that is there is made again if one of its bad rows can be read now.
            if entry and all("kind" in read((0, row["row"])) for row in bad_rows(entry)):
                bar.update(len(numbers))
            else:
                file.unlink(missing_ok=True)  # nobody may finish with the old one
                places = enumerate(numbers, i * args.chunk_rows)
                before = files_of(source, rows, numbers)
                entry = write_chunk(file, *encode_all(places), made, before)
            seen += len(numbers)
            bad += bad_rows(entry)
            if len(bad) > args.bad_limit * max(seen, FEW_ROWS):
                listed = "; ".join(f"{row['name']} ({row['reason']})" for row in bad[:3])
                raise ValueError(
                    f"{len(bad)} of {seen} rows are bad: {listed}; at most --bad-limit"
                    f" {args.bad_limit:g} of them may be"
                )
    return files


@dataclass(frozen=True)
class LeftOut(Checked):
    row: Natural
    name: str
    kind: Annotated[str, rule(choices=("bad", "small", "dropped"))]
    reason: str


@dataclass(frozen=True)
class Entry(Chunk):
    """What the .json of a chunk must hold."""

    ranges: list[Range]
    left_out: list[LeftOut]
    files: Natural  # see files_check


def there(out: Path, entry: dict) -> bool:
    """Whether the .arrow of a chunk is there, as long as it was written."""
    file = out / entry["file"]
    return file.is_file() and file.stat().st_size == entry["bytes"]


def bad_rows(entry: dict) -> list[dict]:
    """Of what a chunk's .json holds: what may be repaired. Small and dropped rows are as meant."""
    return [row for row in entry["left_out"] if row["kind"] == "bad"]


def files_of(source: Source, rows, numbers: list[int]) -> dict[int, list[tuple[int, int]]]:
    """Of each row that names files: the size and the time of its image, and of its .txt."""
    found = defaultdict(list)
    for number in numbers if source.named else ():
        row = rows[number]
        paths = [cell for cell in row.values() if isinstance(cell, Path)]  # of a folder's row
        for path in paths or [source.folder / str(row.get(source.image))]:
            with suppress(OSError, ValueError):  # none of that name
                stat = path.stat()
                found[number].append((stat.st_size, stat.st_mtime_ns))
    return found


def files_check(files: dict, entry: dict) -> int:
    """A checksum of files_of a chunk; without bad rows, which may be repaired."""
    bad = {row["row"] for row in bad_rows(entry)}
    return zlib.crc32(repr([item for item in files.items() if item[0] not in bad]).encode())


def write_chunk(file: Path, rows: list[dict], left_out: list[dict], made: str, files: dict) -> dict:
    """The .arrow of one record batch, then the .json: so a chunk is whole if its .json is there.

    Rows are sorted by split and bucket, so each bucket is one range of the chunk and the manifest
    stays small. rows: the columns, and "where", (split, height, width); the list is emptied to free
    memory. made: see Manifest; files: see files_of. → the .json.
    """
    rows.sort(key=lambda row: row["where"])
    for row in rows:
        _, *size = row["where"]
        kept = (row[key] for key in ("image", "captions", "text"))
        row["checks"] = row_checks((made, int(file.stem), *size), *kept)
    counts, ranges, first = Counter(row["where"] for row in rows), [], 0
    batch, sink = pa.RecordBatch.from_pylist(rows, COLUMNS), pa.BufferOutputStream()
    rows.clear()  # memory
    with pa.ipc.new_stream(sink, COLUMNS) as writer:
        writer.write_batch(batch)
    content = memoryview(sink.getvalue())
    for where, n in counts.items():
        ranges.append(asdict(Range(int(file.stem), *where, first, n)))
        first += n
    entry = {
        "file": f"chunks/{file.stem}.arrow",
        "bytes": len(content),
        "crc32": zlib.crc32(content),
        "checks": checks_check(batch.column("checks")),
        "ranges": ranges,
        "left_out": left_out,
    }
    entry["files"] = files_check(files, entry)
    write_whole(file.with_suffix(".arrow"), content)
    write_whole(file, json.dumps(entry).encode())
    return entry


def finish(files: list[Path], facts: dict) -> dict:
    """The manifest: facts, and what the chunks' .json files say; so two parts that end at the same
    time write the same bytes. ValueError if no row is left to train on.
    """
    chunks = [read_json(file, Entry) for file in files]
    ranges = [r for chunk in chunks for r in chunk.pop("ranges")]
    left_out = [row for chunk in chunks for row in chunk.pop("left_out")]
    for chunk in chunks:
        del chunk["files"]
    counts = Counter(row["kind"] for row in left_out)
    for r in ranges:
        counts[r["split"]] += r["rows"]
    if not counts["train"]:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in left_out[:3])
        raise ValueError(f"no row is left to train on; {len(left_out)} left out: {reasons}")
    if facts.get("held") and not counts["validation"]:
        raise ValueError(
            f"--held {facts['held']} is true in no row: give another column, and another --out"
        )
    manifest = facts | {
        "rows": {k: counts[k] for k in ("train", "validation", "bad", "small", "dropped")},
        "chunks": chunks,
        "ranges": ranges,
    }
    return manifest | {"check": manifest_check(manifest)}


# ------------------------------------------------------------------------------------------------
# From options to a manifest
# ------------------------------------------------------------------------------------------------

MAY_DIFFER = ("out", "part", "batch", "workers", "device", "bad_limit")  # between attempts


@dataclass(frozen=True)
class Settings(Parted, Reading):
    size: int = option(256, "buckets have about size² pixels", least=1, most=2**14, group="images")
    max_aspect: float = option(2.0, "long side over short; 1: square", least=1)
    max_upscale: float = option(1.0, "images that would be enlarged more are left out", above=0)
    patch: int | None = option(None, "sides are multiples of it x the VAE's factor", least=1)
    caption: list[str] = option(
        [], "COLUMN[:WEIGHT] …; of several one is drawn, by weight (else: text …)", group="captions"
    )
    label: str | None = option(None, "a column of class labels, for captions")
    label_template: str = option("a photo of {a}", "{}: the name, {a}: with a or an")
    with_: list[Path] = option([], ".parquet files, joined by their column row")
    text_encoder: str = option("hash", "hash, or name or folder of a T5", group="encoders")
    text_tokens: int | None = option(None, "captions are cut there (hash 32, else 256)", least=1)
    text_bits: int = option(16, "16: fp16; 8: bytes", choices=(8, 16))
    text_reach: float = option(0.25, "8 bits cover ± this", above=0)
    vae: str = option("pixels", "pixels, or name or folder of an AutoencoderKL")
    latent: str | None = option(None, "a column of rows that the --vae has encoded, taken as")
    latent_shape: str = option("4x32x32", "channels x rows x columns")
    latent_dtype: str = option("uint8", "of raw bytes")
    latent_scale: float = option(1.0, "latent = raw · scale + offset, so that")
    latent_offset: float = option(0.0, "it is the VAE's mean, unscaled")
    validation: int = option(512, "rows kept from training; at most a tenth", least=0, group="rows")
    held: str | None = option(None, "a column: where it is true, and nowhere else, a row is kept")
    bad_limit: float = option(0.01, "share of rows that may be bad", least=0, most=1)
    seed: int = option(0, "of the order", least=0)
    chunk_rows: int = option(4096, "rows of a file", least=1)

    def __post_init__(self):
        super().__post_init__()
        if "{" in self.label_template.replace("{a}", "").replace("{}", ""):
            raise ValueError(f"--label-template {self.label_template!r} may use {{}} and {{a}}")
        if "{" not in self.label_template:
            raise ValueError(f"--label-template {self.label_template!r} must hold {{}} or {{a}}")

    @property
    def shape(self) -> list[int]:
        return [int(n) for n in self.latent_shape.split("x") if n.isdecimal()]


def caption_columns(args, columns: list[str]) -> dict[str, float]:
    """column → weight, from --caption and --label, or what the source has."""
    chosen = {args.label: 1.0} if args.label else {}
    for given in args.caption:
        column, _, weight = given.partition(":")
        if column in chosen:
            raise ValueError(f"--caption {given}: {column} is given twice, drop one")
        try:
            chosen[column] = float(weight or 1)
        except ValueError:
            chosen[column] = 0
        if not 0 < chosen[column] < inf:
            raise ValueError(f"--caption {given}: the weight must be a number above 0")
    return chosen or {next((c for c in CAPTION_COLUMNS if c in columns), "text"): 1.0}


def same_settings(args: Settings, source: Source, models: list[str]) -> dict:
    """Every part and attempt must have the same options; the first one writes them down.

    Chunks made with different options would train without an error and never as meant.
    """
    now = {key: value for key, value in args.saved().items() if key not in MAY_DIFFER}
    now["with_"] = [f"{file} (CRC {zlib.crc32(file.read_bytes()):08x})" for file in args.with_]
    now["source_rows"] = len(source.table) if hasattr(source.table, "__len__") else None
    now["source_files"], now["models"] = source.id, models
    path = args.out / "prepare.json"
    if not path.exists():
        if list(args.out.glob("chunks/*")):
            raise ValueError(f"--out {args.out} has chunks, but no {path.name} that says how made")
        mark(args.out, "tools.prepare")
        (args.out / "chunks").mkdir(exist_ok=True)
        write_new(path, json.dumps(now, indent=1).encode())  # parts may begin together
    older = read_json(path)
    for name in {**older, **now}:
        if now.get(name) != older.get(name):
            raise ValueError(
                f"--out {args.out} was begun with {flag(name)} {older.get(name)}, now it is"
                f" {now.get(name)}: give the same options, or another --out"
            )
    return now


def unchanged(args: Settings, source: Source):
    """ValueError if a file that a chunk was made of has another size or time now."""
    table = source.table if source.named else []
    for i, (rows, numbers) in enumerate(blocks(table, args.chunk_rows, args.seed)):
        chunk = args.out / "chunks" / f"{i:05d}.arrow"
        file = chunk.with_suffix(".json")
        if chunk.exists() and file.exists():
            entry = read_json(file, Entry)
            if entry["files"] != files_check(files_of(source, rows, numbers), entry):
                raise ValueError(
                    f"SOURCE {args.source} has other files than {chunk} was made of: delete that,"
                    " to make it anew"
                )


@program("tools.prepare")
def main(argv: list[str] | None = None):
    """Check all options against the source first: a mistake must not show after hours."""
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, "tools.prepare")
    if "::" in str(args.out):
        raise ValueError(f"--out {args.out}: '::' joins two file systems, choose another name")
    device = choose_device(args.device)
    begin(device)
    source = open_source(args)
    joins = []
    for file in args.with_:
        join = pa.parquet.read_table(pa.memory_map(str(file)))
        if "row" not in join.column_names or not pa.types.is_integer(join["row"].type):
            raise ValueError(f"--with {file} must have a column row, the number in SOURCE")
        joins.append(
            join.set_column(join.column_names.index("row"), "row", join["row"].cast("int64"))
        )
        others = {column for other in joins[:-1] for column in other.column_names}
        twice = (others & {*join.column_names}) - {"row", "drop", "image_crc32"}
        if twice:
            raise ValueError(f"--with {file} has the column {min(twice)} once more: drop one file")
        if source.image in join.column_names:
            raise ValueError(f"--with {file} must not have a column {source.image}, the images'")
        made_from = (join.schema.metadata or {}).get(b"source_files", b"0")
        if source.id and made_from not in (b"0", b"%d" % source.id):
            raise ValueError(f"--with {file} is of other files than SOURCE has now: make it again")
        rows = join["row"].to_numpy()
        last = len(source.table) - 1 if hasattr(source.table, "__len__") else rows.max(initial=0)
        if len(np.unique(rows)) < len(rows) or ((rows < 0) | (rows > last)).any():
            raise ValueError(
                f"--with {file} must have each row once, from 0 to {last}, SOURCE's last: was it"
                " made from another SOURCE?"
            )
    columns = sorted({*source.columns}.union(*(join.column_names for join in joins)))
    captions = caption_columns(args, columns)
    for column in (*captions, args.latent or source.image, *filter(None, [args.held])):
        if column.partition(".")[0] not in columns:
            raise ValueError(
                f"SOURCE {args.source} has no column {column}; there are: {', '.join(columns)};"
                " choose with --caption, --label or --held"
            )
    vae, size = image_encoder(args.vae, device), args.size
    if args.latent:
        if args.vae == "pixels":
            raise ValueError("--latent needs the --vae that made the latents")
        if len(args.shape) != 3 or args.shape[0] != vae.channels:
            raise ValueError(
                f"--latent-shape {args.latent_shape} must be channels x rows x columns; --vae"
                f" {args.vae} has {vae.channels} channels"
            )
        size = round(prod(args.shape[1:]) ** 0.5 * vae.factor)
    unit = (args.patch or (4 if args.vae == "pixels" else 2)) * vae.factor
    buckets = make_buckets(size, unit, args.max_aspect)
    if not buckets:
        raise ValueError(f"--size {size} must be at least {unit}, patch x VAE factor")
    if size % unit and not args.latent:
        raise ValueError(f"--size {size} must be a multiple of {unit}, patch x VAE factor")
    tokens = args.text_tokens or (32 if args.text_encoder == "hash" else 256)
    text = text_encoder(args.text_encoder, tokens, device)
    form = TextFormat(tokens, text.dim, args.text_bits, args.text_reach)
    facts = same_settings(args, source, [getattr(text, "files", ""), vae.files])
    unchanged(args, source)
    made = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
    manifest = args.out / "manifest.json"
    if manifest.exists() and not all(there(args.out, c) for c in read_json(manifest)["chunks"]):
        manifest.unlink()  # a broken chunk was deleted: it is made again
    if not manifest.exists():
        files = make_chunks(args, source, joins, captions, buckets, vae, text, form, made)
        if not all(file.exists() for file in files):
            print(f"this part is done; the last part to end writes {manifest}")
            return
        sweep(args.out)
        kind = "latents" if args.latent else vae.kind
        facts |= {
            "schema": SCHEMA,
            "made": made,
            "size": size,
            "noise_seed": args.seed,
            "text_tokens": tokens,
            "text_format": asdict(form),
            "null_text": base64.b64encode(form.pack(text([""])[0])).decode(),
            "image": {"kind": kind, "channels": vae.channels, "factor": vae.factor},
            "captions": [{"column": c, "weight": w} for c, w in captions.items()],
        }
        write_whole(manifest, json.dumps(finish(files, facts), indent=1).encode())
    rows = PreparedFolder(str(args.out), None).manifest["rows"]
    again = f"; to try the bad rows again, delete {manifest}" if rows.get("bad") else ""
    print(f"{args.out} is ready: {rows}{again}")


if __name__ == "__main__":
    main()
