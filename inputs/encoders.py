"""ENCODERS: captions → text features, images ↔ what the network sees.

    text    words: one of a few class names;  hash: frozen word vectors, no download;
            or a Hugging Face T5 / UMT5
    image   pixels: the image itself;         or a diffusers AutoencoderKL

Every text encoder makes features in two steps, because they happen in different places:
    stored = text.prepare(captions)     in the loader's workers: the cheap part
    text.expand(stored, device)         on the device: → (B, T, E) fp32

Both kinds of encoder are frozen: the network learns to use their features, not to change them. A
text encoder has read far more text than any set of captions holds. A VAE makes an image of
512 x 512 x 3 values one of 64 x 64 x 4: fine texture goes, which the network would otherwise spend
most of its weights on (latent diffusion, 2112.10752).

Shapes: B batch, T text tokens, E features, (3, H, W) an image, (C, h, w) what the network sees.
"""

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.settings import Checked, Count, Positive, rule
from common.start import line_of

# ------------------------------------------------------------------------------------------------
# Pixels ↔ numbers
# ------------------------------------------------------------------------------------------------


def to_unit(images: Tensor) -> Tensor:
    """uint8 in 0..255 → fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """float in [−1, 1] (clamped) → uint8 in 0..255: the inverse of to_unit."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Text features as they are stored: without padding, in 16 or 8 bits
# ------------------------------------------------------------------------------------------------


class Ragged(NamedTuple):
    """The features of B captions without their padding: what travels to the device."""

    values: Tensor  # (ΣL, E) as stored, fp16 or uint8
    place: Tensor  # (ΣL,) int64: caption · T + token
    captions: int  # B


@dataclass(frozen=True)
class TextFormat(Checked):
    """How text features (length, E) are stored. bits: 16 (fp16), or 8 as LavenderFlow keeps them:
    byte = round((x / 2r + ½) · 255), values beyond ±r (reach) clipped.
    """

    tokens: Count
    dim: Count
    bits: Annotated[int, rule(choices=(8, 16))] = 16
    reach: Positive = 0.25

    def pack(self, features: Tensor) -> bytes:
        """(T, E) fp32, zero rows at the end → bytes without them. ValueError if it does not fit."""
        if len(features) > self.tokens:
            raise ValueError(f"{len(features)} tokens of text, must be at most {self.tokens}")
        if not (features.half() if self.bits == 16 else features).isfinite().all():
            raise ValueError(
                f"text features are not finite in {self.bits} bits: take another --text-encoder, or"
                " --text-bits 8 with a --text-reach that covers them"
            )
        words = features.any(dim=1).nonzero()
        x = features[: words[-1].item() + 1 if len(words) else 0].float().cpu().numpy()
        if self.bits == 16:
            return x.astype(np.float16).tobytes()
        scaled = (x.clip(-self.reach, self.reach) / (2 * self.reach) + 0.5) * 255
        return scaled.round().astype(np.uint8).tobytes()

    def join(self, blobs: Sequence) -> Ragged:
        """What pack gave for each of B captions → one Ragged."""
        dtype = np.float16 if self.bits == 16 else np.uint8
        stored = [np.frombuffer(blob, dtype).reshape(-1, self.dim) for blob in blobs]
        first = range(0, len(stored) * self.tokens, self.tokens)
        place = [np.arange(k, k + len(x)) for k, x in zip(first, stored, strict=True)]
        values, place = (torch.from_numpy(np.concatenate(x)) for x in (stored, place))
        return Ragged(values, place, len(stored))

    def expand(self, stored: Ragged, device="cpu") -> Tensor:
        """→ (B, T, E) fp32 on the device, zero beyond each caption's end."""
        place = stored.place.to(device, non_blocking=True)
        values = stored.values.to(device, non_blocking=True).float()
        if self.bits == 8:
            values = (values / 255 - 0.5) * (2 * self.reach)
        flat = values.new_zeros(stored.captions * self.tokens, self.dim)
        flat.index_copy_(0, place, values)
        return flat.view(stored.captions, self.tokens, self.dim)


