"""PLAN: what a run would need and cost, from exact counts; nothing is trained, nothing allocated.

    python train_t2i.py --plan --preset auraflow-6.8b --gpus 64 --micro-batch 8

N parameters, W GPUs, b bytes of a weight (2 in bf16, 4 in fp32). ZeRO-2 (1910.02054, section 5.2)
keeps on each GPU, in bytes:

    weights       b·N
    gradients     4·N/W    fp32, while they add up
    optimizer     12·N/W   fp32 weights, Adam's two moments
    averages      2·4·N/W  two profiles of the EMA
    reduction     4·min(bucket, N)  and the gradients of the block under way
    activations   what a forward pass of the micro-batch keeps for the backward one: counted on
                  tensors without storage, not compiled; compiled blocks keep less

FLOPs are matrix products, training an image three forward passes (mmdit.flops_per_image). In a step
each pass reduces its gradients, 4·N·(W−1)/W bytes, and the new weights are gathered, b·N·(W−1)/W.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensorMode

from mmdit import PRESETS, MMDiT, MMDiTConfig
from options_t2i import COMMON, RECIPES

AVERAGES = 2
BUCKET = 500_000_000  # elements, of ds_config.json
VAE_FACTOR, VAE_CHANNELS, TEXT_DIM = 8, 4, 2048  # SDXL's VAE; T5-XL and UMT5-XL
CAPTION = 64  # tokens of a usual caption, for the size of the cache alone
GIB, SECONDS_A_DAY = 2**30, 86_400


class Plan(NamedTuple):
    parameters: int
    memory: dict[str, float]  # bytes on each GPU, by what they hold
    flops: float  # of a step, all GPUs
    communication: float  # bytes that each GPU sends in a step
    cached: float  # bytes of prepared data for a million images
    days: float


def activations(config: MMDiTConfig, batch: int, side: int, tokens: int, dtype) -> int:
    """Bytes that autograd keeps between forward and backward, the weights not counted."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other takes its number
        return x

    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        model = MMDiT(config)
        torch.set_default_dtype(default)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        x = torch.zeros(batch, config.in_channels, side, side)
        text = torch.zeros(batch, tokens, config.text_dim)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = ((model(x, torch.zeros(batch), text).float() - x) ** 2).mean()
        del loss
        return sum(s.nbytes() for number, s in kept.items() if number not in weights)


def plan(
    config: MMDiTConfig, *, gpus: int, micro_batch: int, batch_size: int, samples: int, side: int,
    tokens: int, bf16: bool = True, mfu: float = 0.5, tflops: float = 989.0, image_bytes: float = 0,
) -> Plan:  # fmt: skip
    """side: of what the network sees. tflops: one GPU's peak. ValueError if it does not fit."""
    passes, rest = divmod(batch_size, micro_batch * gpus)
    if rest or not passes:
        raise ValueError(
            f"--batch-size {batch_size} must be --micro-batch {micro_batch} x --gpus {gpus} x a"
            " whole number of passes"
        )
    with torch.device("meta"):
        model = MMDiT(config)
    N, b, W = model.n_parameters(), 2 if bf16 else 4, gpus
    blocks = (*model.double_blocks, *model.single_blocks)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    dtype = torch.bfloat16 if bf16 else torch.float32
    memory = {
        "weights": b * N, "gradients": 4 * N / W, "optimizer": 12 * N / W,
        "averages": AVERAGES * 4 * N / W, "reduction": 4 * min(BUCKET, N) + b * largest,
        "activations": activations(config, micro_batch, side, tokens, dtype),
    }  # fmt: skip
    flops = 3 * batch_size * model.flops_per_image(side, side, tokens)
    steps = samples / batch_size
    return Plan(
        N, memory, flops, (W - 1) / W * (4 * N * passes + b * N),
        1e6 * (image_bytes + 2 * CAPTION * config.text_dim),
        steps * flops / (W * tflops * 1e12 * mfu) / SECONDS_A_DAY,
    )  # fmt: skip


def describe(args: argparse.Namespace) -> str:
    """The plan of the command line, as a page to read."""
    preset = args.preset or "tiny"
    if preset not in RECIPES:
        raise ValueError(f"--preset {preset!r} must be one of {', '.join(RECIPES)}")
    recipe = COMMON | RECIPES[preset]
    pixels = args.vae == "pixels"
    size, tokens = args.size or 256, args.text_tokens or 256
    side, channels = (size, 3) if pixels else (size // VAE_FACTOR, VAE_CHANNELS)
    config = replace(
        PRESETS[preset], in_channels=channels, text_dim=TEXT_DIM,
        max_grid=side // PRESETS[preset].patch_size,
    )  # fmt: skip
    batch_size, samples = args.batch_size or recipe["batch_size"], args.samples or recipe["samples"]
    micro = args.micro_batch or max(1, min(recipe["most_at_once"], batch_size // args.gpus))
    bf16 = args.precision != "fp32"
    found = plan(
        config, gpus=args.gpus, micro_batch=micro, batch_size=batch_size, samples=samples,
        side=side, tokens=tokens, bf16=bf16, mfu=args.mfu, tflops=args.peak_tflops,
        image_bytes=3 * size**2 if pixels else 4 * channels * side**2,
    )  # fmt: skip
    total = sum(found.memory.values())
    hours = 24 * found.days * args.gpus
    return "\n".join([
        f"{preset}: {found.parameters:,} parameters, {size} pixels, {tokens} text tokens,"
        f" {'bf16' if bf16 else 'fp32'}",
        f"batch {batch_size:,} = {micro} x {args.gpus} GPUs x"
        f" {batch_size // (micro * args.gpus)} passes; {samples:,} samples,"
        f" {samples / batch_size:,.0f} steps",
        "",
        "memory of each GPU, GiB",
        *(f"  {name:12}{value / GIB:9.2f}" for name, value in found.memory.items()),
        f"  {'in all':12}{total / GIB:9.2f}",
        "",
        f"a step        {found.flops / 1e15:,.2f} PFLOP in all; each GPU sends"
        f" {found.communication / GIB:,.2f} GiB",
        f"cached data   {found.cached / GIB:,.1f} GiB a million images (captions of {CAPTION})",
        f"time          {found.days:,.2f} days, {hours:,.0f} GPU-hours at {args.mfu:.0%} MFU of"
        f" {args.peak_tflops:g} TFLOP/s",
    ])  # fmt: skip
