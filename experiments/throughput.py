"""How fast, measured side by side in one run.

    python experiments/throughput.py model       a training step, ours against diffusers'
    python experiments/throughput.py blocks      double or single, fused or separate, head_dim
    python experiments/throughput.py sample      a picture: eager, compiled, a CUDA graph a step
    python experiments/throughput.py memory      freed memory kept, or given back to the system
    python experiments/throughput.py step        train_t2i.py's whole step: where its time goes
    python experiments/throughput.py data        rows/s of the loader against what training takes

Every number is a median over repeats after a warm-up, with its spread; ratios are of numbers from
one run. Rows also go to a CSV and a bar chart in runs/throughput.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cpu
import rf
import train_t2i
from auraflow import to_diffusers_config, to_theirs
from cache import SCHEMA, Cache, TextFormat, write_shard
from data_t2i import KnownText, Prepared, Samples, loader
from measure import interleaved, median, report, spread
from mmdit import PRESETS, Linear, MMDiT, MMDiTConfig
from report_t2i import PEAK_TFLOPS
from sample_t2i import Graphed
from step_parts import bare_step, parts, ranges, trainer_steps

MFU = 0.55  # share of the peak that a training step is taken to reach: the demand, not a claim
GPU = "H100"
GPU_PRESETS = ("0.2b", "1b", "auraflow-6.8b")


# ------------------------------------------------------------------------------------------------
# model: a training step, ours against diffusers'
# ------------------------------------------------------------------------------------------------


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """A plain matrix product, and its FLOPs: the ceiling that everything else is held against."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


class Size(NamedTuple):
    config: MMDiTConfig
    batch: int
    side: int  # of the square latent
    tokens: int  # of text


def aura(**changes) -> MMDiTConfig:
    return replace(PRESETS["auraflow-6.8b"], **changes)


SIZES = {
    "cpu": Size(aura(dim=384, head_dim=64, n_layers=8, n_double_layers=2, text_dim=512), 4, 32, 64),
    "digits": Size(PRESETS["digits"], batch=64, side=28, tokens=1),
    "0.2b": Size(aura(dim=768, n_layers=16, n_double_layers=2), 64, 32, 64),
    "1b": Size(aura(dim=1536, n_layers=20, n_double_layers=3), 32, 32, 64),
    "aura-width": Size(aura(n_layers=8, n_double_layers=1), 32, 32, 64),
    "aura-width-512": Size(aura(n_layers=8, n_double_layers=1), 8, 64, 256),
}  # fmt: skip


class Theirs(torch.nn.Module):
    """diffusers' AuraFlow behind our signature, with our weights."""

    def __init__(self, model: MMDiT):
        from diffusers import AuraFlowTransformer2DModel

        super().__init__()
        self.network = AuraFlowTransformer2DModel(**to_diffusers_config(model.config))
        state = to_theirs(model.state_dict(), model.config, "diffusers")
        self.network.load_state_dict(state)

    def forward(self, x, t, text):
        return self.network(x.to(self.network.dtype), text, timestep=t, return_dict=False)[0]


def step_of(network: torch.nn.Module, size: Size, device: torch.device) -> Callable:
    """A whole training step on one fixed batch: loss, gradients, AdamW."""
    config = size.config
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, config.in_channels, size.side, size.side)
    data, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    text = torch.randn(size.batch, size.tokens, config.text_dim, generator=generator).to(device)
    text = text.to(next(network.parameters()).dtype)
    t = torch.rand(size.batch, generator=generator).to(device)
    graphs = device.type == "cuda"  # AdamW must be told that it may be captured
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True, capturable=graphs)

    def step():
        loss = rf.rf_loss(network, data, text, t=t, noise=noise).mean()
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    return step


def tuned(step: Callable, how: list[str]) -> Callable:
    """The step with cpu.py's product unless `how` says mkl."""

    def chosen():
        cpu.use(False if "mkl" in how else None)
        return step()

    return chosen


