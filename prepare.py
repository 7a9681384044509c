"""PREPARE: a source of captioned images → a cache, over any number of processes, at any time again.

    read      a row's image and captions; bad rows are listed and left out
    fit       crop and scale to the bucket whose shape is nearest (equal area, multiples of a unit)
    encode    the VAE's mean and log-variance, text features, an embedding to find duplicates by
    write     shards of one bucket each; a journal for each part says which are whole
    finish    the last part drops near-duplicates and writes the manifest

A part that was killed reads its journal, throws away what is not in it, and goes on: every row
comes once. Captions are never dropped here, and validation images are encoded once and for all.
"""

import base64
import fcntl
import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from math import inf, log, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cache import SCHEMA, Bucket, Shard, TextFormat, open_shard, write_shard, write_whole
from dedup import drop_duplicates
from encoders import (
    Captioner,
    Encoded,
    ModelEmbedder,
    PixelEmbedder,
    image_encoder,
    text_encoder,
)
from sources import (
    Files,
    Numbered,
    Source,
    class_names,
    image_bytes,
    open_source,
    rows_of,
    value_of,
)

CAPTION_COLUMNS = ("text", "caption", "txt", "prompt")  # looked for if none is named
TIMES = 8  # of the validation loss: t = 0, 1/8, …, 7/8
EVERY = 10  # at most every tenth row is for validation
FEW_ROWS = 200  # the limit on bad rows is a share of at least so many

# ------------------------------------------------------------------------------------------------
# Geometry: images → buckets
# ------------------------------------------------------------------------------------------------


def make_buckets(size: int, unit: int, max_aspect: float) -> list[Bucket]:
    """(height, width) of about size² pixels, multiples of `unit`, long ≤ max_aspect · short."""
    found = set()
    for short in range(unit, size + 1, unit):
        long = max(round(size * size / short / unit) * unit, short)
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def fit(image: Image.Image, buckets: list[Bucket], max_upscale: float) -> Tensor:
    """The image cropped and scaled to its bucket, (3, H, W) uint8. TooSmall beyond max_upscale."""
    aspect = log(image.height / image.width)
    height, width = min(buckets, key=lambda b: abs(log(b[0] / b[1]) - aspect))
    scale = max(height / image.height, width / image.width)
    if scale > max_upscale:
        raise TooSmall(f"{image.width}x{image.height} would be enlarged {scale:.2f} times")
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


class TooSmall(ValueError):
    """An image that would have to be enlarged: left out, but not a bad row."""


# ------------------------------------------------------------------------------------------------
# Rows: what a source gives → an image of a bucket's size, and its captions
# ------------------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """Turns source rows into Ready ones. captions: column → weight."""

    captions: dict[str, float]
    label: str | None  # a caption column made of a class label …
    names: list[str] | None  # … whose numbers have these names …
    template: str  # … put in here
    buckets: list[Bucket]
    max_upscale: float
    latent: "Latent | None"
    needs_caption: bool  # False where they are still to be written

    def __call__(self, numbered: Numbered) -> "Ready":
        row = numbered.row
        captions = [self.caption(row, column) for column in self.captions]
        if self.needs_caption and not any(captions):
            raise ValueError("no caption")
        if self.latent is not None:
            return Ready(numbered, self.latent(row), captions)
        with Image.open(io.BytesIO(image_bytes(row["image"]))) as image:
            upright = ImageOps.exif_transpose(image)  # phones store pictures sideways
            return Ready(numbered, fit(upright, self.buckets, self.max_upscale), captions)

    def caption(self, row: dict, column: str) -> str | None:
        value = value_of(row, column)
        value = value() if callable(value) else value
        if column == self.label and value is not None:
            if self.names and not 0 <= value < len(self.names):
                raise ValueError(f"label {value} has no name")
            name = (self.names[value] if self.names else str(value)).replace("_", " ")
            return self.template.format(
                name, a=f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
            )
        if value is not None and not isinstance(value, str):
            raise ValueError(f"caption column {column} holds {value!r}, must be text")
        return value.strip() or None if value else None


