"""THE NETWORK: AuraFlow's MMDiT, a transformer from (noisy image, time, text) to a velocity.

Start reading at MMDiT.forward: it is the picture below, line by line.

    image (B, C, H, W) --patchify--> image tokens (B, N, D)   + positions
    text  (B, T, E)    ------------> text tokens  (B, R+T, D)   R register tokens come first
    t     (B,)         --sinusoids, MLP--> cond (B, D)          shifts, scales and gates each block

    double blocks   text and image have weights of their own, attention sees both   (SD3's MMDiT)
    single blocks   text and image tokens use the same weights                      (DiT)
    norm (not in AuraFlow), modulate, linear, unpatchify --> velocity (B, C, H, W)

A few double blocks first, because text features and pixels differ most at the start. Then single
blocks, which have half the weights for the same work: AuraFlow found that most layers can be
single.

Text enters as a sequence only, and time as `cond` only. There is no attention mask: padded text
rows are zero, as in AuraFlow, and the network learns to ignore them. So all shapes are static.

Shapes: B batch, C channels, H x W image, p patch side, N = (H/p)(W/p) image tokens, T text tokens,
R registers, D width (dim), h heads, d = D/h head_dim, E text features, L tokens of a sequence.

dtype: the weights decide, fp32 or bf16. Under bf16 these stay fp32: t and the angles of
its sinusoids (bf16 rounds t = 0.999 to 1), the statistics of every norm, the running sums inside
attention and matrix products, and outside this file the loss, the optimizer's weights and moments,
and the averages (rf.py).

Sources: SD3 (Esser et al. 2024, arXiv 2403.03206) for the double block, DiT (Peebles & Xie 2022,
2212.09748) for adaLN-zero and the single block, AuraFlow (Fal 2024) for their mix and the muP
table, Tensor Programs V (Yang et al. 2022, 2203.03466) for muP.
Imports nothing of ours: the network does not know the flow.
"""

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------

RESIDUALS = ("prenorm", "auraflow")
PREDICTS = ("velocity", "image")


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a network. A bad value raises ValueError with field, value and rule."""

    in_channels: int = 4  # C: 4 for SDXL-VAE latents, 3 for RGB pixels, 1 for digits
    patch_size: int = 2  # p: a token is a p x p square; if C*p*p > dim, embedding it loses values
    dim: int = 3072  # D: the width
    head_dim: int = 256  # d: fixed while dim grows (muP), so heads = dim / head_dim
    n_layers: int = 36  # double and single blocks together
    n_double_layers: int = 4  # how many of them are double; they come first
    text_dim: int = 2048  # E: features per text token (2048: pile-T5-XL)
    max_grid: int = 64  # rows and columns of the position table; smaller grids use its centre
    n_registers: int = 8  # R: learned tokens in front of the text; 0 for none
    mlp_multiple_of: int = 256  # the MLP's hidden width is 8/3 dim rounded up to a multiple
    residual: str = "prenorm"  # "prenorm" or "auraflow", see Stream.update
    predicts: str = "velocity"  # what comes out of the last linear: "velocity" or "image"
    base_dim: int = 256  # the width at which muP's multipliers are 1

    def __post_init__(self):
        for field, value in asdict(self).items():
            if field not in ("residual", "predicts"):
                least = 0 if field in ("n_double_layers", "n_registers") else 1
                whole = type(value) is int and value >= least
                self._require(field, whole, f"must be a whole number, at least {least}")
        double_fits = 0 <= self.n_double_layers <= self.n_layers
        self._require("n_double_layers", double_fits, f"must lie in 0..n_layers={self.n_layers}")
        divides = self.dim % self.head_dim == 0
        self._require("head_dim", divides, f"must divide dim={self.dim}")
        divides = self.dim % 4 == 0
        self._require("dim", divides, "must be a multiple of 4 (sines of two axes)")
        whole_heads = self.base_dim % self.head_dim == 0
        rule = f"must be a multiple of head_dim={self.head_dim}, which muP keeps fixed"
        self._require("base_dim", whole_heads, rule)
        self._require("residual", self.residual in RESIDUALS, f"must be one of {RESIDUALS}")
        self._require("predicts", self.predicts in PREDICTS, f"must be one of {PREDICTS}")

    def _require(self, field: str, holds: bool, rule: str):
        if not holds:
            raise ValueError(f"MMDiTConfig.{field} = {getattr(self, field)!r} {rule}")

    @property
    def n_heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the SwiGLU: 8/3·dim. Its 3 matrices then cost as much as the 2 matrices
        of a plain MLP of hidden width 4·dim."""
        return math.ceil(int(8 * self.dim / 3) / self.mlp_multiple_of) * self.mlp_multiple_of

    @property
    def patch_values(self) -> int:
        return self.in_channels * self.patch_size**2


