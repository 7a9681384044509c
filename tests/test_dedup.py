"""tools/dedup.py and tools/recaption.py: what they write, and what prepare makes of it."""

import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from test_prepare import SIZES, captions, pictures, run
from torch.nn.functional import normalize

from tools import dedup, recaption


def table(tool, source, out, *extra):
    """The command → the columns of the file that it writes."""
    tool.main([str(source), "--out", str(out), "--workers", "2", "--batch", "4", *map(str, extra)])
    return pyarrow.parquet.read_table(out).to_pydict()


def vit(folder):
    """A random image model of one layer, saved; its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["pixels", vit])
def test_near_duplicates_are_found_and_dropped(tmp_path, model):
    source, out = tmp_path / "source", tmp_path / "dups.parquet"
    copies = [{"file_name": f"copy {i}.jpg", "text": "again"} for i in range(5)]
    pictures(source, 30, SIZES, [*copies, {"file_name": "none.png", "text": "a"}])
    for i in range(5):  # the same pictures, larger and as JPEG
        with Image.open(source / f"{i}.png") as image:
            image.resize([2 * n for n in image.size]).save(source / f"copy {i}.jpg", quality=95)
    if model is vit:
        model, threshold = vit(tmp_path / "vit"), 0.99999
    else:
        threshold = 0.99
    found = table(dedup, source, out, "--model", model, "--threshold", threshold)
    assert found["row"] == list(range(35))  # the picture that is missing has no place here
    assert found["drop"] == [False] * 30 + [True] * 5
    assert found["repeats"] == [None] * 30 + list(range(5))
    assert all(threshold <= cosine <= 1.001 for cosine in found["cosine"][30:])
    rows = run(source, tmp_path / "data", "--with", out)["rows"]
    assert (rows["train"] + rows["validation"], rows["dropped"], rows["bad"]) == (30, 5, 1)
    assert sorted(captions(tmp_path / "data")) == list(range(30))


def test_duplicates_against_a_naive_search(monkeypatch):
    monkeypatch.setattr(dedup, "BLOCK", 600)
    vectors = normalize(torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    found, cosines, kept = dedup.duplicates(vectors, 0.999), (vectors @ vectors.T).numpy(), []
    for i in range(len(vectors)):
        near = [j for j in kept if cosines[i, j] >= 0.999]
        if near:
            assert found[i] == (near[0], pytest.approx(cosines[i, near[0]], abs=1e-5))
        else:
            assert i not in found
            kept.append(i)
    assert 100 < len(found) < 2400


def test_pixel_embeddings_do_not_see_brightness():
    picture = np.random.default_rng(0).integers(60, 120, (32, 32, 3), dtype=np.uint8)
    dark, light = dedup.pixels([Image.fromarray(picture), Image.fromarray(picture + 40)])
    assert dark.shape == (192,) and torch.allclose(dark, light, atol=1.5)  # bytes are rounded


# --- recaption -----------------------------------------------------------------------------------


def blip(folder):
    """A random BLIP of one layer whose every word is one of six, saved; its folder."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "red", "blue", "ring", "square", "a", "on"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    image = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(image, tokenizer).save_pretrained(folder)
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    both |= {"num_attention_heads": 2, "projection_dim": 16}
    ids = {"bos_token_id": 4, "eos_token_id": 1, "pad_token_id": 0, "sep_token_id": 1}
    text = both | ids | {"vocab_size": len(words), "encoder_hidden_size": 16}
    vision = both | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


def llava(folder):
    """A random chat model of one layer, saved; its folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "<image>", "USER", "Which", "red", "blue", "ring", "square"]
    words = {word: i for i, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": 16, "width": 16}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=side, crop_size=side),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="USER <image> {{ messages[0]['content'][1]['text'] }}",
    ).save_pretrained(folder)
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2, "projection_dim": 16}
    vision = transformers.CLIPVisionConfig(**both, image_size=16, patch_size=8)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    text = transformers.LlamaConfig(**both, **ids, vocab_size=len(words))
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", [blip, llava])
def test_recaptions_become_a_column(tmp_path, model):
    source, out = pictures(tmp_path / "source", 6), tmp_path / "r.parquet"
    found = table(recaption, source, out, "--model", model(tmp_path / "model"), "--ask", "Which")
    assert found["row"] == list(range(6)) and any(found["recaption"])
    assert not any("USER" in said for said in found["recaption"])  # the question is cut off
    extra = ["--with", out, "--caption", "text", "--caption", "recaption:2"]
    columns = run(source, tmp_path / "data", *extra)["captions"]
    assert columns == [{"column": "text", "weight": 1.0}, {"column": "recaption", "weight": 2.0}]
    assert captions(tmp_path / "data") == {
        i: [f"number {i}", found["recaption"][i] or None] for i in range(6)
    }


@pytest.mark.parametrize("tool", [dedup, recaption])
def test_what_is_missing_says_so(tmp_path, monkeypatch, capsys, tool):
    source, out = tmp_path / "source", tmp_path / "out.parquet"
    source.mkdir()
    (source / "broken.png").write_bytes(b"no")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setitem(sys.modules, "transformers", None)
        table(tool, source, out, "--model", "name")
    assert "--model name needs transformers: pip install transformers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table(dedup, source, out)
    assert "has no image that can be read" in capsys.readouterr().err and not out.exists()
