"""encoders.py: frozen word vectors, a tiny T5 and a tiny VAE made here."""

import pytest
import torch

import encoders
from encoders import HashText, Pixels

# --- text ----------------------------------------------------------------------------------------


def test_hash_text_is_frozen_ordered_and_padded():
    a, b = HashText(64, 6), HashText(64, 6)
    captions = ["a red ring", "ring red a", "", "one two three four five six seven eight"]
    x = a(captions)
    assert x.shape == (4, 6, 64) and torch.equal(x, b(captions))
    assert torch.equal(x[0], a(["A red, ring"])[0])  # case and commas do not matter
    assert not x[2].any() and not x[0, 3:].any() and x[3].any(1).all()
    assert not torch.allclose(x[0, :3], x[1, :3].flip(0))


def test_hashed_words_hear_their_neighbours():
    """The formula of the docstring, word by word."""
    text = HashText(32, 5)
    words = ["a", "blue", "square", "below"]
    features = text([" ".join(words)])[0]
    for i in range(4):
        expected = text.vector(words[i]) + text.positions[i]
        for d in (1, 2, 3):
            if i - d >= 0:
                expected = expected + 0.5**d * text.vector(words[i - d]).roll(7 * d)
            if i + d < 4:
                expected = expected + 0.5**d * text.vector(words[i + d]).roll(-7 * d)
        assert torch.allclose(features[i], expected, atol=1e-6)
    assert not features[4].any()


def test_hashed_words_are_apart():
    text = HashText(64, 1)
    words = ["red", "green", "blue", "circle", "square", "star", "two", "three", "left", "a", "of"]
    v = torch.nn.functional.normalize(text(words)[:, 0] - text.positions[0], dim=1)
    assert (v @ v.T - torch.eye(len(words))).abs().max() < 0.55


def tiny_t5(folder):
    """A random two-layer T5 with six words, saved; its folder as a string."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "ring"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=6, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
    )
    torch.manual_seed(0)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return str(folder)


def test_transformers_text_encoder_masks_padding(tmp_path):
    tiny_t5(tmp_path)
    text = encoders.text_encoder(str(tmp_path), tokens=7)
    x = text(["a red ring", ""])
    assert x.shape == (2, 7, 16) and text.dim == 16
    assert x[0, :4].any(1).all() and not x[0, 4:].any()  # three words and the end mark
    assert x[1, :1].any() and not x[1, 1:].any()
    alone = encoders.text_encoder(str(tmp_path), tokens=4)(["a red ring"])
    assert torch.allclose(alone[0], x[0, :4], atol=1e-5)  # padding changes nothing


def test_a_text_encoder_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="could not be loaded"):
        encoders.text_encoder(str(tmp_path / "nothing"), 8)


def test_missing_libraries_name_the_pip_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        encoders.text_encoder("google/umt5-small", 8)
    with pytest.raises(ValueError, match="pip install diffusers"):
        encoders.VAE("somewhere")


# --- images --------------------------------------------------------------------------------------


def test_pixels_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(Pixels().decode(Pixels().encode(images)), images)


def tiny_vae(folder):
    """A random AutoencoderKL that halves the side, saved; its folder as a string."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.13025,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_vae_latents_have_the_pipelines_scale(tmp_path):
    vae = encoders.VAE(tiny_vae(tmp_path))
    assert (vae.factor, vae.channels, vae.scale) == (2, 4, 0.13025)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    posterior = vae.model.encode(images.float() / 127.5 - 1).latent_dist
    assert torch.allclose(vae.encode(images), posterior.mean * 0.13025, atol=1e-5)
    grain = torch.randn(2, 4, 4, 6)
    latents = vae.encode(images, grain)
    expected = (posterior.mean + posterior.std * grain) * 0.13025
    assert torch.allclose(latents, expected, atol=1e-5)
    assert vae.decode(latents).shape == (2, 3, 8, 12)
