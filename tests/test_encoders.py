"""encoders.py: frozen word vectors, how features are stored, a tiny T5 and a tiny VAE made here."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import close
from safetensors.torch import load_file, save_file

from inputs import encoders
from inputs.encoders import (
    VAE,
    HashText,
    Pixels,
    TextFormat,
    files_check,
    image_encoder,
    text_encoder,
)

# --- text ----------------------------------------------------------------------------------------


def test_words_are_one_hot_and_the_empty_one_is_the_last():
    text = text_encoder("words", 16, words=["cat", "dog"])
    assert torch.equal(text(["dog", "", "cat"]), torch.eye(3)[[1, 2, 0], None])


@pytest.mark.parametrize("n", [4, 5])
def test_hashed_words_hear_their_neighbours(n):
    """The docstring's formula, word by word; case, commas and what is too long do not count."""
    text, words = HashText(32, 5), ["a", "blue", "square", "below", "nine"][:n]
    again = ", ".join(words).upper() + " and more" * (n == 5)
    features = text([" ".join(words), "", again])
    assert not features[1].any() and not features[0, n:].any()
    assert torch.equal(features[0], features[2])
    for i in range(n):
        expected = text.vector(words[i]) + text.positions[i]
        for j, word in enumerate(words):
            if 1 <= abs(j - i) <= 3:
                expected = expected + 0.5 ** abs(j - i) * text.vector(word).roll(7 * (i - j))
        close(features[0, i], expected)


def test_word_vectors_and_positions_are_frozen_and_apart():
    text, words = HashText(64), ["red", "green", "circle", "square", "two", "three", "a", "of"]
    vectors = torch.stack([text.vector(word) for word in words])
    assert vectors[0, 1].item() == pytest.approx(-0.1033, abs=1e-4)  # on every machine
    for x, least in ((vectors, 0.9), (text.positions, 0.1)):
        assert torch.pdist(x).min() > least


@pytest.mark.parametrize("bits, reach", [(16, 9), (8, 0.25), (8, 0.4)])
def test_features_are_stored_without_padding(bits, reach):
    """fp16, or 8 bits: values beyond ±reach are clipped, the others at most half a step apart."""
    form = TextFormat(tokens=6, dim=4, bits=bits, reach=reach)
    features = torch.rand(3, 6, 4) - 0.5
    for row, length in zip(features, (6, 0, 3), strict=True):
        row[length:] = 0
    features[2, 1] = 0  # a zero row inside is no padding
    blobs = [form.pack(row) for row in features]
    assert [len(blob) for blob in blobs] == [n * 4 * bits // 8 for n in (6, 0, 3)]
    found = form.expand(form.join(blobs))
    error = 1e-3 if bits == 16 else reach / 255
    expected = features.clip(-reach, reach)
    assert found.dtype == torch.float32
    close(found, expected, atol=1.01 * error, rtol=0)
    assert not found[1].any() and not found[2, 3:].any()


@pytest.mark.parametrize(
    "bits, features, message",
    [
        (16, torch.full((2, 3), 1e5), "not finite in 16 bits"),
        (16, torch.full((2, 3), float("nan")), "not finite in 16 bits"),
        (8, torch.full((2, 3), float("inf")), "not finite in 8 bits"),
        (8, torch.ones(5, 3), "5 tokens of text, must be at most 4"),
    ],
)
def test_features_that_cannot_be_stored(bits, features, message):
    with pytest.raises(ValueError, match=message):
        TextFormat(4, 3, bits).pack(features)


def tiny_t5(folder):
    """A random two-layer T5 with six words, saved; its folder as a string."""
    import tokenizers
    import transformers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "ring"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": 6, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    return str(folder)


def lacks(folder):
    """As an interrupted upload: transformers would fill the weight with random numbers."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def wordless(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def small(folder):
    import transformers

    model = transformers.T5EncoderModel.from_pretrained(folder)
    model.resize_token_embeddings(4)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lacks, "its files lack 1 weights, as encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        (nan, "its weights are not finite"),
        (wordless, "its tokenizer knows no word: are the tokenizer's files missing?"),
        (small, "its tokenizer has a word 5, more than its network knows"),
    ],
)
def test_a_t5_that_lacks_something_is_refused(tmp_path, harm, reason):
    """None of these is an error to transformers: captions would be noise, or all alike."""
    harm(Path(tiny_t5(tmp_path)))
    with pytest.raises(ValueError, match=re.escape(reason)):
        text_encoder(str(tmp_path), 7)


def test_a_vae_that_lacks_a_weight_is_refused(tmp_path):
    tiny_vae(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its files lack 1 weights, as decoder\.conv_in"):
        image_encoder(str(tmp_path))


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(tmp_path):
    """Else the features of a caption would depend on those beside it."""
    wanted = text_encoder(tiny_t5(tmp_path), 7)(["a red ring", "red"])
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    close(text_encoder(str(tmp_path), 7)(["a red ring", "red"]), wanted)


def test_another_part_of_a_models_file_is_seen(tmp_path):
    """As a LoRA merged into the middle of it."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5 * 2**20))
    found = {files_check(str(tmp_path), "vae"), files_check(str(tmp_path / "no"), "vae")}
    for place in (0, 2 * 2**20 + 9, 4 * 2**20 + 4095):
        with open(file, "r+b") as opened:
            opened.seek(place)
            opened.write(b"1")
        found.add(files_check(str(tmp_path), "vae"))
    file.rename(tmp_path / "model2.safetensors")
    assert len(found | {files_check(str(tmp_path), "vae")}) == 6 and "" in found


def test_t5_masks_padding_and_opens_pipelines(tmp_path):
    text = text_encoder(tiny_t5(tmp_path / "model"), 7)
    x = text(["a red ring", ""])
    assert x.shape == (2, 7, 16) and text.dim == 16 and text.length("a red ring") == 4
    assert x[0, :4].any(1).all() and not x[0, 4:].any()  # three words and the end mark
    assert x[1, :1].any() and not x[1, 1:].any()
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tmp_path / "model", tmp_path / "pipeline" / part)
    shorter = text_encoder(str(tmp_path / "pipeline"), 4)
    alone = shorter.expand(shorter.prepare(["a red ring"]))
    close(alone[0], x[0, :4], atol=1e-5)  # padding changes nothing