def graphed(step: Callable) -> Callable:
    """The whole step as one CUDA graph: no kernel is launched from Python any more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def variants(size: Size, device: torch.device, dtype: torch.dtype, names: list[str]):
    """name → a training step, all from the same weights."""
    torch.manual_seed(0)
    first = MMDiT(size.config)
    steps = {}
    for name in names:
        whose, *how = name.split()
        network = MMDiT(size.config) if whose == "ours" else Theirs(first)
        if whose == "ours":
            network.load_state_dict(first.state_dict())
        network.to(device, dtype)
        if "compiled" in how and whose == "ours":
            network.compile_blocks()
        elif "compiled" in how:
            network.network = torch.compile(network.network)
        steps[name] = tuned(step_of(network, size, device), how)
        if "graph" in how:
            steps[name] = graphed(steps[name])
    return steps


def model(args: argparse.Namespace):
    """A training step (loss, gradients, AdamW), ours and diffusers', against a plain product."""
    device, dtype = place()
    names = ["ours", "ours compiled", "diffusers", "diffusers compiled"]
    names[2:2] = ["ours mkl"] if device.type == "cpu" and cpu.available() else []
    rows = []
    for size_name in args.sizes or (["cpu", "digits"] if device.type == "cpu" else list(SIZES)[2:]):
        size = SIZES[size_name]
        mine = [n for n in names if size.config.residual == "auraflow" or n[:4] == "ours"]
        steps = variants(size, device, dtype, mine)
        if device.type == "cuda":
            steps |= variants(size, device, dtype, ["ours compiled graph"])
        multiply, product_flops = product(device, dtype)
        seconds = interleaved(steps | {"plain product": multiply}, device, args.repeats)
        with torch.device("meta"):
            counted = MMDiT(size.config)
        flops = 3 * size.batch * counted.flops_per_image(size.side, size.side, size.tokens)
        ceiling = product_flops / median(seconds["plain product"])
        for name, taken in seconds.items():
            rate = (product_flops if name == "plain product" else flops) / median(taken)
            images = size.batch / median(taken) if name in steps else float("nan")
            rows.append(
                {"size": size_name, "variant": name, "ms": 1e3 * median(taken),
                 "spread": spread(taken), "images_per_s": images, "tflops": rate / 1e12,
                 "of_ceiling": rate / ceiling, "over_ours": median(taken) / median(seconds["ours"]),
                 "peak_gib": peak_memory(steps.get(name), device)}
            )  # fmt: skip
    report(rows, args.out / "model.csv", bar="ms")


def peak_memory(step: Callable | None, device: torch.device) -> float:
    """GiB that the step needs at most, the other variants' weights included; NaN on a CPU."""
    if step is None or device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


# ------------------------------------------------------------------------------------------------
# blocks: what each choice of the network costs
# ------------------------------------------------------------------------------------------------


def apart(network: MMDiT) -> MMDiT:
    """q, k, v and the two SwiGLU inputs as products of their own, as most implementations have."""
    for name, module in network.named_modules():
        parts = {"qkv": 3, "up": 2}.get(name.rpartition(".")[2])
        if parts:
            module.forward = partial(_apart, module, parts)
    return network


