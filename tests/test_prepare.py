"""tools/prepare.py through its command: every row once, the same bytes whatever happens."""

import base64
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from helpers import call, close
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import tiny_t5, tiny_vae

from common.pipeline import Pipeline
from inputs.encoders import VAE, HashText, text_encoder
from inputs.sources import Damaged
from inputs.stored import PreparedFolder
from rf import mix_seed
from tools import dedup, prepare

ROOT = Path(__file__).parents[1]
SIZES = ((48, 48), (64, 36), (36, 64))  # width, height: three buckets at --size 16
OPTIONS = ["--size", "16", "--text-tokens", "8", "--workers", "2", "--validation", "8"]


def picture(i, sizes=SIZES):
    """The i-th picture: noise that looks alike in any format, in one of a few shapes."""
    small = np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC)


def pictures(folder, n=40, sizes=SIZES, lines=()):
    """n pictures with their number as their caption, in a metadata.jsonl, and more lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        picture(i, sizes).save(folder / f"{i}.png")
        other = {"other": f"other {i}"} if i % 4 != 1 else {}
        rows.append({"file_name": f"{i}.png", "text": f"number {i}"} | other)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, *lines])))
    return folder


def run(source, out, *extra):
    """The command → the manifest; None while a part is missing."""
    call(prepare.main, source, "--out", out, *OPTIONS, *extra)
    file = out / "manifest.json"
    return json.loads(file.read_text()) if file.exists() else None


def refused(capsys, reason, source, out, *extra):
    """It ends with one line that holds the reason."""
    said = helpers.refused(prepare.main, capsys, source, "--out", out, *OPTIONS, *extra)
    assert said.startswith("tools.prepare: ") and reason in said


def prepared(out, dtype=np.uint8, channels=(3,), factor=1):
    """All that was written, as the manifest lists it: row number → its cells; each number once."""
    manifest, found = json.loads((out / "manifest.json").read_text()), {}
    for r in manifest["ranges"]:
        chunk = manifest["chunks"][r["chunk"]]
        content = (out / chunk["file"]).read_bytes()
        assert (len(content), zlib.crc32(content)) == (chunk["bytes"], chunk["crc32"])
        (batch,) = pa.ipc.open_stream(content)
        for row in batch.slice(r["first"], r["rows"]).to_pylist():
            assert row["row"] not in found
            bucket = r["height"], r["width"]
            image = np.frombuffer(row["image"], dtype)
            row["image"] = torch.tensor(image.reshape(*channels, *(n // factor for n in bucket)))
            found[row["row"]] = row | {"bucket": bucket, "split": r["split"]}
    return found


def captions(out):
    return {number: row["captions"] for number, row in prepared(out).items()}


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, unit, aspect", [(256, 16, 2.0), (32, 4, 1.5)])
def test_buckets_have_equal_area_and_fit_the_network(size, unit, aspect):
    buckets = prepare.make_buckets(size, unit, aspect)
    assert (size, size) in buckets and len(set(buckets)) == len(buckets) >= 3
    for height, width in buckets:
        assert height % unit == width % unit == 0 and (width, height) in buckets
        assert max(height, width) <= aspect * min(height, width)
        assert abs(height * width - size**2) <= unit * max(height, width) / 2
    assert prepare.make_buckets(size, unit, 1.0) == [(size, size)]


def test_an_image_goes_to_the_bucket_of_its_shape():
    buckets = [(16, 16), (12, 20), (20, 12)]
    image = Image.new("RGB", (100, 60))
    image.paste((255, 0, 0), (50, 0, 100, 60))  # the right half is red
    fitted = prepare.fit(image, buckets, 1.0)
    assert fitted.shape == (3, 12, 20) and fitted.dtype == torch.uint8
    assert (fitted[0, :, 11:] > 250).all() and (fitted[0, :, :9] < 5).all()
    assert prepare.fit(image.rotate(90, expand=True), buckets, 1.0).shape == (3, 20, 12)
    small = Image.new("RGB", (10, 10))
    assert prepare.fit(small, buckets, 1.6).shape == (3, 16, 16)
    with pytest.raises(prepare.TooSmall, match=r"10x10 would be enlarged 1.60 times"):
        prepare.fit(small, buckets, 1.0)


# --- sources -------------------------------------------------------------------------------------


def png(i):
    buffer = io.BytesIO()
    picture(i).save(buffer, "png")
    return buffer.getvalue()


def folder(path, n):
    for i in range(n):
        file = path / f"class_{i % 2}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
        file.with_suffix(".txt").write_text(f" number {i}\n")
    return path


def csv_file(path, n):
    lines = ["file_name,text,image", *(f"{i}.png,number {i},no picture" for i in range(n))]
    file = pictures(path, n) / "list.csv"
    file.write_text("\n".join(lines), "utf-8-sig")  # as Excel does
    return file


def parquet(path, n):
    path.mkdir()
    rows = {
        "img": [{"bytes": png(i), "path": None} for i in range(n)],
        "text": [f"number {i}" for i in range(n)],
        "label": [i % 2 for i in range(n)],
    }
    table = Dataset.from_dict(rows).cast_column("img", ImageFeature())
    table = table.cast_column("label", ClassLabel(names=["cat", "otter"]))
    table.to_parquet(path / "0.parquet")
    return path


def webdataset(path, n):
    """With pickles that must not be opened: they would make a file."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (path / "sprung",)

    path.mkdir()
    traps = [(suffix, pickle.dumps(Trap())) for suffix in ("pkl", "pickle", "pyd")]
    with tarfile.open(path / "0.tar", "w") as tar:
        for i in range(n):
            nested = json.dumps({"said": {"long": f"the number {i}"}}).encode()
            parts = [("png", png(i)), ("txt", f"number {i}".encode()), ("json", nested)]
            for suffix, content in parts + traps:
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_every_layout_gives_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s a stream
    orders = {}
    for make in (folder, pictures, csv_file, parquet, webdataset):
        source = make(tmp_path / make.__name__, 11)
        for extra in ([], ["--streaming"]):
            name = make.__name__ + "".join(extra)
            out = tmp_path / f"{name} out"
            run(source, out, "--chunk-rows", 4, *extra)
            found = orders[name] = prepared(out)
            assert sorted(found) == list(range(11))
            for row, cells in found.items():
                number = int(cells["captions"][0].removeprefix("number "))
                assert make is folder or number == row  # a folder is read class by class
                expected = prepare.fit(picture(number), [cells["bucket"]], 1.0)
                assert torch.equal(cells["image"], expected), out
    assert [*orders["pictures"]] == [*orders["parquet"]] != [*orders["parquet--streaming"]]
    assert not (tmp_path / "webdataset" / "sprung").exists()
    run(tmp_path / "webdataset", tmp_path / "nested", "--caption", "json.said.long")
    assert captions(tmp_path / "nested") == {i: [f"the number {i}"] for i in range(11)}