def test_t5_computes_no_more_tokens_than_the_longest_caption_has(tmp_path, monkeypatch):
    """And what it computes is what it would with all of the padding."""
    text = text_encoder(tiny_t5(tmp_path), 7)
    captions = ["a red ring", "red", "", "a ring a ring a ring a ring a ring"]
    every = {"padding": "max_length", "truncation": True, "max_length": 7, "return_tensors": "pt"}
    batch, seen, model = text.tokenizer(captions, **every), [], text.model
    expected = model(**batch)[0] * batch.attention_mask[..., None]
    monkeypatch.setattr(
        text, "model", lambda ids, **how: (seen.append(ids.shape[1]), model(ids, **how))[1]
    )
    for chosen, longest in ((slice(4), 7), (slice(3), 4), (slice(1, 3), 2)):  # the last one is cut
        close(text(captions[chosen]), expected[chosen])
        assert seen.pop() == longest


def test_t5_in_half_precision_is_near(tmp_path):
    folder = tiny_t5(tmp_path)
    half, full = (text_encoder(folder, 7, dtype=d) for d in (torch.bfloat16, torch.float32))
    assert half.model.dtype == torch.bfloat16 and full.model.dtype == torch.float32
    found, expected = half(["a red ring", ""]), full(["a red ring", ""])
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    close(found, expected, atol=0.05)


def tiny_vae(folder):
    """A random AutoencoderKL that halves the side, saved; its folder as a string."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    ).save_pretrained(folder)
    return str(folder)


def tiny_clip(folder):
    """A random CLIP that reads 12 letters and sees 16 pixels, saved; its folder as a string."""
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    ends = ["<|startoftext|>", "<|endoftext|>"]
    words = [*ends, *letters, *(f"{letter}</w>" for letter in letters)]
    layer = {"hidden_size": 16, "intermediate_size": 16}
    layer |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = layer | {"vocab_size": len(words), "max_position_embeddings": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sight = layer | {"image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=sight, projection_dim=6)
    tokenizer = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [])
    image = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # so that features differ from picture to picture
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    for part in (model, transformers.CLIPProcessor(image, tokenizer)):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: text_encoder("nowhere", 8), "--text-encoder nowhere could not be loaded"),
        (
            lambda: text_encoder("bert", 8),
            "loaded: it is a 'bert' model, must be t5 or umt5",
        ),
        (lambda: VAE("nowhere"), "--vae nowhere could not be loaded"),
        (lambda: text_encoder("cut", 8), "--text-encoder cut could not be loaded"),
        (
            lambda: encoders.pretrained("cut", "cpu", "--judge", "AutoModel"),
            "--judge cut could not be loaded",
        ),
        (
            lambda: encoders.pretrained("bert", "cpu", "--model", "AutoModelForCausalLM"),
            "--model bert could not be loaded",
        ),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_what_cannot_be_had_says_why(tmp_path, monkeypatch, call, message, installed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    if installed and "cut" in message:
        tiny_t5(tmp_path / "cut")
        file = tmp_path / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:2000])
    if not installed:
        message = r"needs \w+: pip install"
        for module in ("transformers", "diffusers"):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        call()


# --- images --------------------------------------------------------------------------------------


def test_pixels_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = Pixels().encode(images)
    close(x.flatten(), torch.linspace(-1, 1, 256))
    assert torch.equal(Pixels().decode(x), images)
    assert Pixels().decode(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_vae_latents_have_the_pipelines_scale(tmp_path):
    vae = encoders.image_encoder(tiny_vae(tmp_path / "pipeline" / "vae").removesuffix("vae"))
    assert (vae.factor, vae.channels) == (2, 4)
    vae.shift = 0.5  # as newer ones have
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    posterior, moments = vae.model.encode(images / 127.5 - 1).latent_dist, vae.moments(images)
    noise, mean = torch.randn(2, 4, 4, 6), posterior.mean
    drawn = mean + posterior.std * noise
    for given, vae_noise, expected in [
        (images, noise, drawn),
        (moments, noise, drawn),
        (moments, None, mean),
        (moments[:, :1], noise, mean),  # ready-made means: nothing to draw
    ]:
        close(vae.encode(given, vae_noise), (expected - 0.5) * 0.13025, atol=1e-5)
    decoded = vae.model.decode(drawn).sample
    close(vae.decode(vae.encode(images, noise)), encoders.to_bytes(decoded), atol=1)
    latents, seen, decode = torch.randn(9, 4, 4, 6), [], vae.model.decode
    whole = encoders.to_bytes(decode(latents / 0.13025 + 0.5).sample)
    vae.model.decode = lambda x: seen.append(len(x)) or decode(x)
    close(vae.decode(latents), whole, atol=1)  # few at a time: a layer of all would not fit
    assert sum(seen) == 9 and max(seen) <= 8
