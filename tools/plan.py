"""PLAN: what a run would need and cost, from exact counts; nothing is trained, nothing allocated.

    python -m tools.plan --preset auraflow-6.8b --gpus 64 --micro-batch 8

N parameters, W GPUs, b bytes of a weight (2 in bf16, 4 in fp32), B elements of the reduction's
bucket (ds_config.json). ZeRO-2 (1910.02054, section 5.2) keeps on each GPU, in bytes:

    weights       b·N
    gradients     4·N/W    fp32, while they add up
    optimizer     4·N/W    fp32 weights
    moments       8·N/W    Adam's two, fp32; 4 for the M weights that Muon moves (common/muon.py)
    averages      8·N/W    two fp32 states beside Adam's (rf.keep_averages)
    reduction     2·B + 6·min(B, N) in bf16, 4·B + 4·min(B, N) in fp32: the bucket, and copies of
                  what is in it (flattened, then widened to fp32)
    activations   what the forward pass of a micro-batch keeps for the backward pass: counted on
                  tensors without storage, not compiled; compiled blocks keep about a fifth less

Not counted: CUDA, NCCL and cuBLAS (2 to 3 GiB), the gradients of the block under way (b times its
weights), the text encoder and the VAE, and the about 20·M/W bytes with which Muon works when the
activations are gone. On disk, a prepared image takes 4·C·h·w bytes (mean and
log-variance of its latent in fp16) and 2·E bytes for each token of its text.

FLOPs are matrix products; training on an image costs three forward passes (mmdit.flops_per_image).
Each pass (micro-batch) of a step reduces its gradients in fp32, and each step gathers the new
weights. With "use_multi_rank_bucket_allreduce" in ds_config.json (DeepSpeed's default) the sum goes
to every GPU and costs twice the bytes, else to its owner alone. So each GPU sends

    (W − 1)/W · (passes · (8 or 4)·N + b·N)   bytes a step

Muon adds products of its own: for a matrix of r ≤ c rows and columns 5·(4·r²·c + 2·r³) FLOPs a
step, on the GPU that owns it, and on both if two own a part. It sends only such cut matrices.
A GPU computes nothing while it sends ("overlap_comm": false): the two times add up. NCCL's large
collectives reach about 350 GB/s over NVLink, and between machines with a 400 Gb/s card for each
GPU; about 45 GB/s with one such card a machine.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from common.muon import ROUNDS
from common.settings import Options, Positive, check, option, parse
from common.start import program
from mmdit import MMDiT, MMDiTConfig, fitted
from train_t2i import RECIPES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEEN = {"latents": (8, 4), "pixels": (1, 3)}  # times smaller than the image; channels (SDXL's VAE)
TEXT_DIM = 2048  # E of T5-XL and UMT5-XL


@dataclass(frozen=True)
class Settings(Options):
    preset: str = option("auraflow-6.8b", "network and recipe", choices=RECIPES)
    gpus: int = option(8, "how many", least=1)
    micro_batch: int | None = option(None, "images a pass of one GPU (recipe's most)", least=1)
    size: int = option(256, "pixels a side", least=1)
    text_tokens: int = option(256, "of a caption", least=1)
    vae: str = option("latents", "latents or pixels", choices=SEEN)
    batch_size: int | None = option(None, "images a step, of all GPUs (recipe's)", least=1)
    samples: int | None = option(None, "images in all (recipe's)", least=1)
    precision: str = option("bf16", "bf16 or fp32", choices=DTYPES)
    mfu: float = option(0.5, "share of the peak that is reached", above=0, most=1)
    peak_tflops: float = option(989.0, "of one GPU, here an H100 in bf16", above=0)
    gb_per_s: float = option(350.0, "that NCCL sends from each GPU", above=0)


def activations(model: MMDiT, batch: int, side: int, tokens: int) -> int:
    """Bytes that autograd keeps between forward and backward, without the weights.

    Tensors that share memory are counted once. On fake tensors this takes no memory at all.
    """
    kept = {}  # storages by their number; held, so that no other takes it

    def keep(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    x = torch.zeros(batch, model.config.in_channels, side, side)
    text = torch.zeros(batch, tokens, model.config.text_dim)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ((model(x, torch.zeros(batch), text).float() - x) ** 2).mean()
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def muon_flops(out: int, into: int) -> int:
    """Of common/muon.py's five rounds for one matrix: X Xᵀ, its square, and its product with X."""
    r, c = sorted((out, into))
    return ROUNDS * (4 * r * r * c + 2 * r**3)


