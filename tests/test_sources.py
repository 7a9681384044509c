"""sources.py: the same pictures in every layout, numbered alike; nothing is executed."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sources
from sources import image_bytes, open_source, rows_of, value_of


def picture(i, size=(8, 6)):
    return Image.fromarray(np.full((size[1], size[0], 3), 10 * i, np.uint8))


def png(i):
    buffer = io.BytesIO()
    picture(i).save(buffer, "png")
    return buffer.getvalue()


def decoded(cell):
    with Image.open(io.BytesIO(image_bytes(cell))) as image:
        return np.array(image.convert("RGB"))[0, 0, 0] // 10


def folder(path, n=4):
    for i in range(n):
        (path / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        picture(i).save(path / f"class {i % 2}" / f"{i}.png")
        (path / f"class {i % 2}" / f"{i}.txt").write_text(f"number {i}\n")
    return path


def jsonl(path, n=4):
    path.mkdir()
    lines = []
    for i in range(n):
        picture(i).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def csv_file(path, n=4):
    jsonl(path, n)
    (path / "metadata.jsonl").unlink()
    with open(path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "text"], *([f"{i}.png", f"number {i}"] for i in range(n))]
        )
    return path / "list.csv"


def parquet(path, n=4):
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {
        "img": [{"bytes": png(i), "path": None} for i in range(n)],
        "text": [f"number {i}" for i in range(n)],
        "label": [i % 2 for i in range(n)],
    }
    features = Features(
        {
            "img": ImageFeature(),
            "text": Value("string"),
            "label": ClassLabel(names=["cat", "otter"]),
        }
    )
    path.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(path / "0.parquet")
    return path


def webdataset(path, n=4, extra=()):
    path.mkdir()
    with tarfile.open(path / "0.tar", "w") as tar:
        for i in range(n):
            parts = [
                ("png", png(i)), ("txt", f"number {i}".encode()),
                ("json", json.dumps({"said": {"long": f"the number {i}"}}).encode()), *extra,
            ]  # fmt: skip
            for suffix, content in parts:
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


LAYOUTS = {
    "folder": (folder, "text"), "jsonl": (jsonl, "text"), "csv": (csv_file, "text"),
    "parquet": (parquet, "text"), "webdataset": (webdataset, "txt"),
}  # fmt: skip


def caption(row, column):
    value = value_of(row, column)
    return value() if callable(value) else value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path, layout):
    make, column = LAYOUTS[layout]
    source = open_source(str(make(tmp_path / "data", n=10)))
    assert len(source) == 10 and column in source.columns
    whole = {}
    for part in range(3):
        for place, numbered in rows_of(source, part, 3, seed=0, skip=set()):
            assert place % 3 == part and place not in whole
            whole[place] = numbered
            number = decoded(numbered.row["image"])
            assert caption(numbered.row, column) == f"number {number}"
    assert sorted(row.number for row in whole.values()) == list(range(10))
    order = [whole[place].number for place in range(10)]
    assert order != list(range(10))  # shuffled
    again = [row.number for _, row in rows_of(source, 0, 1, seed=0, skip={order[0], order[3]})]
    assert again == [n for i, n in enumerate(order) if i not in (0, 3)]
    assert [row.number for _, row in rows_of(source, 0, 1, seed=1, skip=set())] != order


@pytest.mark.parametrize("make, column", [(parquet, "text"), (webdataset, "txt")])
def test_a_stream_gives_every_row_once_in_numbers_that_repeat(tmp_path, monkeypatch, make, column):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s a parquet stream
    source = open_source(str(make(tmp_path / "data", n=11)), stream=True)
    assert isinstance(source, sources.Stream) and not hasattr(source, "__len__")

    def rows(part, parts=2, skip=()):
        return list(rows_of(source, part, parts, seed=0, skip=set(skip)))

    both = rows(0) + rows(1)
    assert sorted(caption(row.row, column) for _, row in both) == sorted(
        f"number {i}" for i in range(11)
    )
    assert len({row.number for _, row in both}) == 11
    for (place, row), (again_place, again) in zip(rows(1), rows(1), strict=True):
        assert (place, row.number, row.row[column]) == (
            again_place,
            again.number,
            again.row[column],
        )
    first = rows(0)[0][1].number
    assert [r.number for _, r in rows(0, skip=[first])] == [r.number for _, r in rows(0)[1:]]
    assert {decoded(row.row["image"]) for _, row in both} == set(range(11))


def test_nested_columns_and_class_names(tmp_path):
    source = open_source(str(webdataset(tmp_path / "tar")))
    _, numbered = next(iter(rows_of(source, 0, 1, 0, set())))
    number = decoded(numbered.row["image"])
    assert value_of(numbered.row, "json.said.long") == f"the number {number}"
    assert value_of(numbered.row, "json.said.short") is None
    table = open_source(str(parquet(tmp_path / "parquet")))
    assert sources.class_names(table, "label") == ["cat", "otter"]
    files = open_source(str(folder(tmp_path / "folder")))
    assert sources.class_names(files, "label") is None
    assert {row["label"] for _, row in files.files} == {"class 0", "class 1"}


def test_a_pickle_in_an_archive_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    trap = pickle.dumps(Trap())
    data = webdataset(tmp_path / "tar", extra=[(s, trap) for s in ("pkl", "pickle", "pyd")])
    for stream in (False, True):
        rows = list(rows_of(open_source(str(data), stream=stream), 0, 1, 0, set()))
        assert len(rows) == 4
    assert not (tmp_path / "sprung").exists()


def test_a_data_set_with_a_script_is_not_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(ValueError, match="holds no images"):
        open_source(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="must be a folder"):
        open_source(str(tmp_path / "data" / "data.py"))
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"picture": 1}')
    (tmp_path / "c.jsonl").write_text("{half")
    (tmp_path / "d.parquet").write_bytes(b"no")
    (tmp_path / "e.jsonl").write_text('{"file_name": "a.png"}\n{"text": "b"}')
    (tmp_path / "f.jsonl").write_text('{"file_name": "a.png"}\n[1]')
    (tmp_path / "g.csv").write_text("file_name,text\na.png,one, two")
    for name, reason in (
        ("empty", "holds no images: put images"), ("a.jsonl", "is empty"),
        ("b.jsonl", "no column file_name; there are: picture"), ("c.jsonl", "cannot be read"),
        ("e.jsonl", "row 2 has no file_name"), ("f.jsonl", "row 2 has no file_name"),
        ("g.csv", "row 1 has too many cells: quote its commas"),
        ("d.parquet", "could not be loaded"), ("none/of.tar", "is not there"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        open_source("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def test_a_table_from_excel_and_a_column_named_image(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\ufefffile_name,image,text\n1.png,other,hello", encoding="utf-8"
    )
    source = open_source(str(tmp_path / "a.csv"))
    assert source[0].row == {"image": tmp_path / "1.png", "text": "hello"}
