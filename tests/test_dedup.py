"""tools/dedup.py and tools/recaption.py: what they write, and what prepare makes of it."""

import json
import re
import shutil

import pyarrow.parquet
import pytest
import torch
import transformers
from helpers import call, refused
from PIL import Image
from test_prepare import captions, picture, pictures, run
from test_tools import word_tokenizer
from torch.nn.functional import normalize

from tools import dedup, recaption

LAYER = {"hidden_size": 16, "intermediate_size": 16}
LAYER |= {"num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT = LAYER | {"image_size": 16, "patch_size": 8}
SIDE = {"height": 16, "width": 16}


def table(tool, source, out, *extra):
    """The command → the columns of the file that it writes."""
    call(tool.main, source, "--out", out, "--workers", 2, "--batch", 4, *extra)
    return pyarrow.parquet.read_table(out).to_pydict()


def saved(folder, kind, config, *processors):
    """A random model with its processors; the folder."""
    torch.manual_seed(0)
    for part in (kind(config), *processors):
        part.save_pretrained(folder)
    return folder


def vit(folder):
    config = transformers.ViTConfig(**SIGHT)
    return saved(folder, transformers.ViTModel, config, transformers.ViTImageProcessor(size=SIDE))


@pytest.mark.parametrize("model, threshold", [("pixels", 0.99), (vit, 0.99999)])
def test_near_duplicates_are_found_and_dropped(tmp_path, model, threshold):
    source, out = tmp_path / "source", tmp_path / "dups.parquet"
    copies = [{"file_name": f"copy {i}.jpg", "text": "again"} for i in range(5)]
    pictures(source, 30, lines=[*copies, {"file_name": "none.png", "text": "a"}])
    for i in range(5):  # the same pictures, larger and as JPEG
        with Image.open(source / f"{i}.png") as image:
            if model == "pixels":  # and paler: their means do not count
                image = image.point(lambda value: value // 2 + 60)
            image.resize([2 * n for n in image.size]).save(source / f"copy {i}.jpg", quality=95)
    model = vit(tmp_path / "vit") if model is vit else model
    found = table(dedup, source, out, "--model", model, "--threshold", threshold)
    assert found["row"] == list(range(35))  # the picture that is missing has no place here
    assert found["drop"] == [False] * 30 + [True] * 5
    assert found["repeats"] == [None] * 30 + list(range(5))
    assert all(threshold <= cosine <= 1.001 for cosine in found["cosine"][30:])
    run(source, tmp_path / "data", "--with", out)
    assert sorted(captions(tmp_path / "data")) == list(range(30))


def test_duplicates_against_a_naive_search(monkeypatch):
    monkeypatch.setattr(dedup, "BLOCK", 600)
    vectors = normalize(torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    found, cosines, kept = {}, (vectors @ vectors.T).numpy(), []
    for i, row in enumerate(cosines):
        near = [j for j in kept if row[j] >= 0.999 - 1e-5]
        if near:
            found[i] = near[0], pytest.approx(row[near[0]], abs=1e-5)
        else:
            kept.append(i)
    assert dedup.duplicates(vectors, 0.999) == found and 100 < len(found) < 2400


def test_a_picture_that_has_changed_since_is_not_dropped_as_a_copy(tmp_path):
    source, out = tmp_path / "source", tmp_path / "dups.parquet"
    pictures(source, 6, lines=[{"file_name": "copy.png", "text": "again"}])
    shutil.copy(source / "0.png", source / "copy.png")
    table(dedup, source, out)
    size = (source / "copy.png").stat().st_size  # another picture, no copy, as many bytes
    Image.new("RGB", (20, 20), "red").save(source / "copy.png")
    with open(source / "copy.png", "ab") as file:
        file.write(bytes(size - file.tell()))
    run(source, tmp_path / "data", "--with", out, "--bad-limit", 1)
    entries = [json.loads(file.read_text()) for file in (tmp_path / "data").glob("chunks/*.json")]
    (bad,) = [row for entry in entries for row in entry["left_out"]]
    assert bad["name"] == "copy.png" and "has changed since --with was made" in bad["reason"]


def test_copies_are_found_to_the_last_and_pictures_of_one_colour(tmp_path):
    """Also where rounding gives a cosine below 1; white is a copy of white, not of grey."""
    for i in range(30):
        picture(i).save(tmp_path / f"{i:02}.png")
        shutil.copy(tmp_path / f"{i:02}.png", tmp_path / f"{i:02} copy.png")
    for i, grey in enumerate((255, 255, 128, 0, 0)):
        Image.new("RGB", (20, 20), (grey,) * 3).save(tmp_path / f"one {i}.png")
    found = table(dedup, tmp_path, tmp_path / "out.parquet", "--threshold", 1)
    assert sum(found["drop"]) == 30 + 2 and found["drop"][-5:] == [False, True, False, False, True]


def test_a_source_without_pictures_says_so(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no")
    said = refused(dedup.main, capsys, tmp_path, "--out", tmp_path / "out.parquet")
    assert "has no image that can be read" in said


# --- recaption -----------------------------------------------------------------------------------


def blip(folder):
    words = word_tokenizer("red", "blue", "ring", "square")
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=SIDE), words)
    text = LAYER | {"vocab_size": 7, "encoder_hidden_size": 16, "bos_token_id": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=SIGHT)
    return saved(folder, transformers.BlipForConditionalGeneration, config, processor)


def llava(folder):
    """A chat model."""
    words = ["<image>", "USER", "Which", "red", "blue", "ring", "square"]
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=SIDE, crop_size=SIDE),
        word_tokenizer(*words, additional_special_tokens=["<image>"]),
        patch_size=8,
        chat_template="USER <image> {{ messages[0]['content'][1]['text'] }}",
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIGHT),
        text_config=transformers.LlamaConfig(**LAYER, vocab_size=10),
        image_token_index=3,
    )
    return saved(folder, transformers.LlavaForConditionalGeneration, config, processor)