NEAR = 0.2  # see velocity_to

# base_dim is 256 throughout, so presets that differ only in width share one learning rate (muP).
# Channels, patch, text and grid follow the data: fitted() sets them.
PRESETS = {
    # Chapter 1: four layers, 16 large patches, no registers. The cost on a CPU grows with the
    # number of tokens.
    "digits": MMDiTConfig(
        in_channels=1, patch_size=7, dim=96, head_dim=32, n_layers=4, n_double_layers=0,
        text_dim=11, max_grid=4, n_registers=0, mlp_multiple_of=32, predicts="image",
    ),
    # Chapter 2: the same architecture, from a laptop to AuraFlow.
    "tiny": MMDiTConfig(
        in_channels=3, patch_size=4, dim=96, head_dim=32, n_layers=5, n_double_layers=1,
        text_dim=128, max_grid=5, n_registers=0, mlp_multiple_of=32,
    ),
    "small": MMDiTConfig(
        in_channels=3, dim=512, head_dim=64, n_layers=8, n_double_layers=2, text_dim=128,
        max_grid=16, n_registers=4, mlp_multiple_of=64,
    ),
    "0.2b": MMDiTConfig(dim=768, n_layers=16, n_double_layers=2),
    "1b": MMDiTConfig(dim=1536, n_layers=20, n_double_layers=3),
    "auraflow-6.8b": MMDiTConfig(residual="auraflow"),
}  # fmt: skip
PRESETS |= {f"{name}-wide": replace(PRESETS[name], dim=256) for name in ("digits", "tiny")}
PRESETS["tiny-image"] = replace(PRESETS["tiny"], predicts="image")  # for pictures of one's own
PRESETS["digits-narrow"] = replace(PRESETS["digits"], dim=64)  # half the parameters


def fitted(
    preset: str,
    *,
    channels: int,
    text_dim: int,
    sides: Sequence[tuple[int, int]],
    patch_size: int | None = None,
    residual: str | None = None,
) -> MMDiTConfig:
    """The preset's network, fitted to the data.

    sides: all (h, w) that it will see. patch_size: None takes the largest patch that divides them
    all and is no larger than the preset's. This choice never goes below 3, unless the preset's own
    patch is smaller: small patches give many tokens, and attention costs their square. residual:
    "auraflow" also sets AuraFlow's number of registers and rounding of the MLP, and predicts the
    velocity, so that the network can be exported (common/auraflow.py). Raises ValueError if no
    patch fits.
    """
    config = PRESETS[preset]
    patches = range(config.patch_size, min(3, config.patch_size) - 1, -1)
    for patch in [patch_size] if patch_size else patches:
        if not any(side % patch for size in sides for side in size):
            break
    else:
        sizes = ", ".join(f"{h}x{w}" for h, w in sides)
        wanted = patch_size or f"{patches[-1]} to {patches[0]}"
        raise ValueError(f"a patch of {wanted} must divide what the network sees, {sizes}")
    config = replace(
        config,
        in_channels=channels,
        text_dim=text_dim,
        patch_size=patch,
        max_grid=max(map(max, sides)) // patch,
        residual=residual or config.residual,
    )
    aura = {"n_registers": 8, "mlp_multiple_of": 256, "predicts": "velocity"}
    return replace(config, **aura) if config.residual == "auraflow" else config


# ------------------------------------------------------------------------------------------------
# muP: how initialisation, learning rate and weight decay follow the width
# ------------------------------------------------------------------------------------------------

# In the standard parametrisation the best learning rate falls as the network gets wider, and must
# be searched anew for each width. muP (Tensor Programs V) scales each matrix so that every
# activation changes by the same amount per step at every width. Then the rate that is best for a
# small network is best for a large one: search it at width 256, train at width 3072. Transfer is
# claimed over width, not over depth.
#
#     m = fan_in / (fan_in at base_dim)
#
# Adam moves every entry of a matrix by about the learning rate. An output is a sum of fan_in
# products, and Adam's moves are correlated with the inputs, so they add up: the output changes by
# lr·fan_in. Hence lr/m for a matrix whose fan_in grows. AdamW multiplies weight decay by the rate,
# so decay·m keeps the product the same at every width (CompleteP, 2505.01618). Inputs of a fixed
# size (patch values, sinusoids, text features) have m = 1. At the start weights and inputs are
# independent, so the sum grows only as √fan_in: the initial standard deviation is 1/√fan_in.
# The text's projection starts at zero, as in AuraFlow. Only weights that multiply an input
# decay. Biases and positions are added, and registers are tokens of their own, so they do not.
# The trainers move hidden matrices with Muon (common/muon.py), whose rule for the width takes the
# place of lr/m.
# `python mmdit.py --explain PRESET` prints the table; experiments/coordinate_check.py and
# experiments/lr_transfer.py measure it.


