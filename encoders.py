"""ENCODERS: captions → text features, images ↔ what the network sees.

    text    hash: frozen word vectors, no download;  or a Hugging Face T5 / UMT5
    image   pixels: the image itself;                or a diffusers AutoencoderKL

Shapes: B batch, T text tokens, E features, (3, H, W) an image, (C, h, w) what the network sees.
"""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_mnist import to_bytes, to_unit

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

    name, kind, channels, factor, random = "pixels", "pixels", 3, 1, False

    def encode(self, images: Tensor, grain: Tensor | None = None) -> Tensor:
        return to_unit(images)

    def decode(self, x: Tensor) -> Tensor:
        return to_bytes(x)


class VAE:
    """A diffusers AutoencoderKL, by hub name or local folder. Latents are scaled to about N(0, 1).

    An image has a distribution of latents, N(mean, variance): `grain` (B, C, h, w) ~ N(0, 1) picks
    one, another in every epoch; without grain it is the mean. What `prepare` stored (moments) takes
    the image's place everywhere.
    """

    kind, random = "moments", True

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
    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 → (B, 2, C, h, w) fp32: mean and log-variance, not scaled."""
        posterior = self.model.encode(to_unit(images).to(self.device)).latent_dist
        return torch.stack([posterior.mean, posterior.logvar], dim=1)

    def encode(self, images: Tensor, grain: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) uint8, moments (B, 2, C, h, w), or means alone (B, 1, C, h, w)."""
        moments = self.moments(images) if images.dtype == torch.uint8 else images.float()
        mean, *logvar = moments.unbind(1)
        z = mean + (0.5 * logvar[0]).exp() * grain if logvar and grain is not None else mean
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return to_bytes(self.model.decode(x.to(self.device) / self.scale + self.shift).sample)


class Encoded:
    """Latents that came ready-made, the means of the VAE named; it is not loaded."""

    kind = "latents"

    def __init__(self, name: str, channels: int):
        try:
            from diffusers import AutoencoderKL

            config = AutoencoderKL.load_config(name, **inside(name, "vae"))
        except ImportError as error:
            raise ValueError(f"--vae {name} needs diffusers: pip install diffusers") from error
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--vae {name} could not be loaded: {reason}") from error
        if config["latent_channels"] != channels:
            raise ValueError(
                f"--latent-shape has {channels} channels, --vae {name} {config['latent_channels']}"
            )
        self.name, self.channels = name, channels
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)


def image_encoder(name: str, device: str | torch.device = "cpu"):
    """`pixels`, or the name or folder of an AutoencoderKL."""
    return Pixels() if name == "pixels" else VAE(name, device)


# ------------------------------------------------------------------------------------------------
# What `prepare` asks of images besides: (B, 3, H, W) uint8 → embeddings, or captions
# ------------------------------------------------------------------------------------------------


class PixelEmbedder:
    """Tiny pictures without their mean, (B, 192), unit length: finds copies, scaled or recoded."""

    SIDE = 8  # pixels

    def __call__(self, images: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), self.SIDE).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


def pretrained(model: str, device, option: str, kind: str, processor: str = "AutoProcessor"):
    """A transformers model of a kind (an Auto class), and its processor. ValueError in one line."""
    try:
        import transformers
    except ImportError as error:
        reason = f"{option} {model} needs transformers: pip install transformers"
        raise ValueError(reason) from error
    try:
        loaded = getattr(transformers, kind).from_pretrained(model)
        prepares = getattr(transformers, processor).from_pretrained(model)
    except (OSError, ValueError) as error:  # ValueError: a model of another kind
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{option} {model} could not be loaded: {reason}") from error
    return loaded.to(device).eval(), prepares


class ModelEmbedder:
    """The image features of a CLIP, SigLIP or DINO model, unit length."""

    def __init__(self, model: str, device):
        self.device = device
        self.model, self.processor = pretrained(model, device, "--dedup", "AutoModel")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        find = getattr(self.model, "get_image_features", self.model)
        found = find(pixel_values=pixels.to(self.device))
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state.mean(1) if pooled is None else pooled
        return torch.nn.functional.normalize(found.float(), dim=1).cpu()


class Captioner:
    """An image-to-text model, captions of at most 64 tokens. Chat models are asked to describe."""

    ASK = "Describe this image in one sentence."

    def __init__(self, model: str, device):
        self.device = device
        self.model, self.processor = pretrained(
            model, device, "--recaption", "AutoModelForImageTextToText"
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        options = {"images": list(images), "return_tensors": "pt"}
        chat = getattr(self.processor, "chat_template", None) is not None
        if chat:
            question = [{"type": "image"}, {"type": "text", "text": self.ASK}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )
            self.processor.tokenizer.padding_side = "left"
            options |= {"text": [prompt] * len(images), "padding": True}
        inputs = self.processor(**options).to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=64, do_sample=False)
        if chat:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [s.strip() for s in self.processor.batch_decode(tokens, skip_special_tokens=True)]
