"""PLAN: what a run would need and cost, from exact counts; nothing is trained, nothing allocated.

    python -m tools.plan --preset auraflow-6.8b --gpus 64 --micro-batch 8

Memory: common/memory.py says what is counted. On disk, a prepared image takes 4·C·h·w bytes (mean
and log-variance of its latent in fp16) and 2·E bytes for each token of its text.

FLOPs are matrix products. Those of the model are three forward passes for each image
(mmdit.flops_per_image): MFU counts them alone, here and beside the trainer's progress bar. The GPU
also computes blocks a second time (--recompute blocks) and Muon's products: for a matrix of r ≤ c
rows and columns 5·(4·r²·c + 2·r³) FLOPs a step, on the GPU that owns it, and on both if two own a
part. HFU counts all.

N parameters, W GPUs, b bytes of a weight, r of a gradient on its way (4; 2 with
"communication_data_type": "bf16" in ds_config.json). ZeRO-2 reduces the gradients in each pass
(micro-batch), stage 1 once a step, and each step gathers the new weights. With
"use_multi_rank_bucket_allreduce" (DeepSpeed's default), and in stage 1 with bf16 weights, the sum
goes to every GPU and costs twice the bytes, else to its owner alone. So each GPU sends

    (W − 1)/W · (passes · (2·r or r)·N + b·N)   bytes a step

Muon sends only matrices that a cut between two shards divides. A GPU computes nothing while it
sends ("overlap_comm": false): the two times add up. NCCL's large collectives reach about 350 GB/s
over NVLink, and between machines with a 400 Gb/s card for each GPU; about 45 GB/s with one such
card a machine.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.memory import DTYPES, USABLE, largest_pass, needs
from common.muon import ROUNDS
from common.settings import Options, option, parse
from common.start import program
from mmdit import MMDiT, MMDiTConfig, fitted
from train_t2i import RECIPES

SEEN = {"latents": (8, 4), "pixels": (1, 3)}  # times smaller than the image; channels (SDXL's VAE)
TEXT_DIM = 2048  # E of T5-XL and UMT5-XL


@dataclass(frozen=True)
class Settings(Options):
    preset: str = option("auraflow-6.8b", "network and recipe", choices=RECIPES)
    gpus: int = option(8, "how many", least=1)
    micro_batch: int | None = option(None, "images a pass of one GPU (what fits)", least=1)
    size: int = option(256, "pixels a side", least=1)
    text_tokens: int = option(256, "of a caption", least=1)
    vae: str = option("latents", "latents or pixels", choices=SEEN)
    batch_size: int | None = option(None, "images a step, of all GPUs (recipe's)", least=1)
    samples: int | None = option(None, "images in all (recipe's)", least=1)
    precision: str = option("bf16", "bf16 or fp32", choices=DTYPES)
    recompute: str = option(
        "none", "none, or blocks: run again for less memory", choices=("none", "blocks")
    )
    gib: float = option(80.0, "memory of one GPU, GiB: it limits --micro-batch", above=0)
    hfu: float = option(0.5, "share of the peak that all products reach", least=1e-3, most=1)
    peak_tflops: float = option(989.0, "of one GPU, here an H100 in bf16", least=1e-3)
    gb_per_s: float = option(350.0, "that NCCL sends from each GPU", above=0)


def muon_flops(out: int, into: int) -> int:
    """Of common/muon.py's five rounds for one matrix: X Xᵀ, its square, and its product with X."""
    r, c = sorted((out, into))
    return ROUNDS * (4 * r * r * c + 2 * r**3)