# ------------------------------------------------------------------------------------------------
# Text encoders: captions → (B, T, E) fp32, rows beyond the caption zero
# ------------------------------------------------------------------------------------------------


class Words:
    """One word out of a few, one-hot: all that digits need. The last class is the empty caption.

    A class is a caption of one token, so chapter 1 trains the same network as chapter 2.
    """

    name, in_workers, tokens, files = "words", True, 1, ""

    def __init__(self, words: list[str]):
        self.words, self.dim = list(words), len(words) + 1

    def prepare(self, captions: list[str]) -> Tensor:
        """→ labels (B,) int64."""
        number = {word: k for k, word in enumerate(self.words)} | {"": len(self.words)}
        for caption in captions:
            if caption not in number:
                known = ", ".join(self.words[:20])
                raise ValueError(f"{caption!r} is no word of this model; it knows: {known}")
        return torch.tensor([number[caption] for caption in captions])

    def expand(self, labels: Tensor, device="cpu") -> Tensor:
        """labels (B,) int64 → (B, 1, words + 1)."""
        labels = labels.to(device, non_blocking=True)
        return (labels[:, None] == torch.arange(self.dim, device=device)).float()[:, None]

    def length(self, caption: str) -> int:
        """Tokens of the whole caption; those beyond `tokens` are not read."""
        return 1

    def __call__(self, captions: list[str]) -> Tensor:
        return self.expand(self.prepare(captions))