@pytest.mark.parametrize(
    "source, content, reason",
    [
        ("empty", None, "holds no images: put images"),
        ("nobody/nothing-at-all", None, "could not be loaded"),
        ("script.py", "open('sprung', 'w')", "could not be loaded"),
        ("a.jsonl", "", "could not be loaded: it is empty"),
        ("a.jsonl", '{"sketch": 1}', "has no column text; there are: sketch"),
        ("a.jsonl", "{half", "could not be loaded"),
        ("a.jsonl", '{"file_name": "a", "text": "b"}\n[1]', "could not be loaded"),
        ("a.jsonl", '{"file_name": null, "text": "b"}', "no row is left to train on; 1 left out: "),
        ("a.parquet", "no", "could not be loaded"),
        ("a.csv", 'file_name,text\na,"b"\na,b, c', "Expected 2 fields in line 3, saw 3"),
    ],
)
def test_what_is_no_source(tmp_path, monkeypatch, capsys, source, content, reason):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if content is not None:
        Path(source).write_text(content)
    refused(capsys, reason, source, tmp_path / "out")
    assert not Path("sprung").exists()


# --- the whole -----------------------------------------------------------------------------------


def test_every_row_comes_once_with_its_picture_and_captions(tmp_path):
    bad = [("0.png", 7), ("none.png", "a"), ("cut.png", "a"), ("0.png", ""), ("tiny.png", "a")]
    lines = [{"file_name": name, "text": text} for name, text in bad]
    source, out = pictures(tmp_path / "source", lines=lines), tmp_path / "data"
    (source / "cut.png").write_bytes((source / "1.png").read_bytes()[:200])
    Image.new("RGB", (9, 9)).save(source / "tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone stores it sideways
    picture(1).rotate(90, expand=True).save(source / "1.png", exif=exif)
    manifest = run(source, out, "--chunk-rows", 8, "--batch", 2, "--bad-limit", 0.1)
    found, all_buckets = prepared(out), prepare.make_buckets(16, 4, 2.0)
    assert sorted(found) == list(range(40)) and len(manifest["chunks"]) == 6
    for number, row in found.items():
        assert torch.equal(row["image"], prepare.fit(picture(number), all_buckets, 1.0))
        assert row["captions"] == [f"number {number}"]
        text = HashText(tokens=8)(row["captions"])[0, :2]
        assert row["text"] == [text.half().numpy().tobytes()]
    splits = Counter(row["split"] for row in found.values())
    assert manifest["rows"] == {**splits, "bad": 4, "small": 1, "dropped": 0}
    assert len({row["bucket"] for row in found.values() if row["split"] == "train"}) == 3
    assert manifest["null_text"] == ""  # of hash: nothing at all
    entries = [json.loads(file.read_text()) for file in out.glob("chunks/*.json")]
    left_out = sorted((row["row"], row["reason"]) for entry in entries for row in entry["left_out"])
    reasons = ("holds 7, must be text", "none.png", "truncated", "no caption", "9x9 would be")
    for (number, found), place, reason in zip(left_out, range(40, 45), reasons, strict=True):
        assert number == place and reason in found


def test_the_order_is_shuffled_and_validation_keeps_its_times(tmp_path):
    run(pictures(tmp_path / "source", 120, SIZES[:1]), tmp_path / "data")
    order = np.random.default_rng(mix_seed(0, "prepare", 0)).permutation(120).tolist()
    held = order[9:80:10]  # every tenth, until there are eight
    expected = [(number, "train") for number in order if number not in held]
    expected += [(number, "validation") for number in held]
    found = prepared(tmp_path / "data").values()
    assert [(row["row"], row["split"]) for row in found] == expected
    (kept,) = helpers.opened(tmp_path / "data")[1].held
    assert kept.captions(range(8)) == [f"number {number}" for number in held]
    assert kept.t_index(range(8)).tolist() == list(range(8))


KILLED = """
import os, signal, sys
from tools import dedup, prepare
write, left = prepare.write_whole, [4]
def write_whole(path, content):
    left[0] -= 1
    if not left[0]:
        path.with_name("." + path.name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
prepare.write_whole = write_whole
prepare.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "extra, reason",
    [
        (["--size", 18], "--size 18 must be a multiple of 4, patch x VAE factor"),
        (["--latent", "file_name", "--latent-shape", "3x8x8"], "--latent needs the --vae"),
    ],
)
def test_what_no_run_could_draw_is_not_prepared(tmp_path, capsys, extra, reason):
    source = pictures(tmp_path / "source", 2)
    refused(capsys, reason, source, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, capsys, monkeypatch):
    source, scan = tmp_path / "source", os.scandir
    (source / "sub").mkdir(parents=True)
    for file in ("a.png", "sub/b.png"):
        picture(0).save(source / file)
        (source / file).with_suffix(".txt").write_text("a")

    def closed(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    for program, how in ((prepare, OPTIONS), (dedup, [])):
        line = helpers.refused(program.main, capsys, source, "--out", tmp_path / "out", *how)
        assert f"SOURCE {source / 'sub'} cannot be read: Permission denied" in line


def test_another_model_under_the_same_name_is_noticed(tmp_path, capsys):
    """A T5 of the same shape: going on with a preparation, training, and drawing."""
    source, t5 = pictures(tmp_path / "source", 12), tmp_path / "t5"
    tiny_t5(t5)
    how = [source, tmp_path / "data", "--text-encoder", t5, "--chunk-rows", 6]
    run(*how)
    facts = helpers.SHAPES | {"text_encoder": str(t5), "shapes": 0, "colors": 0, "places": 0}
    models = PreparedFolder(str(tmp_path / "data"), None).models
    assert models[0] and not models[1]
    out = helpers.exported(tmp_path / "run", facts | {"models": models})
    Pipeline.open(out)
    weights = load_file(t5 / "model.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, t5 / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="t5 holds another model than before"):
        Pipeline.open(out)
    (tmp_path / "data/manifest.json").unlink()
    (tmp_path / "data/chunks/00001.json").unlink()
    line = helpers.refused(prepare.main, capsys, source, "--out", *how[1:], *OPTIONS)
    assert "was begun with --models" in line


def test_a_chunk_of_the_same_command_over_other_captions_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for word in ("red", "tan"):  # as long, so that the chunks are, too
        for i in range(8):
            picture(i, [(20, 20)]).save(source / f"{i}.png")
            (source / f"{i}.txt").write_text(f"{word} {i}")
        run(source, tmp_path / word, "--chunk-rows", 4)
    shutil.copy(tmp_path / "red/chunks/00001.arrow", tmp_path / "tan/chunks")
    folder = PreparedFolder(str(tmp_path / "tan"), None)
    folder.table(0)
    with pytest.raises(Damaged, match="not those that the manifest lists"):
        folder.table(1)


def test_kills_and_parts_change_no_byte(tmp_path):
    source, out = pictures(tmp_path / "source"), tmp_path / "parts"
    extra = ["--chunk-rows", "6", "--batch", "2"]
    run(source, tmp_path / "whole", *extra)
    command = [sys.executable, "-c", KILLED, source, "--out", out, *OPTIONS, *extra]
    killed = subprocess.run([*command, "--part", "0/2"], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    first = out / "chunks" / "00000.arrow"
    made = first.stat().st_mtime_ns
    done = [bool(run(source, out, *extra, "--part", i)) for i in ("1/3", "1/2", "0/2", "1/2")]
    assert done == [False, False, True, True]
    assert first.stat().st_mtime_ns == made
    for i in range(7):
        for name in ("manifest.json", f"chunks/{i:05d}.arrow", f"chunks/{i:05d}.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (out / "chunks" / ".00002.json").read_bytes() == b"half"  # nobody's


def test_bad_rows_are_tried_again_until_all_is_done(tmp_path, capsys):
    lines = [{"file_name": f"late {i}.png", "text": "a"} for i in range(6)]
    source, out = pictures(tmp_path / "source", lines=lines), tmp_path / "data"
    extra = ["--chunk-rows", 8, "--streaming"]  # so that the last chunk holds them all
    refused(capsys, "6 of 46 rows are bad: late 0.png ([Errno 2]", source, out, *extra)
    chunk = out / "chunks" / "00001.arrow"
    made = chunk.stat().st_mtime_ns
    for i in range(5):
        picture(i).save(source / f"late {i}.png")
    manifest = run(source, out, *extra)
    assert sorted(prepared(out)) == list(range(45)) and manifest["rows"]["bad"] == 1
    assert chunk.stat().st_mtime_ns == made
    picture(5).save(source / "late 5.png")
    assert run(source, out, *extra) == manifest  # it is done


# --- captions ------------------------------------------------------------------------------------


def test_columns_are_joined_and_weighed_and_rows_dropped(tmp_path):
    source, out = pictures(tmp_path / "source"), tmp_path / "data"
    extra = ["--chunk-rows", 16, "--caption", "text:3", "--caption", "again"]
    columns = {"drop": [True, False, True, False], "again": ["a", "b", "c", None]}
    for name, values in columns.items():
        prepare.write_table(tmp_path / name, {"row": [17, 3, 9, 4], name: values})
        extra += ["--with", tmp_path / name]
    prepare.write_table(tmp_path / "none", {"row": [17, 9], "drop": [False, None]})
    extra += ["--with", tmp_path / "none"]  # what one table drops is dropped
    manifest, found = run(source, out, *extra), prepared(out)
    assert manifest["rows"]["dropped"] == 2 and found.keys() == {*range(40)} - {9, 17}
    weights = {c["column"]: c["weight"] for c in manifest["captions"]}
    assert weights == {"text": 3.0, "again": 1.0}
    for i, row in found.items():
        assert row["captions"] == [f"number {i}", "b" if i == 3 else None]
        assert [blob is None for blob in row["text"]] == [False, i != 3]


def test_a_name_of_a_class_is_not_a_template(tmp_path):
    (folder(tmp_path / "source", 1) / "class_0").rename(tmp_path / "source/cat {}")
    how = ["--label", "label", "--label-template", "{a} in {}"]
    run(tmp_path / "source", tmp_path / "data", *how)
    assert captions(tmp_path / "data") == {0: ["a cat {} in cat {}"]}


@pytest.mark.parametrize(
    "make, names",
    [
        (folder, ["a class 0, class 0", "a class 1, class 1"]),
        (parquet, ["a cat, cat", "an otter, otter"]),
    ],
)
def test_labels_become_captions(tmp_path, make, names):
    source = make(tmp_path / "source", 4)
    run(source, tmp_path / "data", "--label", "label", "--label-template", "{a}, {}")
    assert sorted(captions(tmp_path / "data").values()) == [[name] for name in names for _ in "12"]


def test_a_label_of_blanks_is_no_caption(tmp_path, capsys):
    rows = {"image": [picture(i, [(16, 16)]) for i in range(4)], "y": ["a", "b", " ", "_"]}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "0.parquet")
    run(tmp_path / "0.parquet", tmp_path / "data", "--label", "y", "--bad-limit", 1)
    assert {*captions(tmp_path / "data")} == {0, 1}


def test_parts_that_begin_together_have_the_same_options(tmp_path, capsys, monkeypatch):
    """The other one writes its options down just before this one does."""
    source, write = pictures(tmp_path / "source", 4), prepare.write_new

    def late(path, content):
        if path.name == "prepare.json":
            write(path, content.replace(b'"seed": 0', b'"seed": 1'))
        write(path, content)

    monkeypatch.setattr(prepare, "write_new", late)
    said = "was begun with --seed 1, now it is 0"
    refused(capsys, said, source, tmp_path / "data", "--part", "0/2")


def test_cells_of_a_csv_are_words(tmp_path):
    """007 is a name, 12 a caption, and true says that a row is held out."""
    lines = ["file_name,label,text,kept"]
    for i in range(6):
        picture(i, [(16, 16)]).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,00{i},{10 + i},{'True' if i == 2 else ('', 'false')[i % 2]}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    run(tmp_path / "rows.csv", tmp_path / "a", "--label", "label", "--label-template", "{}")
    assert captions(tmp_path / "a") == {i: [f"00{i}"] for i in range(6)}
    run(tmp_path / "rows.csv", tmp_path / "b", "--held", "kept")
    found = prepared(tmp_path / "b")
    assert {i: row["captions"] for i, row in found.items()} == {i: [f"{10 + i}"] for i in range(6)}
    assert [i for i, row in found.items() if row["split"] == "validation"] == [2]


# --- encoders ------------------------------------------------------------------------------------


def test_moments_of_a_vae_and_features_of_a_t5(tmp_path):
    vae, t5, out = tiny_vae(tmp_path / "vae"), tiny_t5(tmp_path / "t5"), tmp_path / "data"
    manifest = run(pictures(tmp_path / "source", 12), out, "--vae", vae, "--text-encoder", t5)
    assert manifest["image"] == {"kind": "moments", "channels": 4, "factor": 2}
    image, text = VAE(vae), text_encoder(t5, 8)
    for number, row in prepared(out, np.float16, (1, 2, 4), 2).items():
        pixels, stored = prepare.fit(picture(number), [row["bucket"]], 1.0)[None], row["image"]
        for noise in (None, torch.randn(stored[:, 0].shape)):
            close(image.encode(pixels, noise), image.encode(stored, noise), atol=2e-3)
        expected = text(row["captions"])[0]
        features = np.frombuffer(row["text"][0], np.float16).reshape(3, 16)
        close(torch.tensor(features), expected[:3], atol=1e-3)  # and the end mark
    null = np.frombuffer(base64.b64decode(manifest["null_text"]), np.float16)
    close(torch.tensor(null), text([""])[0, 0], atol=1e-3)


def test_rows_that_are_encoded_already_pass_through(tmp_path, capsys):
    vae, out = tiny_vae(tmp_path / "vae"), tmp_path / "data"
    raw = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 6), dtype=np.uint8)
    rows = {"latent": [x.tobytes() for x in raw], "text": [f"number {i}" for i in range(10)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "0.parquet")
    scale = ["--vae", vae, "--latent-scale", 24 / 255, "--latent-offset", -12]
    command = [tmp_path / "0.parquet", out, *scale, "--latent", "latent", "--latent-shape"]
    refused(capsys, "must be channels x rows x columns; --vae", *command, "8x3x6")
    manifest = run(*command, "4x6x6")
    assert manifest["image"] == {"kind": "latents", "channels": 4, "factor": 2}
    for number, row in prepared(out, np.float16, (1, 1, 4), 2).items():
        close(row["image"][0, 0], torch.tensor(raw[number] * (24 / 255) - 12), atol=8e-3)
    rows["latent"] = raw.transpose(0, 2, 3, 1).astype(np.float32).tolist()  # channels last
    Dataset.from_dict(rows).to_parquet(tmp_path / "last.parquet")
    said = "the latent is (6, 6, 4), --latent-shape says 4x6x6"
    how = ["--latent", "latent", "--latent-shape", "4x6x6", "--bad-limit", 0]
    refused(capsys, said, tmp_path / "last.parquet", tmp_path / "last", *scale, *how)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra, reason",
    [
        ("--caption title", "has no column title; there are: file_name, label, text"),
        ("--caption text:much", "--caption text:much: the weight must be a number above 0"),
        ("--caption text:0", "the weight must be a number above 0"),
        ("--caption text:1 text:2", "--caption text:2: text is given twice, drop one"),
        ("--label text --caption text", "--caption text: text is given twice, drop one"),
        ("--with more again", "--with again has the column words once more: drop one file"),
        ("--part 2/2", "--part 2/2 must be i/n"),
        ("--label-template {b}", "may use {} and {a}"),
        ("--size 2", "--size 2 must be at least 4"),
        ("--latent z", "has no column z; there are: file_name, label, text"),
        ("--with joined", "--with joined must have a column row"),
        ("--with none", "No such file"),
        ("--with images", "must not have a column file_name, the images'"),
        ("--with twice", "--with twice must have each row once, from 0 to 3"),
        ("--with beyond", "--with beyond must have each row once, from 0 to 3"),
    ],
)
def test_wrong_options_say_so(tmp_path, monkeypatch, capsys, extra, reason):
    monkeypatch.chdir(tmp_path)
    prepare.write_table(Path("joined"), {"number": [1]})
    prepare.write_table(Path("images"), {"row": [1], "file_name": ["1.png"]})
    prepare.write_table(Path("twice"), {"row": [1, 1]})
    for name in ("more", "again"):
        prepare.write_table(Path(name), {"row": [1], "words": ["a"]})
    prepare.write_table(Path("beyond"), {"row": [1, 4]})
    refused(capsys, reason, folder(tmp_path / "source", 4), Path("data"), *extra.split())
    assert not Path("data").exists()


def test_other_options_and_a_source_that_grew_are_noticed(tmp_path, capsys):
    source, out = pictures(tmp_path / "source", 6), tmp_path / "data"
    run(source, out)
    refused(capsys, "was begun with --size 16, now it is 20", source, out, "--size", 20)
    pictures(source, 7)
    refused(capsys, "was begun with --source-rows 6, now it is 7", source, out)


def test_a_source_that_changed_is_noticed(tmp_path, capsys):
    """Its files' names give the rows their numbers; what a chunk holds must not be older."""
    source, out, table = folder(tmp_path / "source", 6), tmp_path / "data", tmp_path / "d.parquet"
    call(dedup.main, source, "--out", table)
    first, last = source / "class_0/00.png", source / "class_1/05.png"
    last.with_suffix(".txt").write_bytes(b"\xff")
    run(source, out, "--chunk-rows", 2, "--bad-limit", 1, "--with", table)
    again = source, out, "--chunk-rows", 2, "--bad-limit", 1, "--with", table
    last.with_suffix(".txt").write_text("repaired")
    run(*again)
    first.with_suffix(".txt").write_text("another caption")
    refused(capsys, "has other files than", *again)
    for chunk in (out / "chunks").glob("*.arrow"):
        chunk.unlink()
    run(*again)
    assert ["another caption"] in captions(out).values() and len(captions(out)) == 6
    first.rename(first.with_name("zz.png"))
    refused(capsys, "is of other files than SOURCE has now: make it again", *again)
    run(source, tmp_path / "new")
    first.with_name("zz.png").rename(first)
    refused(capsys, "was begun with --source-files", source, tmp_path / "new")
    file = csv_file(tmp_path / "csv", 4)
    run(file, tmp_path / "other")
    file.write_text(file.read_text().replace("number", "nomber"))
    refused(capsys, "was begun with --source-files", file, tmp_path / "other")


@pytest.mark.parametrize("make", [folder, pictures])
def test_images_that_older_ones_replace_are_noticed(tmp_path, capsys, make):
    """Between two parts, and when all is done."""
    source, out = make(tmp_path / "source", 6), tmp_path / "data"
    how = [source, out, "--chunk-rows", 3, "--part"]
    files = {file: file.stat().st_mtime_ns for file in source.rglob("*.png")}
    for part in ("0/2", "1/2"):
        run(*how, part)
        for file in files:
            os.utime(file, ns=(0, 0))
        refused(capsys, "has other files than", *how, "1/2")
        for file, time in files.items():
            os.utime(file, ns=(time, time))
    assert run(*how, "1/2")["rows"]["train"] == 6


@pytest.mark.parametrize("how", ["first", "middle", "cut", "two", "text after it"])
def test_an_archive_that_does_not_end_with_its_end_is_refused(tmp_path, capsys, how):
    """tarfile stops at a broken header, and at the end of the first of two archives."""
    file = webdataset(tmp_path / "source", 4) / "0.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        end = tar.getmembers()[12].offset
    if how in ("first", "middle"):
        content[0 if how == "first" else end] ^= 1
    elif how == "cut":
        del content[end:]
    else:
        content += bytes(content) if how == "two" else b"text"
    file.write_bytes(content)
    reason = "0.tar is cut off or damaged at byte"
    for extra in ([], ["--streaming"]):
        refused(capsys, reason, tmp_path / "source", tmp_path / "out", *extra)


def test_which_of_several_columns_holds_the_images(tmp_path, capsys):
    out, kind = tmp_path / "data", ImageFeature()
    for name in ("image", "target"):
        columns = {"conditioning_image": [9, 9], name: [0, 1]}
        rows = {c: [{"bytes": png(i), "path": None} for i in n] for c, n in columns.items()}
        table = Dataset.from_dict(rows | {"text": ["number 0", "number 1"]})
        table = table.cast_column("conditioning_image", kind).cast_column(name, kind)
        table.to_parquet(tmp_path / f"{name}.parquet")
    run(tmp_path / "image.parquet", out)
    for number, row in prepared(out).items():
        assert torch.equal(row["image"], prepare.fit(picture(number), [row["bucket"]], 1.0))
    reason = "has images in conditioning_image, target: call one of them image"
    refused(capsys, reason, tmp_path / "target.parquet", tmp_path / "other")


def test_a_folder_of_two_kinds_is_refused(tmp_path, capsys):
    source = parquet(tmp_path / "source", 4)
    (webdataset(tmp_path / "tars", 4) / "0.tar").rename(source / "t.tar")
    reason = "holds t.tar and 0.parquet: move one away"
    refused(capsys, reason, source, tmp_path / "out")


def test_a_manifest_that_was_changed_is_refused(tmp_path, capsys):
    source, out = folder(tmp_path / "source", 20), tmp_path / "data"
    manifest, file = run(source, out), out / "manifest.json"
    ranges = [r | {"first": 0} for r in manifest["ranges"]]
    file.write_text(json.dumps(manifest | {"ranges": ranges}))
    refused(capsys, "manifest.json is damaged: it has changed since it was", source, out)
    file.unlink()
    assert run(source, out) == manifest


def test_what_else_lies_in_a_folder_of_images(tmp_path, capsys):
    source = folder(tmp_path / "source", 4)
    (source / "class_0/04.heic").touch()
    (source / ".ipynb_checkpoints").mkdir()
    for name in ("00.png", "a.tar"):
        (source / ".ipynb_checkpoints" / name).write_bytes(png(0))
    assert run(source, tmp_path / "data")["rows"]["train"] == 4
    assert "1 files such as 04.heic are left out: convert them" in capsys.readouterr().out
    (source / "class_0/backup.tar").write_bytes(bytes(1024))
    refused(capsys, "holds 00.png and backup.tar: move one away", source, tmp_path / "new")


def test_what_is_transparent_is_white(tmp_path):
    """As RGBA, as a palette, as grey: a red square in the middle of nothing."""
    (tmp_path / "source").mkdir()
    image = Image.new("RGBA", (16, 16), (0, 255, 0, 0))  # hidden green
    image.paste((255, 0, 0, 255), (4, 4, 12, 12))
    image.save(tmp_path / "source/0.png")
    image.quantize(4).save(tmp_path / "source/1.png")
    grey = Image.new("LA", (16, 16), (80, 0))
    grey.paste((0, 255), (4, 4, 12, 12))
    grey.save(tmp_path / "source/2.png")
    for i in range(3):
        (tmp_path / f"source/{i}.txt").write_text(f"number {i}")
    run(tmp_path / "source", tmp_path / "data")
    for row in prepared(tmp_path / "data").values():
        picture, red = row["image"], row["captions"] != ["number 2"]
        assert (picture[:, :4] == 255).all()
        inside = picture[:, 5:11, 5:11].float().mean((1, 2))
        assert (inside - torch.tensor([255.0 * red, 0, 0])).abs().max() < 3


def test_a_folder_of_images_of_any_format(tmp_path):
    for i, ending in enumerate(prepare.IMAGES):
        kind = Image.registered_extensions()[ending]
        picture(i, [(20, 30)]).save(tmp_path / f"{i}{ending.upper()}", kind)
    (tmp_path / ".hidden.png").touch()
    source = prepare.read_folder(tmp_path)
    assert len(source.table) == len(prepare.IMAGES)
    assert {source.picture(row).size for row in source.table} == {(20, 30)}