def plan(config: MMDiTConfig, s: Settings, ds: dict):
    """→ parameters; bytes on a GPU, by what they hold; FLOPs of the model, FLOPs in all, and bytes
    sent, of a GPU in a step.

    config: its grid is the image's. ds: ds_config.json. ValueError if the batch is no whole number
    of passes.
    """
    W, side = s.gpus, config.max_grid * config.patch_size
    passes, rest = divmod(s.batch_size, s.micro_batch * W)
    if rest:
        raise ValueError(
            f"--batch-size {s.batch_size} must be --micro-batch {s.micro_batch} x --gpus {W} x a"
            " whole number of passes"
        )
    memory = needs(s.micro_batch, config, s, W, (side, side), ds)
    memory["in all"] = sum(memory.values())
    with torch.device("meta"):
        model = MMDiT(config)
    N, images = model.n_parameters(), s.batch_size // W
    useful = 3 * images * model.flops_per_image(side, side, s.text_tokens)
    (muon,) = (g for g in model.param_groups(1, muon_lr=1) if "matrices" in g)
    flops = useful + sum(n * muon_flops(out, into) for n, out, into in muon["matrices"]) // W
    if s.recompute == "blocks":  # all but the last block (MMDiT.through), and what is outside them
        double = config.n_double_layers // config.n_layers  # 1 if the last block is double
        others = MMDiT(replace(config, n_layers=1, n_double_layers=double))
        flops += useful // 3 - images * others.flops_per_image(side, side, s.text_tokens)
    b = DTYPES[s.precision].itemsize
    r = DTYPES.get(ds.get("communication_data_type"), DTYPES[s.precision]).itemsize
    zero = ds["zero_optimization"]
    first = zero.get("stage") == 1
    to_all = zero.get("use_multi_rank_bucket_allreduce", True) or (first and b == 2)
    reduced = (1 if first else passes) * r * (2 if to_all else 1)
    return N, memory, useful, flops, (W - 1) / W * (reduced + b) * N


@program("plan")
def main(argv=None):
    s = Settings(**parse(Settings, argv, __doc__))
    recipe, (factor, channels) = RECIPES[s.preset], SEEN[s.vae]
    side, rest = divmod(s.size, factor)
    if rest:
        raise ValueError(f"--size {s.size} must be a multiple of {factor}, the VAE's factor")
    config = fitted(s.preset, channels=channels, text_dim=TEXT_DIM, sides=[(side, side)])
    ds = json.loads((Path(__file__).parents[1] / "ds_config.json").read_text())
    batch = s.batch_size or recipe["batch_size"]
    share, room = max(1, batch // s.gpus), USABLE * s.gib * 2**30
    micro = s.micro_batch or largest_pass(room, share, config, s, s.gpus, (side, side), ds)
    s = replace(s, batch_size=batch, micro_batch=micro, samples=s.samples or recipe["samples"])
    N, memory, useful, flops, sent = plan(config, s, ds)
    print(
        f"{s.preset}: {N:,} parameters, {s.size} pixels, {s.text_tokens} text tokens, {s.precision}"
        f"\nbatch {batch:,} = {micro} x {s.gpus} GPUs x {batch // (micro * s.gpus)} passes;"
        f" {s.samples:,} samples, {s.samples / batch:,.0f} steps\n\nmemory of each GPU, GiB"
    )
    for name, value in memory.items():
        print(f"  {name:14}{value / 2**30:9.2f}")
    if memory["in all"] > room:
        print(f"it does not fit: more than {USABLE:.0%} of --gib {s.gib:g}")
    computing, sending = flops / (s.peak_tflops * 1e12 * s.hfu), sent / (s.gb_per_s * 1e9)
    hours = s.samples / batch * (computing + sending) / 3600
    mfu = useful / (computing + sending) / (s.peak_tflops * 1e12)
    print(
        f"\ncomputation     {computing:.3g} s a step: {flops / 1e12:,.4g} TFLOP of products on"
        f" each GPU at {s.hfu:.0%} HFU of {s.peak_tflops:g} TFLOP/s\n"
        f"communication   {sending:.3g} s a step: {sent / 1e9:,.4g} GB from each GPU at"
        f" {s.gb_per_s:g} GB/s\n"
        f"MFU             {mfu:.0%} over both: {useful / 1e12:,.4g} TFLOP are the model's, three"
        " forward passes without recomputation and Muon\n"
        f"time            {hours / 24:,.2f} days, {hours * s.gpus:,.0f} GPU-hours"
    )


if __name__ == "__main__":
    main()