class HashText:
    """Frozen random word vectors seeded by the word, an echo of their neighbours, and positions.

        h_i = w_i + Σ_d 2^−d (R^d w_{i−d} + R^−d w_{i+d}) + p_i,   d = 1, 2, 3

    w: length about 1; R: a fixed rotation (the vector rolled), so that what stands before and after
    a word can be told from it; p: sines. Any vocabulary, no download, the same on every machine.
    The echo is what a contextual encoder such as T5 adds: "square" knows that it is a blue one.
    The empty caption is all zeros.
    """

    name, in_workers, files = "hash", True, ""
    REACH, ROLL = 3, 7  # words, features

    def __init__(self, dim: int = 128, tokens: int = 16):
        self.dim, self.tokens = dim, tokens
        self.vectors: dict[str, Tensor] = {}
        frequencies = torch.exp(-np.log(1000) * torch.arange(dim // 2) / (dim // 2))
        angles = torch.arange(tokens)[:, None] * frequencies
        self.positions = torch.cat([angles.sin(), angles.cos()], dim=1) / dim**0.5  # (T, E)

    def vector(self, word: str) -> Tensor:
        if word not in self.vectors:
            generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            self.vectors[word] = torch.randn(self.dim, generator=generator) / self.dim**0.5
        return self.vectors[word]

    def spelled(self, caption: str) -> list[str]:
        return re.sub("[,:]", " ", caption.lower()).split()

    def length(self, caption: str) -> int:
        return len(self.spelled(caption))

    def __call__(self, captions: list[str]) -> Tensor:
        words = torch.zeros(len(captions), self.tokens, self.dim)
        mask = torch.zeros(len(captions), self.tokens, 1)
        for row, used, caption in zip(words, mask, captions, strict=True):
            spelled = self.spelled(caption)[: self.tokens]
            if spelled:
                row[: len(spelled)] = torch.stack([self.vector(word) for word in spelled])
                used[: len(spelled)] = 1
        features = words + self.positions
        for d in range(1, min(self.REACH + 1, self.tokens)):
            features[:, d:] += 0.5**d * words[:, :-d].roll(d * self.ROLL, -1)
            features[:, :-d] += 0.5**d * words[:, d:].roll(-d * self.ROLL, -1)
        return features * mask

    prepare = __call__

    def expand(self, features: Tensor, device="cpu") -> Tensor:
        return features.to(device, non_blocking=True)


def same_models(made: Sequence[str], *encoders):
    """ValueError if an encoder's files are not those (files_check) that a run or a folder knew."""
    for check, encoder in zip(made, encoders, strict=True):
        if check and check != getattr(encoder, "files", check):
            raise ValueError(
                f"{encoder.name} holds another model than before: put back the one that the run or"
                " the data was made with"
            )


PARTS = ("text_encoder", "tokenizer")  # in the folder of a whole pipeline


def inside(name: str, part: str) -> dict:
    """from_pretrained's subfolder, if `name` is the folder of a whole pipeline."""
    return {"subfolder": part} if (Path(name) / part).is_dir() else {}


def whole_model(kind, name: str, **how):
    """kind.from_pretrained(name, **how), where all of its weights are in its files, and finite.

    transformers fills a weight that is missing with random numbers: others in each process.
    """
    model, info = kind.from_pretrained(name, output_loading_info=True, **how)
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise ValueError(f"its files lack {len(lacking)} weights, as {lacking[0]}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError("its weights are not finite")
    return model


def knows_words(tokenizer):
    """ValueError if it is empty: transformers makes one without a word if its files are missing."""
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) < 2:
        raise ValueError("its tokenizer knows no word: are the tokenizer's files missing?")


def files_check(name: str, *parts: str) -> str:
    """Eight hexadecimal digits of a local model's files, "" for a model of the hub.

    A folder may hold another model by now, under the same name. Of each file: its name, its size,
    and 4 KiB of each MiB, where other weights differ.
    """
    check, folders = 0, [Path(name, part) for part in parts if Path(name, part).is_dir()]
    for file in sorted(f for folder in folders or [Path(name)] for f in folder.glob("[!.]*")):
        if file.is_file():
            with open(file, "rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                for place in range(0, size, 2**20):
                    opened.seek(place)
                    check = zlib.crc32(opened.read(2**12), check)
            check = zlib.crc32(f"{file.name} {size}".encode(), check)
    return f"{check:08x}" if check else ""


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
            encoder = inside(name, PARTS[0])
            kind = AutoConfig.from_pretrained(name, **encoder).model_type
            if kind not in classes:
                raise ValueError(f"it is a {kind!r} model, must be t5 or umt5")
            self.tokenizer = AutoTokenizer.from_pretrained(
                name, **inside(name, PARTS[1]), padding_side="right"
            )
            knows_words(self.tokenizer)
            self.model = whole_model(classes[kind], name, **encoder, dtype=dtype).to(device).eval()
            self.name, self.tokens, self.device = name, tokens, device
            if not self.length(""):
                raise ValueError("its tokenizer adds no sign at the end of a text")
            last = max(self.tokenizer.get_vocab().values())
            if last >= self.model.config.vocab_size:
                raise ValueError(f"its tokenizer has a word {last}, more than its network knows")
        except Exception as error:  # of the hub, of files that are cut, of sizes that differ
            reason = line_of(error)
            raise ValueError(f"--text-encoder {name} could not be loaded: {reason}") from error
        self.dim, self.files = self.model.config.d_model, files_check(name, *PARTS)

    def length(self, caption: str) -> int:
        return len(self.tokenizer(caption, verbose=False).input_ids)

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        # Padded to the longest caption, not to T: the encoder computes padding like words, and most
        # captions are far shorter than T.
        batch = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        features = self.model(batch.input_ids, attention_mask=batch.attention_mask)[0].float()
        features = features * batch.attention_mask[..., None]
        return F.pad(features, (0, 0, 0, self.tokens - features.shape[1]))  # (B, T, E)

    def prepare(self, captions: list[str]) -> list[str]:
        return captions

    def expand(self, captions: list[str], device="cpu") -> Tensor:
        return self(captions).to(device)


def text_encoder(
    name: str,
    tokens: int,
    device: str | torch.device = "cpu",
    words=(),
    dtype: torch.dtype = torch.float32,
):
    """`words`, `hash`, or the name or folder of a T5 / UMT5 (in `dtype`); captions end after
    `tokens`."""
    if name == "words":
        if not words:
            raise ValueError(
                "--text-encoder words is for digits, whose captions are one word: drop it"
            )
        return Words(words)
    if name == "hash":
        return HashText(tokens=tokens)
    return HuggingFaceText(name, tokens, device, dtype)


# ------------------------------------------------------------------------------------------------
# Image encoders: (B, 3, H, W) uint8 ↔ what the network sees, (B, C, h, w) fp32
# ------------------------------------------------------------------------------------------------


class Pixels:
    """The image itself in [−1, 1], so that data and noise have about the same variance.

    channels: 3, or 1 for grey images.
    """

    name, kind, factor, random, files = "pixels", "pixels", 1, False, ""

    def __init__(self, channels: int = 3):
        self.channels = channels

    def encode(self, images: Tensor, vae_noise: Tensor | None = None) -> Tensor:
        return to_unit(images)

    def decode(self, x: Tensor) -> Tensor:
        return to_bytes(x)


class VAE:
    """A diffusers AutoencoderKL, by hub name or local folder. Latents are scaled to about N(0, 1).

    An image has a distribution of latents, N(mean, variance): `vae_noise` (B, C, h, w) ~ N(0, 1)
    picks one, another in every epoch; without it the mean is taken. What tools/prepare stored
    (moments) takes the image's place everywhere.
    """

    kind, random = "moments", True

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ValueError(f"--vae {name} needs diffusers: pip install diffusers") from error
        try:
            model = whole_model(AutoencoderKL, name, **inside(name, "vae"))
            self.model = model.to(device).eval()
        except Exception as error:
            reason = line_of(error)
            raise ValueError(f"--vae {name} could not be loaded: {reason}") from error
        config = self.model.config
        self.name, self.channels, self.device = name, config.latent_channels, device
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.files = files_check(name, "vae")
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 → (B, 2, C, h, w) fp32: mean and log-variance, not scaled."""
        posterior = self.model.encode(to_unit(images).to(self.device)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1)

    def encode(self, images: Tensor, vae_noise: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) uint8, moments (B, 2, C, h, w), or means alone (B, 1, C, h, w)."""
        moments = self.moments(images) if images.dtype == torch.uint8 else images.float()
        mean, *logvar = moments.unbind(1)
        z = mean + (0.5 * logvar[0]).exp() * vae_noise if logvar and vae_noise is not None else mean
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        x = x.to(self.device) / self.scale + self.shift
        parts = x.split(8)  # of 128 large pictures at once, one layer would fill a GPU
        return torch.cat([to_bytes(self.model.decode(part).sample) for part in parts])


def image_encoder(name: str, device: str | torch.device = "cpu", channels: int = 3):
    """`pixels`, or the name or folder of an AutoencoderKL."""
    return Pixels(channels) if name == "pixels" else VAE(name, device)


# ------------------------------------------------------------------------------------------------
# Other models of transformers, for the tools
# ------------------------------------------------------------------------------------------------


def pretrained(model: str, device, option: str, kind: str, processor="AutoProcessor", **how):
    """A transformers model of a kind (an Auto class), and its processor. ValueError in one line.

    how: of from_pretrained, for the model.
    """
    try:
        import transformers
    except ImportError as error:
        reason = f"{option} {model} needs transformers: pip install transformers"
        raise ValueError(reason) from error
    try:
        loaded = whole_model(getattr(transformers, kind), model, **how)
        prepares = getattr(transformers, processor).from_pretrained(model)
        tokenizer = getattr(prepares, "tokenizer", prepares)
        if hasattr(tokenizer, "get_vocab"):  # and not a processor of images alone
            knows_words(tokenizer)
    except Exception as error:  # a ValueError if it is a model of another kind
        reason = line_of(error)
        raise ValueError(f"{option} {model} could not be loaded: {reason}") from error
    return loaded.to(device).eval(), prepares