class Role(NamedTuple):
    """A parameter's row in muP's table (Tensor Programs V, Table 3)."""

    init: str  # "fan_in": N(0, 1/fan_in); "zero"; "own": biases zero, tables by name (init_weights)
    decays: bool  # whether weight decay applies


ROLES = {
    "hidden": Role(init="fan_in", decays=True),  # D or the MLP's width → any: lr/m, decay·m
    "modulation": Role(init="zero", decays=True),  # adaLN-zero: lr/m, decay·m
    "output": Role(init="zero", decays=True),  # D → patch: lr/m, decay·m
    "input": Role(init="fan_in", decays=True),  # patch → D, sinusoids → D: m = 1
    "text": Role(init="zero", decays=True),  # text features → D: m = 1
    "vector": Role(init="own", decays=False),  # biases, positions, registers: lr, no decay
}

# ------------------------------------------------------------------------------------------------
# Small parts
# ------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """y = x Wᵀ (+ b). `role` names the weight's row in muP's table (ROLES); biases are "vector".

    parts: how many matrices of equal size lie in the weight, one below the other; for Muon.
    """

    product = staticmethod(F.linear)  # common/cpu.py puts a faster one here on some CPUs

    def __init__(self, fan_in: int, fan_out: int, role: str, bias: bool = False, parts: int = 1):
        super().__init__(fan_in, fan_out, bias=bias)
        self.role, self.parts = role, parts

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)

    def reset_parameters(self):
        pass  # MMDiT.init_weights sets every weight once, by role


def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis, eps 1e-5; statistics in fp32, also for bf16.

    It has no learned scale and shift. Before attention and MLP, modulate supplies them from the
    time; the norms of q and k do without.
    """
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift: adaLN. x (B, L, D); shift, scale (B, 1, D).

    The time reaches the tokens this way: at t near 1 a block must find large forms in noise, near 0
    it must repair details, and shift and scale let the same weights do both. 1 + scale: a
    modulation that starts at zero changes nothing.
    """
    return torch.addcmul(shift, x, 1 + scale)  # product and sum in one kernel


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, N, C·p·p): one token a patch, row by row; its values are ordered by
    channel, row, column."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // patch, patch, W // patch, patch)  # (B, C, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)  # (B, N, C·p·p)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N, C·p·p) → (B, C, H, W): the inverse of patchify. (AuraFlow's last linear orders a patch
    by row, column, channel; common/auraflow.py reorders its weights.)"""
    B, h, w = tokens.shape[0], height // patch, width // patch
    x = tokens.view(B, h, w, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)  # (B, C, H/p, p, W/p, p)
    return x.reshape(B, -1, height, width)  # (B, C, H, W)