class Latent(NamedTuple):
    """A column that holds encoded images: latent = raw · scale + offset, as the VAE's mean is."""

    column: str
    shape: tuple[int, int, int]  # C, h, w
    dtype: str  # of raw bytes
    scale: float
    offset: float

    def __call__(self, row: dict) -> Tensor:
        raw = row[self.column]
        raw = np.frombuffer(raw, self.dtype) if isinstance(raw, bytes) else np.asarray(raw)
        values = raw.astype(np.float32).reshape(self.shape) * self.scale + self.offset
        if not np.isfinite(values.astype(np.float16)).all():
            raise ValueError("the latent is not finite in fp16")
        return torch.from_numpy(values)[None]  # (1, C, h, w)


class Ready(NamedTuple):
    source: Numbered
    image: Tensor  # (3, H, W) uint8, or an encoded (1, C, h, w) fp32
    captions: list[str | None]


# ------------------------------------------------------------------------------------------------
# Encoding: Ready rows of one bucket → rows of a shard
# ------------------------------------------------------------------------------------------------


class Encoder:
    def __init__(self, text, image, text_format: TextFormat, embedder=None, captioner=None):
        self.text, self.image, self.format = text, image, text_format
        self.embedder, self.captioner = embedder, captioner

    def __call__(self, rows: list[Ready]) -> list[dict]:
        images = torch.stack([row.image for row in rows])
        captions = [row.captions for row in rows]
        if self.captioner is not None:
            said = self.captioner(images)
            captions = [[*mine, new] for mine, new in zip(captions, said, strict=True)]
        stored = images if self.image.kind != "moments" else self.image.moments(images)
        if stored.is_floating_point():
            stored = stored.cpu().to(torch.float16)
            for row, moments in zip(rows, stored, strict=True):
                if not moments.isfinite().all():
                    raise ValueError(
                        f"{row.source.name}: the VAE's output is not finite in fp16; leave the row"
                        " out, or take a VAE that does not overflow"
                    )
        flat = [caption for mine in captions for caption in mine if caption]
        blobs = map(self.format.pack, self.text(flat))
        result = [
            {
                "row": row.source.number, "image": image.numpy().tobytes(), "captions": mine,
                "text": [next(blobs) if caption else None for caption in mine],
            }
            for row, image, mine in zip(rows, stored, captions, strict=True)
        ]  # fmt: skip
        if self.embedder is not None:
            for row, vector in zip(result, self.embedder(images), strict=True):
                row["embedding"] = vector.to(torch.float16).numpy().tobytes()
        return result


# ------------------------------------------------------------------------------------------------
# A part's journal: what is whole
# ------------------------------------------------------------------------------------------------


