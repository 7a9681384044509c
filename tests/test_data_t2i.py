"""data_t2i.py: encoders, and a loader whose samples depend on (seed, position) alone."""

from itertools import islice

import numpy as np
import pytest
import torch

import data_t2i
from data_t2i import HashText, Pixels, RankPositions, Samples, loader
from shapes import Shapes, World


class Numbered:
    """n pictures that hold their own number, captioned with it."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.full((3, 2, 2), i, np.uint8), f"number {i}"


def samples(n=11, seed=0, image=None, **kwargs):
    return Samples(Numbered(n), HashText(16, 4), image, seed=seed, **kwargs)


def numbers(batch):
    return batch.images[:, 0, 0, 0].tolist()


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
    text = data_t2i.text_encoder(str(tmp_path), tokens=7)
    x = text(["a red ring", ""])
    assert x.shape == (2, 7, 16) and text.dim == 16
    assert x[0, :4].any(1).all() and not x[0, 4:].any()  # three words and the end mark
    assert x[1, :1].any() and not x[1, 1:].any()
    alone = data_t2i.text_encoder(str(tmp_path), tokens=4)(["a red ring"])
    assert torch.allclose(alone[0], x[0, :4], atol=1e-5)  # padding changes nothing


def test_a_text_encoder_that_cannot_be_had_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="could not be loaded"):
        data_t2i.text_encoder(str(tmp_path / "nothing"), 8)


def test_missing_libraries_name_the_pip_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        data_t2i.text_encoder("google/umt5-small", 8)
    with pytest.raises(ValueError, match="pip install diffusers"):
        data_t2i.VAE("somewhere")


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
    vae = data_t2i.VAE(tiny_vae(tmp_path))
    assert (vae.factor, vae.channels, vae.scale) == (2, 4, 0.13025)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    posterior = vae.model.encode(images.float() / 127.5 - 1).latent_dist
    assert torch.allclose(vae.encode(images), posterior.mean * 0.13025, atol=1e-5)
    grain = torch.randn(2, 4, 4, 6)
    latents = vae.encode(images, grain)
    expected = (posterior.mean + posterior.std * grain) * 0.13025
    assert torch.allclose(latents, expected, atol=1e-5)
    assert vae.decode(latents).shape == (2, 3, 8, 12)


def test_the_loader_draws_noise_and_grain_of_the_latents_shape(tmp_path):
    vae = data_t2i.VAE(tiny_vae(tmp_path))
    batch = samples(image=vae).__getitems__([4, 9])
    assert batch.images.shape == (2, 3, 2, 2) and batch.noise.shape == (2, 4, 1, 1)
    assert batch.grain.shape == batch.noise.shape and not torch.equal(batch.grain, batch.noise)
    assert samples().__getitems__([4]).grain is None


def test_encode_hands_the_flow_what_it_takes():
    batch = samples().__getitems__([3, 5, 8])
    data, text, t, noise = data_t2i.encode(batch, Pixels(), HashText(16, 4), "cpu")
    assert torch.equal(data, Pixels().encode(batch.images)) and data.dtype == torch.float32
    later = batch._replace(text=["number 3", "number 5", ""])  # an encoder outside the workers
    assert torch.equal(
        data_t2i.encode(later, Pixels(), HashText(16, 4), "cpu")[1],
        HashText(16, 4)(["number 3", "number 5", ""]),
    )
    assert torch.equal(t, batch.t) and torch.equal(noise, batch.noise) and text.shape == (3, 4, 16)


# --- the loader ----------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_position_alone():
    whole = samples().__getitems__(list(range(30)))
    for positions in ([7], [29, 3, 7], list(range(10, 20))):
        part = samples().__getitems__(positions)
        for mine, all_of_it in zip(part[:4], whole[:4], strict=True):
            assert torch.equal(mine, all_of_it[positions])
    other = samples(seed=1).__getitems__(list(range(30)))
    assert not torch.equal(other.noise, whole.noise) and numbers(other) != numbers(whole)


def test_each_epoch_shows_every_image_once_and_no_noise_twice():
    batch = samples(n=11).__getitems__(list(range(33)))
    seen = numbers(batch)
    for epoch in range(3):
        assert sorted(seen[11 * epoch : 11 * epoch + 11]) == list(range(11))
    assert seen[:11] != seen[11:22]
    assert len({tuple(x.flatten().tolist()) for x in batch.noise}) == 33


@pytest.mark.parametrize("world_size, micro_batch", [(1, 8), (2, 4), (4, 2), (2, 2)])
def test_ranks_share_the_same_row_of_samples(world_size, micro_batch):
    """The same 24 positions, whatever the ranks and micro-batches, starting in the middle."""
    rounds = 24 // (world_size * micro_batch)
    taken = []
    for rank in range(world_size):
        taken += islice(RankPositions(5, micro_batch, rank, world_size), rounds)
    flat = [p for part in taken for p in part]
    assert len(flat) == 24 and sorted(flat) == list(range(5, 29))
    first = [next(iter(RankPositions(5, micro_batch, r, world_size))) for r in range(world_size)]
    assert sorted(p for part in first for p in part) == list(range(5, 5 + world_size * micro_batch))


def test_times_cover_the_distribution_evenly_in_every_batch():
    batch = samples(distribution="uniform").__getitems__(list(range(1000, 1064)))
    gaps = batch.t.sort().values.diff()
    assert gaps.max() < 3 / 64  # 64 independent draws would leave one about twice as wide
    shifted = samples(distribution="uniform", shift=3.0).__getitems__([1000])
    assert shifted.t[0] == pytest.approx((3 * batch.t[0] / (1 + 2 * batch.t[0])).item(), rel=1e-5)


def test_captions_are_dropped_at_the_rate():
    batch = samples(n=50, dropout=0.2).__getitems__(list(range(1000)))
    dropped = ~batch.text.flatten(1).any(1)
    assert abs(dropped.float().mean() - 0.2) < 0.04
    none = samples(n=50, dropout=0.0).__getitems__(list(range(200)))
    assert none.text.flatten(1).any(1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_resumes_in_the_row(workers):
    world = Samples(Shapes(World(24, places=24)), HashText(16, 16), seed=0)
    options = {"micro_batch": 3, "rank": 1, "world_size": 2, "workers": workers}
    whole = list(islice(loader(world, seen=0, pin_memory=False, **options), 5))
    resumed = list(
        islice(loader(world, seen=18, pin_memory=False, **options), 2)
    )  # after 3 steps of 2 x 3
    for a, b in zip(whole[3:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert whole[0].images.shape == (3, 3, 24, 24) and whole[0].images.dtype == torch.uint8
