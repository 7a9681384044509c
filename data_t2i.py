"""CHAPTER 2's DATA: captioned images → encoded → the same batches on any number of ranks.

    source    (picture uint8, caption) by index: `shapes` (drawn on the fly)
    encoders  text: `hash` or a Hugging Face T5 / UMT5;  image: `pixels` or an AutoencoderKL
    loader    for one rank: batch k from (seed, samples seen, rank, world size) alone

A run is an endless row of samples, numbered by their position. Which image stands there, its noise,
its time and whether its caption is dropped are functions of (seed, position) alone. So a run means
the same on one rank and on a hundred, before and after a resume: ranks only share the row out.

Shapes: B batch, T text tokens, E text features, (C, H, W) what the network sees of an image.
"""

import signal
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rf
from data_mnist import mix_seed, to_bytes, to_unit

GOLDEN = (5**0.5 - 1) / 2  # steps of this size cover the unit interval evenly, however many

# ------------------------------------------------------------------------------------------------
# Text encoders: captions → (B, T, E) fp32, rows beyond the caption zero
# ------------------------------------------------------------------------------------------------


class HashText:
    """Frozen random word vectors seeded by the word, an echo of their neighbours, and positions.

        h_i = w_i + Σ_d 2^−d (R^d w_{i−d} + R^−d w_{i+d}) + p_i,   d = 1, 2, 3

    w: length about 1; R: a fixed rotation (the vector rolled), so that what stands before and after
    a word can be told from it; p: sines. Any vocabulary, no download, the same on every machine.
    The echo is what a contextual encoder such as T5 adds: "square" knows that it is a blue one.
    The empty caption is all zeros.
    """

    name, in_workers = "hash", True
    REACH, ROLL = 3, 7  # words, features

    def __init__(self, dim: int = 128, tokens: int = 16):
        self.dim, self.tokens = dim, tokens
        self.vector = lru_cache(maxsize=100_000)(self._vector)
        frequencies = torch.exp(-np.log(1000) * torch.arange(dim // 2) / (dim // 2))
        angles = torch.arange(tokens)[:, None] * frequencies
        self.positions = torch.cat([angles.sin(), angles.cos()], dim=1) / dim**0.5  # (T, E)

    def _vector(self, word: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        return torch.randn(self.dim, generator=generator) / self.dim**0.5

    def __call__(self, captions: list[str]) -> Tensor:
        words = torch.zeros(len(captions), self.tokens, self.dim)
        there = torch.zeros(len(captions), self.tokens, 1)
        for row, mask, caption in zip(words, there, captions, strict=True):
            spelled = caption.lower().replace(",", " ").split()[: self.tokens]
            if spelled:
                row[: len(spelled)] = torch.stack([self.vector(word) for word in spelled])
                mask[: len(spelled)] = 1
        features = words + self.positions
        for d in range(1, min(self.REACH + 1, self.tokens)):
            features[:, d:] += 0.5**d * words[:, :-d].roll(d * self.ROLL, -1)
            features[:, :-d] += 0.5**d * words[:, d:].roll(-d * self.ROLL, -1)
        return features * there


def inside(name: str, part: str) -> dict:
    """from_pretrained's subfolder, if `name` is the folder of a whole pipeline."""
    return {"subfolder": part} if (Path(name) / part).is_dir() else {}


class HuggingFaceText:
    """The encoder of a T5 or UMT5 model, by hub name or local folder; padded rows are zeroed.

    The folder may be a whole pipeline's: then its text_encoder/ and tokenizer/ are taken.
    """

    in_workers = False  # too large to stand in every worker: the trainer encodes on the device

    def __init__(
        self,
        name: str,
        tokens: int = 256,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        try:
            from transformers import AutoConfig, AutoTokenizer, T5EncoderModel, UMT5EncoderModel
        except ImportError as error:
            raise ValueError(
                f"--text-encoder {name} needs transformers: pip install transformers sentencepiece"
            ) from error
        classes = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}
        try:
            encoder = inside(name, "text_encoder")
            kind = AutoConfig.from_pretrained(name, **encoder).model_type
            if kind not in classes:
                raise ValueError(f"--text-encoder {name} is a {kind!r} model, must be t5 or umt5")
            self.tokenizer = AutoTokenizer.from_pretrained(name, **inside(name, "tokenizer"))
            model = classes[kind].from_pretrained(name, **encoder, dtype=dtype)
            self.model = model.to(device).eval()
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--text-encoder {name} could not be loaded: {reason}") from error
        self.name, self.tokens, self.device = name, tokens, device
        self.dim = self.model.config.d_model

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.tokens,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        features = self.model(batch.input_ids, attention_mask=batch.attention_mask)[0].float()
        return features * batch.attention_mask[..., None]


def text_encoder(name: str, tokens: int, device: str | torch.device = "cpu"):
    """`hash`, or the name or folder of a T5 / UMT5; captions are cut or padded to `tokens`."""
    return HashText(tokens=tokens) if name == "hash" else HuggingFaceText(name, tokens, device)


# ------------------------------------------------------------------------------------------------
# Image encoders: (B, 3, H, W) uint8 ↔ what the network sees, (B, C, h, w) fp32
# ------------------------------------------------------------------------------------------------


class Pixels:
    """The image itself in [−1, 1]."""

    name, channels, factor, random = "pixels", 3, 1, False

    def encode(self, images: Tensor, grain: Tensor | None = None) -> Tensor:
        return to_unit(images)

    def decode(self, x: Tensor) -> Tensor:
        return to_bytes(x)


class VAE:
    """A diffusers AutoencoderKL, by hub name or local folder. Latents are scaled to about N(0, 1).

    An image has a distribution of latents, N(mean, variance): `grain` (B, C, h, w) ~ N(0, 1) picks
    one, another in every epoch; without grain it is the mean.
    """

    random = True

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(f"--vae {name} needs diffusers: pip install diffusers") from error
        try:
            model = AutoencoderKL.from_pretrained(name, **inside(name, "vae"))
            self.model = model.to(device).eval()
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--vae {name} could not be loaded: {reason}") from error
        config = self.model.config
        self.name, self.channels, self.device = name, config.latent_channels, device
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor, grain: Tensor | None = None) -> Tensor:
        posterior = self.model.encode(to_unit(images).to(self.device)).latent_dist
        z = posterior.mean if grain is None else posterior.mean + posterior.std * grain
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return to_bytes(self.model.decode(x.to(self.device) / self.scale + self.shift).sample)


def image_encoder(name: str, device: str | torch.device = "cpu"):
    """`pixels`, or the name or folder of an AutoencoderKL."""
    return Pixels() if name == "pixels" else VAE(name, device)


# ------------------------------------------------------------------------------------------------
# The loader
# ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the workers make; encode() turns it into what the flow takes."""

    images: Tensor  # (B, 3, H, W) uint8
    text: Tensor | list[str]  # (B, T, E) fp32, or captions still to be encoded; dropped ones empty
    t: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, h, w) fp32
    grain: Tensor | None  # (B, C, h, w) fp32, see VAE; None for pixels


def encode(batch: Batch, image, text, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ data (B, C, h, w), text (B, T, E), t (B,), noise (B, C, h, w), on the device, fp32."""
    features = text(batch.text) if isinstance(batch.text, list) else batch.text
    images, features, t, noise, grain = (
        x if x is None else x.to(device, non_blocking=True)
        for x in (batch.images, features, batch.t, batch.noise, batch.grain)
    )
    return image.encode(images, grain), features, t, noise


class Samples(Dataset):
    """The row of samples: positions → a Batch, each sample from (seed, position) alone."""

    def __init__(
        self, source, text, image=None, *, seed: int, dropout: float = 0.1,
        distribution: str = "logit_normal", shift: float = 1.0,
    ):  # fmt: skip
        self.source, self.seed, self.dropout = source, seed, dropout
        image = image or Pixels()
        self.text = text if text.in_workers else list  # captions travel as they are
        self.channels, self.factor, self.random = image.channels, image.factor, image.random
        self.distribution, self.shift = distribution, shift
        self.permutation = lru_cache(maxsize=2)(self._permutation)
        self.first_u = np.random.default_rng((seed, 1)).random()

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "epoch", epoch))
        return torch.randperm(len(self.source), generator=generator)

    def __getitems__(self, positions: list[int]) -> Batch:
        pictures, captions, noise, grain, generator = [], [], [], [], torch.Generator()
        for position in positions:
            epoch, place = divmod(position, len(self.source))
            picture, caption = self.source[int(self.permutation(epoch)[place])]
            generator.manual_seed(mix_seed(self.seed, "sample", position))
            dropped = torch.rand((), generator=generator).item() < self.dropout
            captions.append("" if dropped else caption)
            pictures.append(torch.from_numpy(picture))
            shape = (self.channels, *(side // self.factor for side in picture.shape[1:]))
            noise.append(torch.randn(shape, generator=generator))
            if self.random:
                grain.append(torch.randn(shape, generator=generator))
        # Neighbouring positions get times a golden step apart: every batch covers all of time
        # evenly, whichever rank it lies on (a stratified draw that needs no batch).
        u = (self.first_u + np.array(positions, float) * GOLDEN) % 1
        t = rf.time_at(torch.tensor(u, dtype=torch.float32), self.distribution, self.shift)
        grain = torch.stack(grain) if self.random else None
        return Batch(torch.stack(pictures), self.text(captions), t, torch.stack(noise), grain)


class RankPositions:
    """The positions of one rank's micro-batches, from `seen` on: an endless iterator of lists.

    A step takes world_size · accumulation · micro_batch positions in a row; ranks share them out.
    """

    def __init__(self, seen: int, micro_batch: int, rank: int, world_size: int):
        self.seen, self.micro_batch = seen, micro_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.seen + self.rank * self.micro_batch
        while True:
            yield list(range(first, first + self.micro_batch))
            first += self.world_size * self.micro_batch


def loader(
    samples: Samples, *, seen: int, micro_batch: int, rank: int, world_size: int, workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:  # fmt: skip
    """Endless micro-batches of one rank, made ahead by worker processes."""
    return iter(
        DataLoader(
            samples,
            batch_sampler=RankPositions(seen, micro_batch, rank, world_size),
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_trainer,
            persistent_workers=workers > 0,
        )
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals_to_the_trainer(worker: int):
    """Launchers signal the whole process tree: the trainer still needs batches to end its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