class Journal:
    """parts/0of2.jsonl, a line each: a shard that is whole, a row that was left out, the end."""

    def __init__(self, out: Path, part: int, parts: int):
        self.out, self.tag = out, f"{part}of{parts}"
        self.path = out / "parts" / f"{self.tag}.jsonl"
        self.shards: list[Shard] = []
        self.left_out: list[dict] = []
        self.done = False
        self._read()

    def _read(self):
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                kind, value = json.loads(line)
            except ValueError:
                break  # the process was killed while it wrote this one
            if kind == "shard":
                self.shards.append(Shard(*value))
            elif kind == "left out":
                self.left_out.append(value)
            self.done = kind == "done"

    def resume(self) -> set[int]:
        """Throw away what was not finished. The rows that are done."""
        whole = [s for s in self.shards if self._size(s) == s.bytes]
        if not self.done:  # what was unreadable may have been repaired
            self.left_out = [row for row in self.left_out if row["kind"] == "small"]
        self.done &= whole == self.shards
        self.shards = whole
        lines = [("shard", s) for s in whole] + [("left out", row) for row in self.left_out]
        lines += [("done", None)] * self.done
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(self.path, text.encode())
        names = {s.file for s in whole}
        for file in (self.out / "shards").glob(f"*-{self.tag}-*"):
            if f"shards/{file.name}" not in names:
                file.unlink()
        numbers = {row["row"] for row in self.left_out}
        for shard in whole:
            numbers.update(open_shard(self.out / shard.file).column("row").to_pylist())
        return numbers

    def _size(self, shard: Shard) -> int:
        file = self.out / shard.file
        return file.stat().st_size if file.exists() else -1

    def note(self, kind: str, value=None):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps((kind, value), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def leave_out(self, numbered: Numbered, reason: str, kind: str):
        entry = {"row": numbered.number, "name": numbered.name, "kind": kind, "reason": reason}
        self.left_out.append(entry)
        self.note("left out", entry)

    def write(self, split: str, bucket: Bucket, rows: list[dict]):
        number = 1 + max((int(s.file[-11:-6]) for s in self.shards), default=-1)
        file = f"shards/{split}-{bucket[0]}x{bucket[1]}-{self.tag}-{number:05d}.arrow"
        self.shards.append(write_shard(self.out, file, split, bucket, rows))
        self.note("shard", self.shards[-1])


# ------------------------------------------------------------------------------------------------
# The work of one part
# ------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    validation: int  # rows kept from training
    shard_bytes: int
    bad_limit: float
    seed: int
    batch: int


def held_out(place: int, rows: int) -> bool:
    """Every tenth place of the shuffled order is kept from training, until there are `rows`."""
    return place % EVERY == EVERY - 1 and place // EVERY < rows


def run_part(
    plan: Plan, source: Source, reader: Reader, encoder: Encoder, out: Path, part: int, parts: int,
    workers: int,
):  # fmt: skip
    """Read, encode and write the rows of one part that are not done yet."""
    journal = Journal(out, part, parts)
    with locked(out / "parts" / "lock"):  # no other part is just rewriting the shards
        if (out / "manifest.json").exists():
            return
        skip = journal.resume()
    if journal.done:
        return
    total = None if not hasattr(source, "__len__") else len(range(part, len(source), parts))
    waiting: dict[tuple[str, Bucket], list[tuple[int, Ready]]] = {}  # not yet encoded
    rows: dict[tuple[str, Bucket], list[dict]] = {}  # encoded, not yet written
    factor = encoder.image.factor

    def attempt(item):
        place, numbered = item
        try:
            return place, reader(numbered)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            return place, numbered, error

    def encode(key):
        some = waiting.pop(key, [])
        if not some:
            return
        encoded = encoder([ready for _, ready in some])
        if key[0] == "validation":
            for row, (place, _) in zip(encoded, some, strict=True):
                row["t_index"] = place // EVERY % TIMES
        rows.setdefault(key, []).extend(encoded)
        if len(rows[key]) * len(encoded[0]["image"]) >= plan.shard_bytes:
            journal.write(*key, rows.pop(key))

    bar = tqdm(total=total, initial=len(skip), unit="row", desc=f"part {part}/{parts}")
    read, bad = len(skip), sum(row["kind"] == "bad" for row in journal.left_out)
    with bar, ThreadPoolExecutor(max(1, workers)) as pool:
        todo = rows_of(source, part, parts, plan.seed, skip)
        while chunk := list(islice(todo, 4 * plan.batch)):
            for place, result, *error in pool.map(attempt, chunk):
                if error:
                    reason = (str(error[0]) or type(error[0]).__name__).splitlines()[0]
                    kind = "small" if isinstance(error[0], TooSmall) else "bad"
                    bad += kind == "bad"
                    journal.leave_out(result, reason, kind)
                    continue
                split = "validation" if held_out(place, plan.validation) else "train"
                latent = result.image.is_floating_point()
                side = [n * factor if latent else n for n in result.image.shape[-2:]]
                key = (split, tuple(side))
                waiting.setdefault(key, []).append((place, result))
                if len(waiting[key]) >= plan.batch:
                    encode(key)
            read += len(chunk)
            bar.update(len(chunk))
            if bad > plan.bad_limit * max(read, FEW_ROWS):
                examples = [r for r in journal.left_out if r["kind"] == "bad"][:3]
                listed = "; ".join(f"{r['name']} ({r['reason']})" for r in examples)
                raise ValueError(
                    f"{bad} of {read} rows are bad: {listed}; at most --bad-limit"
                    f" {plan.bad_limit:g} of them may be"
                )
    for key in list(waiting):
        encode(key)
    for key in list(rows):
        journal.write(*key, rows.pop(key))
    journal.note("done")


# ------------------------------------------------------------------------------------------------
# The end: one manifest of all parts
# ------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, busy: str | None = None):
    """One process at a time, also after a kill. busy: refuse with it instead of waiting."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield


def finish(out: Path, parts: int, facts: dict, dedup_threshold: float | None) -> dict | None:
    """The manifest, once every part is done; None as long as one is not."""
    with locked(out / "parts" / "lock"):  # of two parts that end together one does it
        if (out / "manifest.json").exists():
            return json.loads((out / "manifest.json").read_text())
        journals = [Journal(out, part, parts) for part in range(parts)]
        if not all(journal.done for journal in journals):
            return None
        shards = sorted(s for journal in journals for s in journal.shards)
        left_out = [row for journal in journals for row in journal.left_out]
        repeated = 0
        if dedup_threshold is not None and shards:
            shards, repeated = drop_duplicates(out, shards, dedup_threshold)
        splits = Counter()
        for shard in shards:
            splits[shard.split] += shard.rows
        if not splits["train"]:
            reasons = "; ".join(f"{r['name']}: {r['reason']}" for r in left_out[:3])
            raise ValueError(f"no row is left to train on; {len(left_out)} left out: {reasons}")
        kinds = Counter(row["kind"] for row in left_out)
        buckets = Counter()
        for shard in shards:
            if shard.split == "train":
                buckets[shard.bucket] += shard.rows
        manifest = facts | {
            "schema": SCHEMA,
            "rows": {
                "train": splits["train"], "validation": splits["validation"],
                "bad": kinds["bad"], "small": kinds["small"], "duplicates": repeated,
            },
            "buckets": [
                {"height": h, "width": w, "rows": n} for (h, w), n in sorted(buckets.items())
            ],
            "shards": [shard._asdict() for shard in shards],
        }  # fmt: skip
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in left_out)
        write_whole(out / "left_out.jsonl", text.encode())
        write_whole(out / "manifest.json", json.dumps(manifest, indent=1).encode())
        listed = {shard.file for shard in shards}
        for file in (out / "shards").iterdir():
            if f"shards/{file.name}" not in listed:
                file.unlink()
        return manifest


# ------------------------------------------------------------------------------------------------
# From options to a manifest
# ------------------------------------------------------------------------------------------------

WORK = ("part", "workers", "device", "batch", "bad_limit", "out")  # may differ between attempts


def check(args) -> tuple[int, int]:
    """Reject what cannot work; → part, parts."""
    for key in ("size", "batch", "shard_mb", "max_aspect", "max_upscale", "text_tokens", "patch",
                "recaption_weight"):  # fmt: skip
        value = getattr(args, key)
        if value is not None and not value > 0:
            raise ValueError(f"--{key.replace('_', '-')} {value} must be above 0")
    if args.text_bits not in (8, 16):
        raise ValueError(f"--text-bits {args.text_bits} must be 8 or 16")
    try:
        args.label_template.format("x", a="an x")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"--label-template {args.label_template!r} may use {{}} and {{a}}"
        ) from error
    part, slash, parts = args.part.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--part {args.part} must be i/n with 0 ≤ i < n, such as 0/2 and 1/2")
    return int(part), int(parts)


def caption_columns(args, source: Source) -> dict[str, float]:
    """column → weight, from --caption and --label, or what the source has."""
    chosen = {}
    for given in args.caption:
        column, _, weight = given.partition(":")
        try:
            chosen[column] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f"--caption {given}: {weight!r} must be a number") from error
        if not 0 < chosen[column] < inf:
            raise ValueError(f"--caption {given}: the weight must be above 0")
    if args.label and args.label not in chosen:
        chosen[args.label] = 1.0
    if not chosen and not args.recaption:
        chosen = {c: 1.0 for c in CAPTION_COLUMNS if c in source.columns}
        chosen = dict(list(chosen.items())[:1])
    missing = [c for c in chosen if c.partition(".")[0] not in source.columns]
    if missing or not (chosen or args.recaption):
        raise ValueError(
            f"SOURCE {args.source} has no caption column {missing[0] if missing else 'I know'};"
            f" there are: {', '.join(source.columns)}; choose with --caption or --label"
        )
    return chosen


def same_settings(args, parts: int, rows: int | None):
    """Every part and attempt must be told the same; the first one writes it down."""
    told = {key: value for key, value in vars(args).items() if key not in (*WORK, "run")}
    told |= {"parts": parts, "source_rows": rows}
    told = json.loads(json.dumps(told, default=str))
    path = args.out / "prepare.json"
    if not path.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(told, indent=1).encode())
    for key, value in json.loads(path.read_text()).items():
        if told.get(key) != value:
            raise ValueError(
                f"--out {args.out} was begun with {key} {value}, now it is {told.get(key)}: give"
                " the same options, or another --out"
            )


def choose_images(args, source: Source, device):
    """→ (the image encoder, how encoded rows are read or None)."""
    if not args.latent:
        if not isinstance(source, Files) and source.image is None:
            raise ValueError(
                f"SOURCE {args.source} has no image column; there are: {', '.join(source.columns)}"
            )
        return image_encoder(args.vae, device), None
    if args.latent not in source.columns:
        raise ValueError(
            f"--latent {args.latent}: SOURCE {args.source} has no such column; there are:"
            f" {', '.join(source.columns)}"
        )
    if args.dedup or args.recaption:
        raise ValueError("--dedup and --recaption look at images: they do not go with --latent")
    shape = tuple(int(n) for n in args.latent_shape.split("x") if n.isdecimal())
    if len(shape) != 3:
        raise ValueError(f"--latent-shape {args.latent_shape} must be channels x rows x columns")
    latent = Latent(
        args.latent, shape, args.latent_dtype, args.latent_scale, args.latent_offset
    )  # fmt: skip
    return Encoded(args.vae, shape[0]), latent


def prepare(args, device) -> dict | None:
    """All of it. → the manifest, or None while other parts are still at work."""
    part, parts = check(args)
    source = open_source(args.source, args.split, args.streaming)
    captions = caption_columns(args, source)
    image, latent = choose_images(args, source, device)
    unit = (args.patch or (4 if args.vae == "pixels" else 2)) * image.factor
    buckets = make_buckets(args.size, unit, args.max_aspect)
    if not buckets:
        raise ValueError(f"--size {args.size} must be at least {unit}, patch x VAE factor")
    tokens = args.text_tokens or (32 if args.text_encoder == "hash" else 256)
    text = text_encoder(args.text_encoder, tokens, device)
    form = TextFormat(tokens, text.dim, args.text_bits, args.text_reach)
    embedder = None
    if args.dedup:
        pixels = args.dedup == "pixels"
        embedder = PixelEmbedder() if pixels else ModelEmbedder(args.dedup, device)
    captioner = Captioner(args.recaption, device) if args.recaption else None
    same_settings(args, parts, len(source) if hasattr(source, "__len__") else None)
    for folder in ("shards", "parts"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    names = class_names(source, args.label) if args.label else None
    reader = Reader(
        captions, args.label, names, args.label_template, buckets, args.max_upscale, latent,
        needs_caption=captioner is None,
    )  # fmt: skip
    plan = Plan(args.validation, int(args.shard_mb * 1e6), args.bad_limit, args.seed, args.batch)
    encoder = Encoder(text, image, form, embedder, captioner)
    busy = f"--part {args.part} of {args.out} is at work in another process: let it end"
    with locked(args.out / "parts" / f"{part}of{parts}.lock", busy):
        run_part(plan, source, reader, encoder, args.out, part, parts, args.workers)
    size = args.size if latent is None else round((prod(latent.shape[1:])) ** 0.5 * image.factor)
    columns = captions | ({"recaption": args.recaption_weight} if captioner else {})
    facts = {
        "source": args.source, "size": size, "seed": args.seed, "noise_seed": args.seed,
        "text_encoder": args.text_encoder, "text_tokens": tokens, "text_format": form._asdict(),
        "null_text": base64.b64encode(form.pack(text([""])[0])).decode(), "vae": args.vae,
        "image": {"kind": image.kind, "channels": image.channels, "factor": image.factor},
        "captions": [{"column": c, "weight": w} for c, w in columns.items()],
    }  # fmt: skip
    return finish(args.out, parts, facts, args.dedup_threshold if args.dedup else None)
