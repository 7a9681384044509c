"""prepare.py through `data_t2i.py prepare`: every row once, whatever happens on the way."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_encoders import tiny_t5, tiny_vae

import cache
import data_t2i
import dedup
import prepare
from cache import Cache, TextFormat
from encoders import VAE, HashText, PixelEmbedder, text_encoder

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((48, 48), (64, 36), (36, 64))  # width, height: three buckets at --size 16
OPTIONS = ["--size", "16", "--text-tokens", "8", "--workers", "1", "--validation", "8"]


def pictures(folder, n=40, sizes=SIZES, bad=()):
    """n noisy pictures with their number as their caption, in a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in range(n):
            width, height = sizes[i % len(sizes)]
            small = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            image.save(folder / f"{i}.png")
            row = {"file_name": f"{i}.png", "text": f"number {i}", "other": f"other {i}"}
            if i % 4 == 1:
                del row["other"]
            print(json.dumps(row), file=file)
        for line in bad:
            print(json.dumps(line), file=file)
    return folder


def run(source, out, *extra):
    data_t2i.main(["prepare", str(source), "--out", str(out), *OPTIONS, *map(str, extra)])
    return Cache(out) if (out / "manifest.json").exists() else None


def refused(capsys, reason, source, out, *extra):
    with pytest.raises(SystemExit) as caught:
        run(source, out, *extra)
    assert reason in str(caught.value) and "\n" not in str(caught.value), caught.value


def rows_of(data):
    """row number → (split, bucket, Row) of everything in a cache; each number once."""
    found = {}
    for shard in data.shards:
        for i in range(shard.rows):
            number = data.table(shard).column("row")[i].as_py()
            assert number not in found
            found[number] = (shard.split, shard.bucket, data.row(shard, i))
    return found


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, unit, aspect", [(256, 16, 2.0), (512, 64, 2.0), (32, 4, 1.5)])
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
    small = Image.new("L", (10, 10))
    with pytest.raises(prepare.TooSmall, match=r"10x10 would be enlarged 1.60 times"):
        prepare.fit(small, buckets, 1.0)
    assert prepare.fit(small, buckets, 1.6).shape == (3, 16, 16)


# --- the whole -----------------------------------------------------------------------------------


