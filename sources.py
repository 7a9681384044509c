"""SOURCES: where captioned images come from. Each row is a dict: "image" and the caption columns.

    folder         images of any format, captions in .txt files beside them; the column "text".
                   The name of the folder an image lies in is the column "label".
    metadata       a .jsonl or .csv file, or a folder with metadata.jsonl / .csv: file_name, columns
    parquet        a file or a folder of them
    webdataset     a .tar file or a folder of them; "txt", "json.caption" … are columns
    hub name       anything that `datasets` loads without running its code

Rows are numbered. The numbers are the same in every run on the same source, so that a prepared row
can be recognised, whichever process made it. Nothing here unpickles, and no remote code is run.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_mnist import mix_seed

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
SHUFFLE_BUFFER = 10_000  # rows of a stream among which the order is shuffled


class Numbered(NamedTuple):
    number: int
    name: str  # for people: a path, or "row 17"
    row: dict


class Files:
    """Images on disk: (path, columns). A column may be a function that reads it when asked."""

    def __init__(self, files: list[tuple[Path, dict]], columns: list[str]):
        self.files, self.columns = files, columns

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Numbered:
        path, row = self.files[i]
        return Numbered(i, str(path), row | {"image": path})


class Table:
    """A `datasets` table with random access."""

    def __init__(self, table, image: str | None):
        self.table, self.image, self.columns = table, image, table.column_names

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Numbered:
        row = self.table[i]
        return Numbered(i, f"row {i}", row | {"image": row.get(self.image)})


class Stream:
    """A `datasets` stream: read once from front to back, of unknown length."""

    def __init__(self, stream, image: str | None, columns: list[str]):
        self.stream, self.image, self.columns = stream, image, columns

    def rows(self, part: int, parts: int, seed: int) -> Iterator[Numbered]:
        from datasets.distributed import split_dataset_by_node

        mine = split_dataset_by_node(self.stream, rank=part, world_size=parts)
        mine = mine.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for i, row in enumerate(mine):
            number = i * parts + part
            name = row.get("__key__") or f"row {number}"
            yield Numbered(number, name, row | {"image": row.get(self.image)})


Source = Files | Table | Stream


def rows_of(
    source: Source, part: int, parts: int, seed: int, skip: set[int]
) -> Iterator[tuple[int, Numbered]]:
    """(place in the shuffled order, row) of one of `parts` processes, without the rows in `skip`.

    Where the source knows its length the whole of it is shuffled; a stream only within a buffer.
    """
    if isinstance(source, Stream):
        rows = source.rows(part, parts, seed)
        yield from ((row.number, row) for row in rows if row.number not in skip)
        return
    order = np.random.default_rng(mix_seed(seed, "prepare", 0)).permutation(len(source))
    for place in range(part, len(order), parts):
        if (i := int(order[place])) not in skip:
            yield place, source[i]


def open_source(name: str, split: str = "train", stream: bool = False) -> Source:
    """What SOURCE means. ValueError or FileNotFoundError in one line if it holds no images."""
    path = Path(name)
    if path.is_dir():
        for metadata in ("metadata.jsonl", "metadata.csv"):
            if (path / metadata).is_file():
                return read_metadata(path / metadata)
        for kind, pattern in {"parquet": "*.parquet", "webdataset": "*.tar"}.items():
            files = sorted(path.rglob(pattern))
            if files:
                return load(kind, f"SOURCE {name}", "train", stream, [str(f) for f in files])
        return read_folder(path)
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is not None:
            return load(kind, f"SOURCE {name}", "train", stream, [str(path)])
        if path.suffix in (".jsonl", ".csv"):
            return read_metadata(path)
        raise ValueError(f"SOURCE {name} must be a folder, .jsonl, .csv, .parquet or .tar file")
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"SOURCE {name} is not there")
    return load(name, f"SOURCE {name}", split, stream)


def read_folder(folder: Path) -> Files:
    def caption(path: Path):
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    files = [
        (f, {"text": lambda f=f: caption(f.with_suffix(".txt")), "label": f.parent.name})
        for f in sorted(folder.rglob("*"))
        if f.suffix.lower() in IMAGES and f.name[0] != "."
    ]
    if not files:
        raise ValueError(
            f"SOURCE {folder} holds no images: put images and .txt captions of the same names there"
        )
    return Files(files, ["text", "label"])


def read_metadata(path: Path) -> Files:
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins its CSV with a mark
        try:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"SOURCE {path} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"SOURCE {path} is empty: a row must be file_name and captions")
    if isinstance(rows[0], dict) and "file_name" not in rows[0]:
        raise ValueError(
            f"SOURCE {path} has no column file_name; there are: {', '.join(map(str, rows[0]))}"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("file_name"):
            raise ValueError(f"SOURCE {path}: row {number} has no file_name")
        if None in row:
            raise ValueError(f"SOURCE {path}: row {number} has too many cells: quote its commas")
    columns = sorted({key for row in rows for key in row} - {"file_name"})
    return Files([(path.parent / str(row.pop("file_name")), row) for row in rows], columns)


def load(
    kind: str, name: str, split: str, stream: bool, files: list[str] | None = None
) -> Table | Stream:
    """Through `datasets`: a packaged format with files, or a name of the hub."""
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise ValueError(f"{name} needs datasets: pip install datasets") from error
    try:
        table = load_dataset(kind, data_files=files, split=split, streaming=stream)
        if stream and table.features is None:
            table = table._resolve_features()
    except Exception as error:  # of `datasets`, pyarrow, the hub or the file system
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} could not be loaded: {reason}") from error
    columns = list(table.features)
    image = next((c for c in columns if isinstance(table.features[c], Image)), None)
    image = image or next((c for c in IMAGE_COLUMNS if c in columns), None)
    for column in columns:  # bytes: we decode, and skip the bad
        if isinstance(table.features[column], Image):
            table = table.cast_column(column, Image(decode=False))
    if not stream and not len(table):
        raise ValueError(f"{name} is empty")
    return Stream(table, image, columns) if stream else Table(table, image)


def class_names(source: Source, column: str) -> list[str] | None:
    """The names behind a column of class numbers, where `datasets` knows them."""
    table = getattr(source, "table", None) or getattr(source, "stream", None)
    return getattr(table.features.get(column), "names", None) if table is not None else None


def image_bytes(cell) -> bytes:
    """An image cell: a path, bytes, or `datasets`' {"bytes", "path"}."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str | Path):
        return Path(cell).read_bytes()
    raise ValueError(f"no image: {type(cell).__name__}")


def value_of(row: dict, column: str):
    """row["json"]["caption"] for the column "json.caption"; None if it is not there."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return value_of(inner, rest) if rest and isinstance(inner, dict) else None