@pytest.mark.parametrize("model", [blip, llava])
def test_recaptions_become_a_column(tmp_path, model):
    source, out = pictures(tmp_path / "source", 6), tmp_path / "r.parquet"
    asked = ["--ask", "Which"] if model is llava else []
    found = table(recaption, source, out, "--model", model(tmp_path / "model"), *asked)
    assert found["row"] == list(range(6)) and any(found["recaption"])
    assert "USER" not in " ".join(found["recaption"])  # the question is cut off
    run(source, tmp_path / "data", "--with", out, "--caption", "text", "--caption", "recaption")
    known = enumerate(found["recaption"])
    assert captions(tmp_path / "data") == {i: [f"number {i}", said or None] for i, said in known}


def silent(folder, monkeypatch):
    monkeypatch.setattr(recaption.Captioner, "__call__", lambda self, images: [""] * len(images))
    return blip(folder)


def ill(folder, monkeypatch):
    """Its processor makes other pictures than its network takes."""
    for file in blip(folder).glob("*processor_config.json"):
        file.write_text(re.sub(r"(height|width)\": \d+", r'\1": 40', file.read_text()))
    return folder


def alone(folder, monkeypatch):
    return blip(folder)


@pytest.mark.parametrize(
    "model, how, reason",
    [
        (silent, [], "wrote no caption for 3 images"),
        (alone, ["--ask", "Which"], "is no chat model and cannot be asked: drop --ask"),
        (ill, [], "could not be used"),
    ],
)
def test_a_captioner_that_cannot_be_used_says_so(tmp_path, capsys, monkeypatch, model, how, reason):
    folder, out = model(tmp_path / "model", monkeypatch), tmp_path / "r.parquet"
    how = [pictures(tmp_path / "source", 3), "--out", out, "--model", folder, *how]
    said = refused(recaption.main, capsys, *how)
    assert f"--model {folder} {reason}" in said and not out.exists()