def test_every_row_comes_once_with_its_picture_and_captions(tmp_path):
    bad = [{"file_name": "0.png", "text": 7}, {"file_name": "none.png", "text": "a"}]
    bad += [{"file_name": "cut.png", "text": "a"}, {"file_name": "0.png", "text": ""}]
    bad += [{"file_name": "tiny.png", "text": "a"}]
    source = pictures(tmp_path / "source", bad=bad)
    (source / "cut.png").write_bytes((source / "1.png").read_bytes()[:200])
    Image.new("RGB", (9, 9)).save(source / "tiny.png")
    data = run(source, tmp_path / "data", "--shard-mb", 0.004, "--batch", 4, "--bad-limit", 0.1)
    found = rows_of(data)
    assert sorted(found) == list(range(40))
    manifest = data.manifest
    splits = Counter(split for split, *_ in found.values())
    assert manifest["rows"] == {
        "train": splits["train"], "validation": splits["validation"], "bad": 4, "small": 1,
        "duplicates": 0,
    }  # fmt: skip
    assert 1 <= splits["validation"] <= 4  # a tenth of 45, of which some may be bad
    buckets = Counter(bucket for split, bucket, _ in found.values() if split == "train")
    assert {(b["height"], b["width"]): b["rows"] for b in manifest["buckets"]} == buckets
    assert len(buckets) == 3 and len(data.shards) > 6
    for number, (_, bucket, row) in found.items():
        with Image.open(source / f"{number}.png") as image:
            expected = prepare.fit(image, [bucket], 1.0)
            assert bucket == tuple(expected.shape[1:])
        assert torch.equal(row.image, expected)
        assert row.captions == [f"number {number}"]
        text = HashText(tokens=8)([f"number {number}"])[0]
        assert torch.equal(row.features[0], text[:2].half()) and not text[2:].any()
    text = (tmp_path / "data" / "left_out.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    reasons = {(line["row"], line["kind"]): line["reason"] for line in lines}
    assert reasons.keys() == {(40, "bad"), (41, "bad"), (42, "bad"), (43, "bad"), (44, "small")}
    assert "caption column text holds 7, must be text" in reasons[40, "bad"]
    assert "truncated" in reasons[42, "bad"] and reasons[43, "bad"] == "no caption"
    assert data.null_text.shape == (0, 128)  # of hash: nothing at all


def test_the_order_is_shuffled_and_validation_keeps_its_times(tmp_path):
    source = pictures(tmp_path / "source", n=120, sizes=SIZES[:1])
    data = run(source, tmp_path / "data")
    (train,) = data.of("train").values()
    numbers = data.table(train[0]).column("row").to_pylist()
    assert numbers != sorted(numbers)
    ((held,),) = data.of("validation").values()
    assert sorted(data.table(held).column("t_index").to_pylist()) == list(range(8))
    again = run(source, tmp_path / "again")
    assert again.manifest == data.manifest
    parts = tmp_path / "parts"
    run(source, parts, "--part", "1/2")
    both = run(source, parts, "--part", "0/2")
    split = [s for s in both.shards if s.split == "validation"]
    times = {
        both.table(s).column("row")[i].as_py(): both.table(s).column("t_index")[i].as_py()
        for s in split for i in range(s.rows)
    }  # fmt: skip
    mine = data.table(held)
    assert times == dict(
        zip(mine.column("row").to_pylist(), mine.column("t_index").to_pylist(), strict=True)
    )


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import prepare, data_t2i
original, calls = prepare.write_shard, []
def write_shard(folder, file, *rest):
    calls.append(file)
    if len(calls) == 3:
        (folder / f'{{file}}'.replace('shards/', 'shards/.')).write_bytes(b'half')
    shard = original(folder, file, *rest)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # the shard is there, the journal does not say so
    return shard
prepare.write_shard = write_shard
data_t2i.main(sys.argv[1:])
"""


def test_a_part_at_work_is_not_started_twice(tmp_path, capsys):
    source, out = pictures(tmp_path / "source", n=6), tmp_path / "data"
    (out / "parts").mkdir(parents=True)
    with prepare.locked(out / "parts" / "0of1.lock"):
        refused(capsys, "--part 0/1 of", source, out)
    run(source, out)


def test_bad_rows_are_tried_again(tmp_path, capsys):
    bad = [{"file_name": f"late {i}.png", "text": "a"} for i in range(6)]
    source, out = pictures(tmp_path / "source", bad=bad), tmp_path / "data"
    refused(capsys, "6 of 46 rows are bad", source, out)
    for i in range(6):
        Image.new("RGB", (48, 48)).save(source / f"late {i}.png")
    data = run(source, out)
    assert sorted(rows_of(data)) == list(range(46)) and data.manifest["rows"]["bad"] == 0


def test_a_source_that_grew_is_noticed(tmp_path, capsys):
    source, out = pictures(tmp_path / "source", n=6), tmp_path / "data"
    run(source, out, "--part", "0/2")
    with open(source / "metadata.jsonl", "a") as file:
        print(json.dumps({"file_name": "0.png", "text": "one more"}), file=file)
    refused(capsys, "was begun with source_rows 6, now it is 7", source, out, "--part", "0/2")


def test_pictures_of_phones_stand_upright(tmp_path):
    source = pictures(tmp_path / "source", n=1, sizes=[(64, 36)])
    with Image.open(source / "0.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        image.save(source / "0.png", exif=exif)
    ((_, bucket, row),) = rows_of(run(source, tmp_path / "data")).values()
    assert bucket == (20, 12) and row.image.shape == (3, 20, 12)


def test_two_processes_killed_once_and_continued(tmp_path):
    bad = [{"file_name": "cut.png", "text": "a"}]
    source = pictures(tmp_path / "source", n=60, bad=bad)
    (source / "cut.png").write_bytes((source / "1.png").read_bytes()[:100])
    out = tmp_path / "data"
    extra = ["--shard-mb", "0.004", "--batch", "2", "--bad-limit", "0.1"]
    command = [sys.executable, "-c", KILL.format(root=str(ROOT)), "prepare", str(source)]
    command += ["--out", str(out), *OPTIONS, *extra, "--part"]
    killed = [
        subprocess.Popen([*command, f"{part}/2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for part in range(2)
    ]
    for process in killed:
        _, said = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
    with open(out / "parts" / "1of2.jsonl", "a") as journal:
        journal.write('["shard", ["shards/tra')  # a line that was cut off
    assert run(source, out, *extra, "--part", "0/2") is None  # part 1 is not done
    data = run(source, out, *extra, "--part", "1/2")
    assert sorted(rows_of(data)) == list(range(60))
    assert data.manifest["rows"]["bad"] == 1
    assert {f"shards/{p.name}" for p in (out / "shards").iterdir()} == {s.file for s in data.shards}
    before = (out / "manifest.json").read_bytes()
    run(source, out, *extra, "--part", "1/2")  # once more does nothing
    assert (out / "manifest.json").read_bytes() == before


def test_a_full_disk_leaves_what_is_there_valid(tmp_path, monkeypatch, capsys):
    source, out = pictures(tmp_path / "source"), tmp_path / "data"
    extra = ["--shard-mb", 0.004, "--batch", 4]
    original, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(cache.os, "fsync", fsync)
    refused(capsys, "No space left on device", source, out, *extra)
    whole = prepare.Journal(out, 0, 1).shards
    assert whole and not list((out / "shards").glob(".*")) and not (out / "manifest.json").exists()
    for shard in whole:
        assert len(cache.open_shard(out / shard.file)) == shard.rows
    monkeypatch.setattr(cache.os, "fsync", original)
    assert sorted(rows_of(run(source, out, *extra))) == list(range(40))


def test_too_many_bad_rows_end_it(tmp_path, capsys):
    bad = [{"file_name": f"missing {i}.png", "text": "a"} for i in range(9)]
    source = pictures(tmp_path / "source", bad=bad)
    refused(capsys, "9 of 49 rows are bad: ", source, tmp_path / "data")


# --- captions ------------------------------------------------------------------------------------


def test_several_caption_columns_with_weights(tmp_path):
    data = run(
        pictures(tmp_path / "source"),
        tmp_path / "data",
        "--caption",
        "text:3",
        "--caption",
        "other",
    )
    assert data.manifest["captions"] == [
        {"column": "text", "weight": 3.0}, {"column": "other", "weight": 1.0},
    ]  # fmt: skip
    for number, (_, _, row) in rows_of(data).items():
        other = None if number % 4 == 1 else f"other {number}"
        assert row.captions == [f"number {number}", other]
        assert (row.features[1] is None) == (other is None)


def test_labels_become_captions(tmp_path):
    from test_sources import folder, parquet

    options = ["--label", "label", "--label-template", "{a} is {} here", "--max-upscale", "9"]
    data = run(parquet(tmp_path / "parquet"), tmp_path / "a", *options)
    assert {row.captions[0] for *_, row in rows_of(data).values()} == {
        "a cat is cat here", "an otter is otter here",
    }  # fmt: skip
    data = run(folder(tmp_path / "folder"), tmp_path / "b", *options)
    assert {r.captions[0] for *_, r in rows_of(data).values()} == {
        "a class 0 is class 0 here", "a class 1 is class 1 here",
    }  # fmt: skip


def test_eight_bits_are_lavenderflows():
    form = TextFormat(tokens=5, dim=6, bits=8)
    x = torch.zeros(5, 6)
    x[:3] = torch.linspace(-0.4, 0.4, 18).view(3, 6)
    blob = form.pack(x)
    expected = ((x[:3].clamp(-0.25, 0.25) * 2 + 0.5) * 255).round()
    assert list(blob) == expected.flatten().int().tolist()

    def back(form, *features):
        return form.expand(form.join([form.read(form.pack(f)) for f in features]))

    (found,) = back(form, x)
    assert found.shape == (5, 6) and not found[3:].any() and found.dtype == torch.float32
    assert (found[:3] - x[:3].clamp(-0.25, 0.25)).abs().max() <= 0.25 / 255 + 1e-6
    wide = TextFormat(5, 6, bits=8, reach=0.5)
    assert (back(wide, x)[0] - x).abs()[:3].max() <= 0.5 / 255 + 1e-6
    full = TextFormat(5, 6)
    assert torch.equal(back(full, x)[0], x.half().float()) and len(full.pack(x)) == 3 * 6 * 2
    assert form.pack(torch.zeros(5, 6)) == b""
    y, nothing = torch.randn(5, 6), torch.zeros(5, 6)  # of several lengths, each in its own place
    assert torch.equal(
        back(full, nothing, x, y, nothing), torch.stack([nothing, x, y, nothing]).half().float()
    )


def test_recaptioning_writes_a_column_of_its_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_captioner(tmp_path / "model", transformers)
    data = run(
        pictures(tmp_path / "source", n=6), tmp_path / "data", "--recaption", model,
        "--recaption-weight", 2, "--caption", "text",
    )  # fmt: skip
    assert data.manifest["captions"] == [
        {"column": "text", "weight": 1.0}, {"column": "recaption", "weight": 2.0},
    ]  # fmt: skip
    for number, (_, _, row) in rows_of(data).items():
        assert row.captions[0] == f"number {number}" and row.captions[1]
        expected = HashText(tokens=8)([row.captions[1]])[0].half()
        assert torch.equal(row.features[1], expected[: len(row.features[1])])
        assert not expected[len(row.features[1]) :].any()


def tiny_captioner(folder, transformers):
    """A random BLIP of two layers whose every word is one of six; its folder."""
    words = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "red", "blue", "ring", "square", "a", "on"]
    (folder).mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    image = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(image, tokenizer).save_pretrained(folder)
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "bos_token_id": 4, "eos_token_id": 1, "pad_token_id": 0, "sep_token_id": 1,
        "projection_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "image_size": 16,
        "num_attention_heads": 2,
        "patch_size": 8,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


# --- encoders ------------------------------------------------------------------------------------


def test_moments_of_a_vae_and_features_of_a_t5(tmp_path):
    vae, t5 = tiny_vae(tmp_path / "vae"), tiny_t5(tmp_path / "t5")
    source = pictures(tmp_path / "source", n=12)
    data = run(source, tmp_path / "data", "--vae", vae, "--text-encoder", t5)
    assert data.manifest["image"] == {"kind": "moments", "channels": 4, "factor": 2}
    image, text = VAE(vae), text_encoder(t5, 8)
    for number, (_, bucket, row) in rows_of(data).items():
        with Image.open(source / f"{number}.png") as file:
            pixels = prepare.fit(file, [bucket], 1.0)[None]
        assert row.image.shape == (2, *data.latent(bucket)) and row.image.dtype == torch.float16
        grain = torch.randn(1, *data.latent(bucket))
        direct = image.encode(pixels, grain)
        stored = image.encode(row.image[None], grain)
        assert torch.allclose(direct, stored, atol=2e-3)
        assert not torch.allclose(stored, image.encode(row.image[None]), atol=2e-3)  # grain shows
        expected = text(row.captions)[0]
        assert torch.allclose(row.features[0].float(), expected[:3], atol=1e-3)  # and the end mark
        assert not expected[3:].any()
    assert torch.allclose(data.null_text.float(), text([""])[0, :1], atol=1e-3)


def test_rows_that_are_encoded_already_pass_through(tmp_path):
    from datasets import Dataset

    vae, rng = tiny_vae(tmp_path / "vae"), np.random.default_rng(0)
    raw = rng.integers(0, 256, (10, 4, 6, 6), dtype=np.uint8)
    rows = {"latent": [x.tobytes() for x in raw], "caption": [f"number {i}" for i in range(10)]}
    (tmp_path / "source").mkdir()
    Dataset.from_dict(rows).to_parquet(tmp_path / "source" / "0.parquet")
    data = run(
        tmp_path / "source", tmp_path / "data", "--vae", vae, "--latent", "latent",
        "--latent-shape", "4x6x6", "--latent-scale", 24 / 255, "--latent-offset", -12,
    )  # fmt: skip
    assert data.manifest["image"] == {"kind": "latents", "channels": 4, "factor": 2}
    image = VAE(vae)
    for number, (_, bucket, row) in rows_of(data).items():
        assert bucket == (12, 12) and row.captions == [f"number {number}"]
        expected = torch.from_numpy(raw[number] * (24 / 255) - 12).float()
        assert torch.allclose(row.image.float()[0], expected, atol=8e-3)
        latents = image.encode(row.image[None], torch.randn(1, 4, 6, 6))
        assert torch.allclose(latents[0], expected * 0.13025, atol=2e-3)


def test_missing_libraries_and_wrong_options_say_so(tmp_path, monkeypatch, capsys):
    source, out = pictures(tmp_path / "source", n=4), tmp_path / "data"
    for extra, reason in (
        (["--caption", "title"], "has no caption column title; there are: other, text"),
        (["--caption", "text:much"], "'much' must be a number"),
        (["--caption", "text:0"], "the weight must be above 0"),
        (["--part", "2/2"], "--part 2/2 must be i/n"), (["--text-bits", 4], "must be 8 or 16"),
        (["--label-template", "a {b}"], "may use {} and {a}"),
        (["--size", 2], "--size 2 must be at least 4"), (["--batch", 0], "must be above 0"),
        (["--latent", "z"], "no such column; there are: other, text"),
    ):  # fmt: skip
        refused(capsys, reason, source, out, *extra)
        assert not out.exists()
    for module, extra, reason in (
        ("transformers", ["--text-encoder", "t5"], "pip install transformers"),
        ("diffusers", ["--vae", "sdxl"], "pip install diffusers"),
        ("transformers", ["--dedup", "clip"], "pip install transformers"),
        ("transformers", ["--recaption", "blip"], "pip install transformers"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(capsys, reason, source, out, *extra)
    run(source, out)
    refused(capsys, "was begun with size 16, now it is 20", source, out, "--size", 20)
    refused(capsys, "was begun with parts 1, now it is 2", source, out, "--part", "0/2")


def test_nothing_left_to_train_on(tmp_path, capsys):
    source = pictures(tmp_path / "source", n=4, sizes=[(8, 8)])
    refused(capsys, "no row is left to train on; 4 left out", source, tmp_path / "data")


# --- duplicates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_faiss", [True, False])
def test_near_duplicates_go_and_are_reported(tmp_path, monkeypatch, with_faiss):
    if not with_faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)
    else:
        pytest.importorskip("faiss")
    source = pictures(tmp_path / "source", n=30, sizes=SIZES[:1])
    with open(source / "metadata.jsonl", "a") as file:
        for i in range(5):  # the same pictures, larger and as JPEG
            with Image.open(source / f"{i}.png") as image:
                image.resize((64, 64)).save(source / f"copy {i}.jpg", quality=80)
            print(json.dumps({"file_name": f"copy {i}.jpg", "text": f"copy {i}"}), file=file)
    data = run(source, tmp_path / "data", "--dedup", "pixels", "--dedup-threshold", 0.99)
    found = rows_of(data)
    text = (tmp_path / "data" / "duplicates.jsonl").read_text()
    report = [json.loads(line) for line in text.splitlines()]
    assert {frozenset((r["row"], r["repeats"])) for r in report} == {
        frozenset((i, 30 + i)) for i in range(5)
    }
    assert all(0.99 <= r["cosine"] <= 1.001 for r in report)
    assert len(found) == 30 and data.manifest["rows"]["duplicates"] == 5
    assert not {r["row"] for r in report} & found.keys()
    run(source, tmp_path / "data", "--dedup", "pixels", "--dedup-threshold", 0.99)  # does nothing
    assert json.loads((tmp_path / "data" / "manifest.json").read_text()) == data.manifest
    for shard in data.shards:
        assert len(data.table(shard)) == shard.rows
        assert (tmp_path / "data" / shard.file).stat().st_size == shard.bytes


def test_duplicates_against_a_naive_search():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2500, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = dedup.duplicates(vectors, 0.999)
    cosines, kept = vectors @ vectors.T, []
    for i in range(len(vectors)):
        near = [j for j in kept if cosines[i, j] >= 0.999]
        if near:
            assert found[i] == (near[0], pytest.approx(cosines[i, near[0]], abs=1e-5))
        else:
            assert i not in found
            kept.append(i)
    assert 100 < len(found) < 2400


def test_a_model_can_find_duplicates(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "vit"
    )
    source = pictures(tmp_path / "source", n=10, sizes=SIZES[:1])
    with open(source / "metadata.jsonl", "a") as file:
        print(json.dumps({"file_name": "3.png", "text": "again"}), file=file)
    options = ["--dedup", str(tmp_path / "vit"), "--dedup-threshold", "0.99999"]
    data = run(source, tmp_path / "data", *options)
    assert data.manifest["rows"]["duplicates"] == 1 and len(rows_of(data)) == 10


def test_pixel_embeddings_do_not_see_brightness():
    x = torch.randint(60, 120, (3, 3, 32, 32), dtype=torch.uint8)
    a, b = PixelEmbedder()(x), PixelEmbedder()(x + 40)
    assert torch.allclose(a, b, atol=1e-4) and torch.allclose(a.norm(dim=1), torch.ones(3))


# --- show ----------------------------------------------------------------------------------------


def test_show_says_what_is_there(tmp_path, capsys):
    run(pictures(tmp_path / "source"), tmp_path / "data")
    capsys.readouterr()
    data_t2i.main(["show", str(tmp_path / "data"), "--rows", "6", "--lengths", "50"])
    said = capsys.readouterr().out
    assert "train 36, validation 4" in said and "100% 2" in said  # two words a caption
    for bucket in ("16 x 16", "12 x 20", "20 x 12"):
        assert bucket in said
    assert (tmp_path / "data" / "show.png").stat().st_size > 5000