def plan(config: MMDiTConfig, s: Settings, zero: dict):
    """→ parameters; bytes on a GPU, by what they hold; FLOPs and bytes sent of a GPU in a step.

    config: its grid is the image's. zero: "zero_optimization" of ds_config.json. ValueError if the
    batch is no whole number of passes.
    """
    W, dtype, side = s.gpus, DTYPES[s.precision], config.max_grid * config.patch_size
    passes, rest = divmod(s.batch_size, s.micro_batch * W)
    if rest:
        raise ValueError(
            f"--batch-size {s.batch_size} must be --micro-batch {s.micro_batch} x --gpus {W} x a"
            " whole number of passes"
        )
    with FakeTensorMode():  # shapes and dtypes without memory
        model = MMDiT(config)
        model.load_state_dict(
            {name: w.to(dtype) for name, w in model.state_dict().items()}, assign=True
        )
        kept = activations(model, s.micro_batch, side, s.text_tokens)
    N, b = model.n_parameters(), dtype.itemsize
    bucket = zero.get("reduce_bucket_size", 5e8)  # DeepSpeed's default
    check('"reduce_bucket_size" of ds_config.json', bucket, Positive)
    (muon,) = (g for g in model.param_groups(1, muon_lr=1) if "matrices" in g)
    M = sum(p.numel() for p in muon["params"])
    memory = {
        "weights": b * N,
        "gradients": 4 * N / W,
        "optimizer": 4 * N / W,
        "moments": (8 * N - 4 * M) / W,
        "averages": 8 * N / W,
        "reduction": b * bucket + (8 - b) * min(bucket, N),
        "activations": kept,
    }
    memory["in all"] = sum(memory.values())
    reduced = 8 if zero.get("use_multi_rank_bucket_allreduce", True) else 4
    flops = 3 * s.batch_size // W * model.flops_per_image(side, side, s.text_tokens)
    flops += sum(n * muon_flops(out, into) for n, out, into in muon["matrices"]) // W
    return N, memory, flops, (W - 1) / W * (passes * reduced + b) * N


@program("plan")
def main(argv=None):
    s = Settings(**parse(Settings, argv, __doc__))
    recipe, (factor, channels) = RECIPES[s.preset], SEEN[s.vae]
    batch = s.batch_size or recipe["batch_size"]
    most = range(recipe["most_at_once"], 0, -1)  # the largest pass that divides a GPU's share
    micro = s.micro_batch or next(m for m in most if batch // s.gpus % m == 0)
    s = replace(s, batch_size=batch, micro_batch=micro, samples=s.samples or recipe["samples"])
    side, rest = divmod(s.size, factor)
    if rest:
        raise ValueError(f"--size {s.size} must be a multiple of {factor}, the VAE's factor")
    config = fitted(s.preset, channels=channels, text_dim=TEXT_DIM, sides=[(side, side)])
    zero = json.loads((Path(__file__).parents[1] / "ds_config.json").read_text())
    N, memory, flops, sent = plan(config, s, zero["zero_optimization"])
    print(
        f"{s.preset}: {N:,} parameters, {s.size} pixels, {s.text_tokens} text tokens, {s.precision}"
        f"\nbatch {batch:,} = {micro} x {s.gpus} GPUs x {batch // (micro * s.gpus)} passes;"
        f" {s.samples:,} samples, {s.samples / batch:,.0f} steps\n\nmemory of each GPU, GiB"
    )
    for name, value in memory.items():
        print(f"  {name:14}{value / 2**30:9.2f}")
    computing, sending = flops / (s.peak_tflops * 1e12 * s.mfu), sent / (s.gb_per_s * 1e9)
    hours = s.samples / batch * (computing + sending) / 3600
    print(
        f"\ncomputation     {computing:.3g} s a step: {flops / 1e12:,.4g} TFLOP on each GPU at"
        f" {s.mfu:.0%} MFU of {s.peak_tflops:g} TFLOP/s\n"
        f"communication   {sending:.3g} s a step: {sent / 1e9:,.4g} GB from each GPU at"
        f" {s.gb_per_s:g} GB/s\n"
        f"time            {hours / 24:,.2f} days, {hours * s.gpus:,.0f} GPU-hours"
    )


if __name__ == "__main__":
    main()