def _apart(module: Linear, parts: int, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([module.product(x, w, None) for w in module.weight.chunk(parts)], dim=-1)


def blocks(args: argparse.Namespace):
    """Double or single blocks of equal parameters, fused or separate matrices, head_dim."""
    device, dtype = place()
    size = SIZES["cpu" if device.type == "cpu" else "0.2b"]
    base = size.config
    streams = base.n_layers + base.n_double_layers  # a double block has two
    shapes = {
        f"{double} double + {streams - 2 * double} single": replace(
            base, n_layers=streams - double, n_double_layers=double
        )
        for double in (0, base.n_double_layers, streams // 2)
    }
    shapes |= {
        f"head_dim {d}": replace(base, head_dim=d, base_dim=base.dim)
        for d in (64, 128, 256, base.dim)
        if base.dim % d == 0
    }
    shapes |= {"separate q k v and SwiGLU": base, "compiled": base}
    steps, flops = {}, {}
    for name, config in shapes.items():
        torch.manual_seed(0)
        network = MMDiT(config).to(device, dtype)
        flops[name] = 3 * size.batch * network.flops_per_image(size.side, size.side, size.tokens)
        if name == "compiled":
            network.compile_blocks()
        network = apart(network) if name.startswith("separate") else network
        steps[name] = tuned(step_of(network, size, device), [])
    seconds = interleaved(steps, device, args.repeats)
    first = f"{base.n_double_layers} double + {streams - 2 * base.n_double_layers} single"
    rows = [
        {"variant": name, "ms": 1e3 * median(taken), "spread": spread(taken),
         "tflops": flops[name] / median(taken) / 1e12,
         "time_over_base": median(taken) / median(seconds[first])}
        for name, taken in seconds.items()
    ]  # fmt: skip
    report(rows, args.out / "blocks.csv", bar="ms")


# ------------------------------------------------------------------------------------------------
# sample: how long a picture takes
# ------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace):
    """A guided 20-step sample: eager, compiled, and on a GPU with the network as a CUDA graph."""
    device, dtype = place()
    size, rows = SIZES["cpu" if device.type == "cpu" else "0.2b"], []
    hows = ["eager", "compiled"] + (["graph"] if device.type == "cuda" else ["mkl"])
    for batch in (1, 4) if device.type == "cpu" else (1, 16):
        steps = {}
        for how in hows:
            torch.manual_seed(0)
            network = MMDiT(size.config).to(device, dtype).eval()
            if how == "compiled":
                network.compile_blocks()
            network = Graphed(network) if how == "graph" else network
            steps[how] = tuned(sampler_of(network, size, batch, device), [how])
        seconds = interleaved(steps, device, args.repeats)
        rows += [
            {"batch": batch, "variant": how, "s": median(taken), "spread": spread(taken),
             "over_eager": median(taken) / median(seconds["eager"])}
            for how, taken in seconds.items()
        ]  # fmt: skip
    report(rows, args.out / "sample.csv", bar="s")


def sampler_of(
    network: rf.Model, size: Size, batch: int, device: torch.device, steps: int = 20
) -> Callable:
    config, generator = size.config, torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, size.side, size.side)
    noise = torch.randn(shape, generator=generator).to(device)
    text = torch.randn(batch, size.tokens, config.text_dim, generator=generator)
    text = text.to(device)
    null = torch.zeros_like(text[:1])
    return lambda: rf.sample(network, noise, text, null_text=null, cfg=3.0, steps=steps)


# ------------------------------------------------------------------------------------------------
# memory: what it costs to give memory back to the system (cpu.keep_memory)
# ------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace):
    """Chapter 1's training step and sampling with freed memory kept, and given back as usual."""
    if args.child:
        print(json.dumps(memory_child(args.child == "kept")))
        return
    found: dict[str, list[dict]] = {"kept": [], "usual": []}
    for _ in range(args.repeats):  # malloc's ways are a process's own: processes take turns
        for how, measured in found.items():
            command = [sys.executable, __file__, "memory", "--child", how]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured.append(json.loads(done.stdout))
    rows = []
    for what in ("training step, batch 64", "24 guided steps, batch 128"):
        kept = median([measured[what] for measured in found["kept"]])
        for how, measured in found.items():
            ms = [m[what] for m in measured]
            rows.append({"what": what, "memory": how, "ms": median(ms), "spread": spread(ms),
                         "over_kept": median(ms) / kept})  # fmt: skip
    report(rows, args.out / "memory.csv", bar="ms")


def memory_child(keep: bool) -> dict[str, float]:
    """Milliseconds of each, in this process."""
    if keep:
        cpu.keep_memory()
    cpu.use()
    device, size = torch.device("cpu"), SIZES["digits"]
    torch.manual_seed(0)
    network = MMDiT(size.config)
    steps = {
        "training step, batch 64": step_of(network, size, device),
        "24 guided steps, batch 128": sampler_of(network, size, 128, device, steps=24),
    }
    return {
        name: 1e3 * median(interleaved({name: step}, device, repeats=5, inner=inner)[name])
        for (name, step), inner in zip(steps.items(), (40, 1), strict=True)
    }


def place() -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32


# ------------------------------------------------------------------------------------------------
# step: train_t2i.py's own loop, part by part
# ------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace):
    """train_t2i.py's whole step: over a bare one, and where its time goes (a table and a trace)."""
    first = os.environ.get("RANK", "0") == "0"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--preset", args.preset, "--out", folder, *args.options]
        run = train_t2i.build_run(train_t2i.build_parser().parse_args(options))
        bare, taken = bare_step(run), {"trainer": [], "bare": []}
        with mock.patch.object(run, "save"), mock.patch.object(run, "evaluate"):
            for turn in range(args.repeats + 1):  # the first turn warms up
                seconds = trainer_steps(run, args.steps)
                bare_seconds = interleaved({"bare": bare}, run.engine.device, args.steps)["bare"]
                if turn:
                    taken["trainer"] += seconds
                    taken["bare"] += bare_seconds
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
            with torch.profiler.profile(activities=activities) as profile, ranges(run):
                seconds = trainer_steps(run, args.steps)
        run.bar.close()
        if first:
            rows = parts(profile, len(seconds) + 1, {k: median(v) for k, v in taken.items()})
            report(rows, args.out / "step.csv", bar="ms")
            profile.export_chrome_trace(str(args.out / "step_trace.json.gz"))
            print(f"wrote {args.out / 'step_trace.json.gz'}: open it in ui.perfetto.dev")


# ------------------------------------------------------------------------------------------------
# data: is the loader ever the slower one?
# ------------------------------------------------------------------------------------------------


def demand(preset: str, size: int, tokens: int) -> float:
    """Images/s that one GPU takes at MFU of its dense bf16 peak: training is three forwards."""
    config = replace(PRESETS[preset], max_grid=size // 16, text_dim=2048)
    with torch.device("meta"):
        model = MMDiT(config)
    flops = 3 * model.flops_per_image(size // 8, size // 8, tokens)
    return MFU * PEAK_TFLOPS[GPU] * 1e12 / flops


def made_up_cache(folder: Path, size: int, form: TextFormat, length: int, rows: int) -> Cache:
    """Latents and features of the real sizes, random; four shards."""
    rng, shards = np.random.default_rng(0), []
    (folder / "shards").mkdir(parents=True)
    for k in range(4):
        made = []
        for i in range(rows // 4):
            features = torch.zeros(form.tokens, form.dim)
            features[:length] = torch.randn(length, form.dim) * 0.1
            moments = rng.standard_normal((2, 4, size // 8, size // 8)).astype(np.float16)
            made.append(
                {"row": k * rows // 4 + i, "image": moments.tobytes(), "captions": ["made up"],
                 "text": [form.pack(features)]}
            )  # fmt: skip
        shards.append(write_shard(folder, f"shards/{k}.arrow", "train", (size, size), made))
    manifest = {
        "schema": SCHEMA, "text_format": form._asdict(), "null_text": "", "size": size,
        "shards": [s._asdict() for s in shards], "captions": [{"column": "text", "weight": 1.0}],
        "image": {"kind": "moments", "channels": 4, "factor": 8}, "text_encoder": "made up",
        "vae": "made up", "text_tokens": form.tokens,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Cache(folder)


class LatentShape:
    """Stands for the VAE: the loader only asks for the latents' shape."""

    channels, factor, random = 4, 8, True


def rows_per_second(cache: Cache, workers: int, batch: int, repeats: int) -> list[float]:
    source = Prepared([cache], batch, seed=0)
    samples = Samples(source, KnownText(cache), LatentShape(), seed=0)
    batches = loader(
        samples, seen=0, micro_batch=batch, rank=0, world_size=1, workers=workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    most = 4 + 3 * workers  # started, and what the workers made ahead is used up
    for _ in islice(batches, most):
        pass
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in islice(batches, most):
            pass
        rates.append(most * batch / (time.perf_counter() - start))
    return rates


def data(args: argparse.Namespace):
    """Rows/s by workers, bits of the text and length of the caption, against the presets' need."""
    torch.set_num_threads(1)  # as in a worker
    needs = {preset: demand(preset, args.size, args.tokens) for preset in GPU_PRESETS}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in (16, 8):
            for length in (args.length, args.tokens):
                form = TextFormat(args.tokens, 2048, bits)
                place = Path(folder) / f"{bits} {length}"
                cache = made_up_cache(place, args.size, form, length, 1024)
                for workers in args.workers:
                    rates = rows_per_second(cache, workers, 32, args.repeats)
                    row = {
                        "text_bits": bits, "caption_tokens": length, "workers": workers,
                        "rows_per_s": float(np.median(rates)),
                        "spread": float(np.ptp(rates) / np.median(rates)),
                    }  # fmt: skip
                    row |= {f"x_{p}": row["rows_per_s"] / need for p, need in needs.items()}
                    found.append(row)
    print(
        f"{args.size}² pixels, {args.tokens} text tokens; a {GPU} at {MFU:.0%} MFU takes images/s:"
    )
    print("  " + ", ".join(f"{preset} {need:.0f}" for preset, need in needs.items()))
    print("x_preset: rows/s over that")
    report(found, args.out / "data.csv", bar="rows_per_s")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("data", help=data.__doc__)
    part.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    part.add_argument("--tokens", type=int, default=256, help="text tokens (default: 256)")
    part.add_argument("--length", type=int, default=64, help="tokens of a usual caption (64)")
    part.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    part.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder")
    part = commands.add_parser("model", help=model.__doc__)
    part.add_argument("--sizes", nargs="+", choices=list(SIZES), help="(default: the device's)")
    part.add_argument("--repeats", type=int, default=9, help="turns of each variant (default: 9)")
    for name, repeats in (("blocks", 9), ("sample", 5), ("memory", 3)):
        part = commands.add_parser(name, help=globals()[name].__doc__)
        part.add_argument("--repeats", type=int, default=repeats, help=f"(default: {repeats})")
        if name == "memory":
            part.add_argument("--child", choices=["kept", "usual"], help=argparse.SUPPRESS)
    part = commands.add_parser("step", help=step.__doc__)
    part.add_argument("--preset", default="tiny", help="of train_t2i.py (default: tiny)")
    part.add_argument("--steps", type=int, default=20, help="of one turn (default: 20)")
    part.add_argument("--repeats", type=int, default=3, help="turns of trainer and bare step (3)")
    part.add_argument("options", nargs="*", help="further options of train_t2i.py, after --")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    args = parser.parse_args(argv)
    if args.command != "memory":
        cpu.keep_memory()
    try:
        globals()[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"throughput.py: {error}")


if __name__ == "__main__":
    main()