def sines_2d(grid: int, dim: int) -> Tensor:
    """(grid·grid, dim) fp32: half of the features tell the row, half the column (as in MAE).

    Attention itself does not know where a token lies. Frequencies fall from 1 almost to 1/grid²
    radians per row: sines of high frequency tell neighbours apart, those of low frequency change
    slowly and steadily over the grid.
    """
    frequencies = torch.exp(-math.log(grid**2) * torch.arange(dim // 4) / (dim // 4))  # (dim/4,)
    angles = torch.arange(grid)[:, None] * frequencies  # (grid, dim/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, dim)  # (grid, grid, dim), flat


def velocity_to(x: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The velocity at x_t that leads to this image: (x_t − data) / t, from data = x_t − t·v.

    A digit fills few of the 49 directions in a patch of 7 x 7. The velocity contains the noise,
    which fills all of them, and a narrow network must let it pass through. An image is easier to
    predict (JiT: Li & He 2025, 2511.13720). The loss is still that of the velocity. Near the data a
    division by t would enlarge every error, so from NEAR down t is held. There the network learns
    x_t − NEAR·v, which is the image with a little noise. In the dtype of `data`.
    """
    near, wide = t.clamp(min=NEAR)[:, None, None, None], torch.promote_types(x.dtype, torch.float32)
    return ((x.to(wide) - data.to(wide)) / near).to(data.dtype)


class SwiGLU(nn.Module):
    """(silu(x W₁) ⊙ x W₂) W₃: a gate multiplies each value (Shazeer 2020, 2002.05202).

    It reaches a lower loss than a plain MLP with as many weights; the paper finds this by
    experiment and gives no reason. W₁ and W₂ are one matrix: one large product is faster than two.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = Linear(dim, 2 * hidden, role="hidden", parts=2)  # rows: [gate; value]
        self.down = Linear(hidden, dim, role="hidden")

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)  # 2 of (B, L, hidden)
        return self.down(F.silu(gate) * value)


class TimeEmbedding(nn.Module):
    """t (B,) in [0, 1] → cond (B, D): 256 sinusoids of 1000·t (cosines first), Linear-SiLU-Linear.

    A network that gets t as one number cannot easily learn a function that changes quickly with t.
    It can if it gets sinusoids of many frequencies instead (of 1000·t, as in AuraFlow). They are
    computed in fp32, and only the finished ones are rounded to the dtype of the weights: if t
    itself were rounded to bf16, 0.999 would become 1. The buffer is an integer, so `.bfloat16()`
    cannot change it. In DiT every modulation starts with a SiLU of cond. It is the same for all
    blocks, so it is computed here once.
    """

    N_SINUSOIDS = 256

    def __init__(self, dim: int):
        super().__init__()
        self.lift = Linear(self.N_SINUSOIDS, dim, role="input", bias=True)
        self.mix = Linear(dim, dim, role="hidden", bias=True)
        self.register_buffer("index", torch.arange(self.N_SINUSOIDS // 2), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) / len(self.index) * self.index.float())  # (128,)
        angles = 1000 * t.float()[:, None] * frequencies  # (B, 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
        return F.silu(self.mix(F.silu(self.lift(sinusoids.to(self.lift.weight.dtype)))))


# ------------------------------------------------------------------------------------------------
# Blocks: a Stream owns weights, a block decides who attends to whom
# ------------------------------------------------------------------------------------------------

# Almost all time is spent in blocks, so only blocks are compiled (compile_blocks). A whole forward
# pass can also be captured as a CUDA graph (sample_t2i.py --cudagraphs). Both work because of four
# rules, which hold for every line of a block and of MMDiT.forward:
#     static shapes       they follow from config and batch, never from values: no mask, no nonzero
#     no host reads       no .item(), .tolist() or .cpu(): the host would wait for the device
#     no branches         `if` asks the config and shapes only, never the values of tensors
#     no host data        no tensor is built from Python numbers; tables are parameters or buffers
# tests/test_mmdit.py checks them: blocks compile as one graph (no branch), are not compiled again
# for the same shapes, and a recorder of operators (tests/host_reads.py) sees no read by the host.


class Modulation(NamedTuple):
    """Shift, scale and gate of one half of a block (attention or MLP), each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Stream(nn.Module):
    """The weights of one token sequence in a block: modulation, q k v, output, MLP.

    The gates start at zero (adaLN-zero), so at first each block is the identity. During training
    the gates open and the blocks begin to contribute. (DiT, section 3.2: better FID than other
    initialisations.)
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dim = config.dim
        self.head_dim = config.head_dim
        self.residual = config.residual
        self.modulation = Linear(dim, 6 * dim, role="modulation")
        self.qkv = Linear(dim, 3 * dim, role="hidden", parts=3)  # rows: [q; k; v]
        self.out = Linear(dim, dim, role="hidden")
        self.mlp = SwiGLU(dim, config.mlp_dim)

    def modulations(self, cond: Tensor) -> tuple[Modulation, Modulation]:
        """cond (B, D) → the triple for attention and the triple for the MLP."""
        six = self.modulation(cond)[:, None].chunk(6, dim=-1)  # 6 of (B, 1, D)
        return Modulation(*six[:3]), Modulation(*six[3:])

    def heads(self, x: Tensor, mod: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) → q, k, v, each (B, L, h, d).

        q and k are normed for each head. Without that, their products can grow during training
        until the softmax is one-hot; its gradient vanishes, and training diverges (ViT-22B,
        2302.05442).
        """
        qkv = self.qkv(modulate(norm(x), mod.shift, mod.scale))  # (B, L, 3D)
        q, k, v = split_heads(qkv, 3, self.head_dim)
        return norm(q), norm(k), v

    def update(self, x: Tensor, attended: Tensor, attn: Modulation, mlp: Modulation) -> Tensor:
        """Add attention and MLP to x. x (B, L, D); attended (B, L, D), with joined heads.

        prenorm:   x ← x + g₁·out(attended);   x ← x + g₂·mlp(mod(norm(x)))     (DiT)
        auraflow:  y = x + g₁·out(attended);   x ← x + g₂·mlp(mod(norm(y)))
        In AuraFlow the attention reaches the residual stream only through the MLP. With "auraflow",
        MMDiT.forward also ends without a norm.
        """
        y = torch.addcmul(x, attn.gate, self.out(attended))
        stem = y if self.residual == "prenorm" else x
        return torch.addcmul(stem, mlp.gate, self.mlp(modulate(norm(y), mlp.shift, mlp.scale)))


class KeyValueStream(nn.Module):
    """The text's part in a last double block that no single block follows: keys and values only.

    Queries, output and MLP would change text tokens that nothing reads afterwards. Their weights
    would never get a gradient.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.modulation = Linear(config.dim, 2 * config.dim, role="modulation")  # shift, scale
        self.kv = Linear(config.dim, 2 * config.dim, role="hidden", parts=2)  # rows: [k; v]

    def heads(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        k, v = split_heads(self.kv(modulate(norm(x), shift, scale)), 2, self.head_dim)
        return norm(k), v


def split_heads(x: Tensor, parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """(B, L, parts·D) → `parts` tensors (B, L, h, d): views, no copy."""
    B, L, D = x.shape
    return x.view(B, L, parts, D // parts // head_dim, head_dim).unbind(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v for each head: three (B, L, h, d) → (B, L, D).

    The L x L weights are never stored: PyTorch picks a fused kernel (FlashAttention, 2205.14135).
    """
    heads_first = (x.transpose(1, 2) for x in (q, k, v))  # (B, h, L, d), views
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)  # (B, L, h·d)


class DoubleBlock(nn.Module):
    """Text and image have separate weights; each token attends to both (SD3, Fig. 2b)."""

    def __init__(self, config: MMDiTConfig, text_is_last: bool = False):
        super().__init__()
        self.image = Stream(config)
        self.text = KeyValueStream(config) if text_is_last else Stream(config)

    def forward(self, text: Tensor, image: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        image_attn, image_mlp = self.image.modulations(cond)
        q, k, v = self.image.heads(image, image_attn)
        if isinstance(self.text, KeyValueStream):
            text_k, text_v = self.text.heads(text, cond)
        else:
            text_attn, text_mlp = self.text.modulations(cond)
            text_q, text_k, text_v = self.text.heads(text, text_attn)
            q = torch.cat([text_q, q], dim=1)  # (B, L + N, h, d)
        k, v = torch.cat([text_k, k], dim=1), torch.cat([text_v, v], dim=1)
        attended = attend(q, k, v)  # (B, L + N, D), or (B, N, D) without text queries
        if not isinstance(self.text, KeyValueStream):
            L = text.shape[1]  # R + T
            text = self.text.update(text, attended[:, :L], text_attn, text_mlp)
            attended = attended[:, L:]
        return text, self.image.update(image, attended, image_attn, image_mlp)


class SingleBlock(nn.Module):
    """The same weights for text and image tokens: a DiT block over [text, image]."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.stream = Stream(config)

    def forward(self, tokens: Tensor, cond: Tensor) -> Tensor:
        attn, mlp = self.stream.modulations(cond)
        attended = attend(*self.stream.heads(tokens, attn))
        return self.stream.update(tokens, attended, attn, mlp)


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


class MMDiT(nn.Module):
    """velocity = MMDiT(config)(x, t, text); the docstring of this file has a picture."""

    TABLES = ("positions", "registers")  # two-dimensional, but not weight matrices: role "vector"

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config, self.recompute = config, False  # see through
        D, n_double = config.dim, config.n_double_layers
        n_single = config.n_layers - n_double
        self.patch_embed = Linear(config.patch_values, D, role="input", bias=True)
        self.positions = nn.Parameter(torch.empty(config.max_grid**2, D))
        has_registers = config.n_registers > 0
        self.registers = nn.Parameter(torch.empty(config.n_registers, D)) if has_registers else None
        self.text_embed = Linear(config.text_dim, D, role="text")
        self.time_embed = TimeEmbedding(D)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, text_is_last=n_single == 0 and i == n_double - 1)
            for i in range(n_double)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(n_single))
        self.final_modulation = Linear(D, 2 * D, role="modulation")  # shift, scale
        self.final = Linear(D, config.patch_values, role="output")
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every weight, once: by its role, then the two tables, which have a rule of their own.

        A weight gets no gradient as long as every path from it to the output passes through some
        weight that is zero. So training starts at the end of the network. Step 1 moves only
        `final`. Step 2 moves patch_embed, positions, final_modulation, and the gates of image
        tokens. Step 3 moves all that lies before an open gate, text_embed and time_embed included;
        step 4 the weights in double blocks that change text tokens only. The warm-up is longer, so
        the rate is still small during these steps. (With the auraflow residual the attention gates,
        and all before them, move one step later. Without registers the text tokens are still zero
        at step 3, so the weights that read them in double blocks move one step later, too.)
        """
        for module in self.modules():
            if isinstance(module, Linear):
                if ROLES[module.role].init == "fan_in":
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                else:  # at the start each block is the identity, velocity and embedded text are 0
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Sines, where AuraFlow has N(0, 0.1²): the network then knows from the start which patches
        # are neighbours, and objects become coherent much earlier. Learned from there on.
        self.positions.copy_(sines_2d(self.config.max_grid, self.config.dim))
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The velocity at x_t.

        x (B, C, H, W) any float dtype; H and W multiples of the patch, max_grid patches at most.
        t (B,) fp32 in [0, 1], 0 = data, 1 = noise. text (B, T, text_dim); padded rows are zero (no
        mask). Returns (B, C, H, W) in the dtype of the weights.
        Raises ValueError if a shape does not fit the config.
        """
        B, C, H, W = x.shape
        self._check(B, C, H, W, t, text)
        dtype, patch = self.patch_embed.weight.dtype, self.config.patch_size
        cond = self.time_embed(t)  # (B, D), all that the blocks know about the time
        image = self.patch_embed(patchify(x.to(dtype), patch))  # (B, N, D)
        image = image + self.grid_positions(H // patch, W // patch)  # (B, N, D)
        text = self.text_embed(text.to(dtype))  # (B, T, D)
        # Registers (2309.16588) are learned tokens that belong to no place. Without them a network
        # keeps global information in tokens of empty background, and those patches suffer.
        if self.registers is not None:
            text = torch.cat([self.registers.expand(B, -1, -1), text], dim=1)  # (B, R+T, D)
        for block in self.double_blocks:
            text, image = self.through(block, text, image, cond)
        if self.single_blocks:
            tokens = torch.cat([text, image], dim=1)  # (B, R+T+N, D)
            for block in self.single_blocks:
                tokens = self.through(block, tokens, cond)
            image = tokens[:, text.shape[1] :]  # (B, N, D)
        shift, scale = self.final_modulation(cond)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        if self.config.residual == "prenorm":
            image = norm(image)  # as in DiT; AuraFlow has no norm here
        out = unpatchify(self.final(modulate(image, shift, scale)), patch, H, W)  # (B, C, H, W)
        return out if self.config.predicts == "velocity" else velocity_to(x, out, t)

    def through(self, block: nn.Module, *inputs: Tensor):
        """What a block makes of its inputs.

        With self.recompute autograd keeps only the inputs, and the backward pass runs the block
        again (Chen et al. 2016, 1604.06174): far less memory, one more forward pass of time, the
        same values. The last block is an exception: its backward pass comes at once, when it would
        need the memory again in any case. Not a field of the config: it is no part of the network.
        """
        last = (*self.double_blocks, *self.single_blocks)[-1]
        if not self.recompute or block is last or not torch.is_grad_enabled():
            return block(*inputs)
        # No block draws random numbers: the state of their generator need not be kept.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    def grid_positions(self, rows: int, columns: int) -> Tensor:
        """(rows·columns, D): the centre of the position table.

        Pictures of all shapes use the same vectors for their middle, where the subject usually is.
        diffusers does the same; minRF takes the first rows.
        """
        grid = self.config.max_grid
        top, left = grid // 2 - rows // 2, grid // 2 - columns // 2
        table = self.positions.view(grid, grid, -1)  # (grid, grid, D)
        return table[top : top + rows, left : left + columns].reshape(rows * columns, -1)

    def check_size(self, height: int, width: int):
        """ValueError if x may not have these sides."""
        patch, largest = self.config.patch_size, self.config.patch_size * self.config.max_grid
        if height % patch or width % patch:
            raise ValueError(
                f"image size {height}x{width} must be a multiple of patch_size={patch}"
            )
        if max(height, width) > largest:
            raise ValueError(f"image size {height}x{width} exceeds max_grid·patch_size={largest}")

    def _check(self, batch: int, channels: int, height: int, width: int, t: Tensor, text: Tensor):
        if channels != self.config.in_channels:
            raise ValueError(f"x has {channels} channels, the model {self.config.in_channels}")
        self.check_size(height, width)
        if t.shape != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}, must be ({batch},) as x")
        if text.ndim != 3 or (len(text), text.shape[-1]) != (batch, self.config.text_dim):
            raise ValueError(
                f"text has shape {tuple(text.shape)}, must be ({batch}, T, {self.config.text_dim})"
            )

    def compile_blocks(self, **kwargs):
        """Compile each block in place for static shapes. kwargs go to torch.compile.

        Blocks and not the whole model: all blocks of one kind share one compilation, so a network
        of 36 layers compiles as fast as one of 2. The names of the weights do not change.
        """
        # One compilation for each shape of image, with and without gradients. torch's limit is 8;
        # beyond it compilation fails.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(256, dynamo.recompile_limit)
        dynamo.accumulated_recompile_limit = max(1024, dynamo.accumulated_recompile_limit)
        for block in (*self.double_blocks, *self.single_blocks):
            block.compile(fullgraph=True, dynamic=False, **kwargs)

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        parametrization: str = "mup",
        muon_lr: float = 0.0,
    ) -> list[dict]:
        """Groups for AdamW; every parameter once, with those that have its m and decay as it does.

        Which parameters share a group does not depend on lr and weight_decay: a resumed run may
        change them. "base_lr" is a group's own rate, of which a schedule makes "lr".
        "mup": lr and weight_decay hold at base_dim, and ROLES says how they follow the width.
        "standard": the same lr and decay at every width, for comparison. muon_lr: above 0, hidden
        matrices are a group for Muon (common/muon.py), which needs their shapes: "matrices" holds
        (parts, out, in) of each.
        """
        if parametrization not in ("mup", "standard"):
            raise ValueError(f"parametrization = {parametrization!r} must be 'mup' or 'standard'")
        ratios, groups = self.fan_in_ratios(), {}
        for name, parameter in self.named_parameters():
            role, muon = self.role(name), {}
            m = ratios[name] if parametrization == "mup" else 1.0
            decays = ROLES[role].decays
            rate, decay, key = lr / m, weight_decay * m if decays else 0.0, (m, decays)
            if muon_lr and role == "hidden":  # its own rule makes the rate hold at every width
                rate, decay, key, muon = muon_lr, weight_decay, "muon", {"matrices": []}
            how = {"lr": rate, "base_lr": rate, "weight_decay": decay, **muon}
            group = groups.setdefault(key, {"params": [], **how})
            group["params"].append(parameter)
            if muon:
                parts = self.get_submodule(name.rpartition(".")[0]).parts
                out, into = parameter.shape
                group["matrices"].append((parts, out // parts, into))
        return list(groups.values())

    def fan_in_ratios(self) -> dict[str, float]:
        """name → m = fan_in / (fan_in at base_dim); 1 for vectors and where fan_in is fixed."""
        with torch.device("meta"):  # the same network at the base width: shapes without memory
            base = MMDiT(replace(self.config, dim=self.config.base_dim))
        return {
            name: 1.0
            if self.role(name) == "vector"
            else parameter.shape[1] / base.get_parameter(name).shape[1]
            for name, parameter in self.named_parameters()
        }

    def role(self, parameter_name: str) -> str:
        """The row of ROLES for a parameter: its Linear's role; "vector" for biases and TABLES."""
        owner, _, kind = parameter_name.rpartition(".")
        module = self.get_submodule(owner)
        if isinstance(module, Linear) and kind == "weight":
            return module.role
        if self.get_parameter(parameter_name).ndim > 1 and parameter_name not in self.TABLES:
            raise ValueError(f"{parameter_name} is a matrix without a muP role: make it a Linear")
        return "vector"

    def start_from(self, older: "MMDiT", scale: float = 1.0):
        """Take over the weights of a network that differs at most in max_grid.

        scale: how much larger a picture is now, in pixels a side. The position table is stretched
        bilinearly about its centre, as minRF's extend_pe does: the same place in the picture keeps
        its vector. Raises ValueError if the networks differ in anything else.
        """
        if scale <= 0:
            raise ValueError(f"scale {scale} must be above 0")
        theirs, ours = (asdict(replace(m.config, max_grid=1)) for m in (older, self))
        if theirs != ours:
            differs = (f"{k} {theirs[k]} (here {v})" for k, v in ours.items() if theirs[k] != v)
            raise ValueError(f"it is another network: {', '.join(differs)}")
        old, new = older.config.max_grid, self.config.max_grid
        # Where the middle of the enlarged picture lies on the new grid. grid_positions begins at
        # row new // 2 − rows // 2: the middle is new // 2 for an even number of rows, else ½ more.
        centre = new // 2 + round(old * scale) % 2 / 2
        at = (torch.arange(new) + 0.5 - centre) / scale + old / 2 - 0.5  # where each row lay
        # Bilinear weights (new, old); outside the old table its edge is repeated.
        weights = (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)
        weights[at < 0, 0], weights[at > old - 1, -1] = 1, 1
        state = older.state_dict()
        table = state["positions"].view(old, old, -1)
        stretched = torch.einsum("ia, jb, abd -> ijd", weights, weights, table)
        self.load_state_dict(state | {"positions": stretched.reshape(new * new, -1)})

    def flops_per_image(self, height: int, width: int, text_tokens: int) -> int:
        """Forward FLOPs of one image (a multiply-add is 2); training costs three times as much.

        Matrix products only, counted by torch in a pass on the meta device. The usual estimate
        6·parameters·tokens for training would claim 63 % too much for AuraFlow at 256 pixels: a
        third of its weights are modulations, which are used once per image and not once per token,
        and a token uses only one of the two streams of a double block.
        """
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = torch.empty(1, self.config.in_channels, height, width)
            text = torch.empty(1, text_tokens, self.config.text_dim)
            MMDiT(self.config)(x, torch.empty(1), text)  # shapes alone: no memory, no time
        return counter.get_total_flops()

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def checksum(tensors: dict[str, Tensor], about: str = "") -> int:
    """It changes if a weight does, its name, shape or dtype, or `about`.

    The sum of all weights, their bits taken as whole numbers, and a CRC of the words.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = [f"{name} {tuple(x.shape)} {x.dtype}" for name, x in sorted(tensors.items())]
    bits = sum(int(x.view(whole[x.itemsize]).sum()) for x in tensors.values())
    return (bits + zlib.crc32("".join([about, *words]).encode())) % 2**63


def save_model(path: str | Path, model: MMDiT, **sections):
    """Write path/model.safetensors and path/config.json; each replaced whole or not at all.

    config.json holds {"model": the MMDiTConfig, "checksum": that of the weights, **sections}; the
    sections are the caller's. Raises FloatingPointError if a weight is not finite.
    """
    path = Path(path)
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    if not all(x.isfinite().all() for x in tensors.values()):
        raise FloatingPointError(f"weights that are not finite are not written to {path}")
    path.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config)
    contents = {"model": config, "checksum": checksum(tensors, json.dumps(config)), **sections}
    partial = [path / "model.safetensors.partial", path / "config.json.partial"]
    try:
        save_file(tensors, partial[0])
        partial[1].write_text(json.dumps(contents, indent=2) + "\n")
        # save_file lets only the owner read its file; others on the cluster should be able to.
        shutil.copymode(partial[1], partial[0])
        for file in partial:
            os.replace(file, file.with_suffix(""))
    except (OSError, SafetensorError) as error:  # a full disk, say
        for file in partial:
            file.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


def load_model(path: str | Path, device: str | torch.device = "cpu") -> MMDiT:
    """The model that save_model wrote, in eval mode.

    Raises FileNotFoundError if a file is missing, ValueError if weights and config do not match,
    or if the weights are not those that were written.
    """
    path = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}: give the folder of a finished run")
    try:
        config = json.loads((path / "config.json").read_text())
        model = MMDiT(MMDiTConfig(**config["model"]))
        tensors = load_file(path / "model.safetensors")
        model.load_state_dict(tensors)
        if config["checksum"] != checksum(tensors, json.dumps(asdict(model.config))):
            raise ValueError("the weights have changed")
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"weights and config.json do not match: {error}"
        raise ValueError(f"{path} is damaged, {reason}") from error
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------
# python mmdit.py --explain tiny
# ------------------------------------------------------------------------------------------------


def explain(config: MMDiTConfig) -> str:
    """muP's table for one network: a row for each class of parameters with the same fan-in."""
    with torch.device("meta"):
        model = MMDiT(config)
    ratios, rows = model.fan_in_ratios(), {}
    for name, parameter in model.named_parameters():
        role = model.role(name)
        fan_in = 0 if role == "vector" else parameter.shape[1]
        tensors, values, _ = rows.get((role, fan_in), (0, 0, 1.0))
        rows[role, fan_in] = (tensors + 1, values + parameter.numel(), ratios[name])
    head = f"{'class':11}{'fan-in':>7}{'tensors':>9}{'values':>15}{'init std':>10}"
    lines = [head + f"{'lr x':>8}{'decay x':>9}"]
    for (role, fan_in), (tensors, values, m) in sorted(rows.items()):
        std = {"fan_in": f"{fan_in**-0.5:.4f}" if fan_in else "", "zero": "0", "own": "own"}
        decay = f"{m:.4g}" if ROLES[role].decays else "0"
        lines.append(
            f"{role:11}{fan_in or '-':>7}{tensors:>9}{values:>15,}{std[ROLES[role].init]:>10}"
            f"{1 / m:>8.4g}{decay:>9}"
        )
    total = f"{model.n_parameters():,} values; the multipliers are 1 at width {config.base_dim}"
    return "\n".join([*lines, total])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="muP's table for a preset")
    names = {"choices": PRESETS, "metavar": "PRESET", "help": ", ".join(PRESETS)}
    parser.add_argument("--explain", required=True, **names)
    print(explain(PRESETS[parser.parse_args().explain]))
