"""How fast, measured side by side in one run.

    python -m experiments.throughput model       a training step, ours against diffusers'
    python -m experiments.throughput blocks      double or single, fused or separate, head_dim
    python -m experiments.throughput sample      a picture: eager, compiled, a CUDA graph a step
    python -m experiments.throughput memory      freed memory kept, or given back to the system
    python -m experiments.throughput step        train_t2i.py's whole step: where its time goes
    python -m experiments.throughput data        rows/s of the loader against what training takes

Every number is a median over repeats after a warm-up, with its spread; ratios are of numbers from
one run. A GPU computes in bf16, a CPU in fp32. Rows also go to a CSV and a bar chart in --out.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from math import nan
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import record_function

import rf
import train_t2i
from common import cpu
from common.auraflow import to_diffusers
from common.evaluate import Ranks
from common.log import PEAK_TFLOPS, progress_bar
from common.pipeline import settle_run
from common.settings import Options, option, parse
from common.start import Signals, begin, claim, mark, program
from experiments.measure import interleaved, report, summary
from inputs.encoders import TextFormat
from inputs.stored import SCHEMA
from mmdit import PRESETS, MMDiT, MMDiTConfig
from sample_t2i import Graphed
from tools.prepare import finish, write_chunk

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
INNER = 5 if CUDA else 1  # steps timed together: a GPU gets the next ones while it computes

# ------------------------------------------------------------------------------------------------
# What is measured: networks, and steps of training and sampling on one fixed batch
# ------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    config: MMDiTConfig
    batch: int
    side: int  # of the square latent
    tokens: int  # of text

    def training_flops(self) -> int:
        """Of a step: three forward passes."""
        with torch.device("meta"):
            model = MMDiT(self.config)
        return 3 * self.batch * model.flops_per_image(self.side, self.side, self.tokens)


def aura(**changes) -> MMDiTConfig:
    return replace(PRESETS["auraflow-6.8b"], **changes)


SIZES = {
    "cpu": Size(aura(dim=384, head_dim=64, n_layers=8, n_double_layers=2, text_dim=512), 4, 32, 64),
    "digits": Size(PRESETS["digits"], 64, 28, 1),
    "0.2b": Size(aura(dim=768, n_layers=16, n_double_layers=2), 64, 32, 64),
    "1b": Size(aura(dim=1536, n_layers=20, n_double_layers=3), 32, 32, 64),
    "aura-width": Size(aura(n_layers=8, n_double_layers=1), 16, 32, 64),
    "aura-width-512": Size(aura(n_layers=8, n_double_layers=1), 8, 64, 256),
}
HERE = list(SIZES)[2:] if CUDA else ["cpu", "digits"]  # what this device is measured with
BASE = "0.2b" if CUDA else "cpu"


def built(config: MMDiTConfig, how="", device=DEVICE, dtype=DTYPE) -> MMDiT:
    """A network with the same weights each time. how: compiled; mkl or onednn, whose product."""
    torch.manual_seed(0)
    network = MMDiT(config).to(device, dtype)
    if "compiled" in how:
        network.compile_blocks()
    product = {"mkl": F.linear, "onednn": cpu.linear}.get(how)
    for module in network.modules() if product else ():
        module.product = product
    return network


def batch_of(size: Size, device) -> tuple[Tensor, ...]:
    """data, noise, text and t, the same each time."""
    generator = torch.Generator().manual_seed(0)
    image = (size.batch, size.config.in_channels, size.side, size.side)
    shapes = (image, image, (size.batch, size.tokens, size.config.text_dim))
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return *drawn, torch.rand(size.batch, generator=generator).to(device)


def training(model: rf.Model, parameters, size: Size, passes: int = 1) -> Callable:
    """A whole training step: loss and gradients (so many times), AdamW."""
    parameters = list(parameters)
    data, noise, text, t = batch_of(size, parameters[0].device)
    # AdamW must be told that a CUDA graph may hold it
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True, capturable=parameters[0].is_cuda)

    def step():
        for _ in range(passes):
            rf.rf_loss(model, data, text, t=t, noise=noise).mean().backward()
        adamw.step()
        adamw.zero_grad()

    return step


def sampling(model: rf.Model, size: Size, steps: int = 20, device=DEVICE) -> Callable:
    """Guided pictures."""
    _, noise, text, _ = batch_of(size, device)
    how = {"null_text": torch.zeros_like(text[:1]), "cfg": 3.0, "steps": steps}
    return partial(rf.sample, model, noise, text, **how)


# ------------------------------------------------------------------------------------------------
# model: a training step, ours against diffusers'
# ------------------------------------------------------------------------------------------------


def variant(name: str, size: Size) -> tuple[Callable, float]:
    """A training step, and the most memory that it takes with its network, GiB (NaN on a CPU)."""
    before = torch.cuda.memory_allocated()
    whose, _, how = name.partition(" ")
    if whose == "ours":
        network = model = built(size.config, how)
    else:
        network = to_diffusers(built(size.config))
        inner = torch.compile(network) if how else network

        def model(x, t, text):
            return inner(x.to(DTYPE), text.to(DTYPE), timestep=t, return_dict=False)[0]

    step = training(model, network.parameters(), size)
    if not CUDA:
        return step, nan
    torch.cuda.reset_peak_memory_stats()
    if "graph" in how:  # of the whole step: no kernel is launched from Python any more
        step = Graphed(step).capture()[0].replay
    step()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 2**30


def model_rows(size: Size, repeats: int) -> pd.DataFrame:
    """A row a variant, and one for a plain matrix product: the ceiling."""
    names = ["ours", "ours compiled"]
    names += ["ours compiled graph"] * CUDA + ["ours mkl", "ours onednn"] * (
        not CUDA and cpu.present()
    )
    names += ["diffusers", "diffusers compiled"] * (size.config.residual == "auraflow")
    steps, gib = {}, {}
    for name in names:
        steps[name], gib[name] = variant(name, size)
    n = 8192 if CUDA else 2048
    a, b, out = torch.randn(3, n, n, device=DEVICE, dtype=DTYPE)
    steps["plain product"] = partial(torch.mm, a, b, out=out)
    table = interleaved(steps, repeats, INNER)
    flops = pd.Series(size.training_flops(), names).reindex(table.index, fill_value=2 * n**3)
    table["images_per_s"] = 1e3 * size.batch / table.ms[names]
    table["tflops"] = flops / table.ms / 1e9
    table["of_ceiling"] = table.tflops / table.tflops["plain product"]
    table["over_ours"] = table.ms / table.ms["ours"]
    table["peak_gib"] = pd.Series(gib)
    return table


def model(args: "Settings"):
    """A training step (loss, gradients, AdamW), ours and diffusers', against a plain product."""
    tables = {}
    for name in args.sizes:
        tables[name] = model_rows(SIZES[name], args.repeats)
        gc.collect()  # compiled networks lie in circles: the next size needs their memory
        torch.cuda.empty_cache()
    report(pd.concat(tables, names=["size", "variant"]).reset_index(), args.out / "model.csv")


# ------------------------------------------------------------------------------------------------
# blocks: what each choice of the network costs
# ------------------------------------------------------------------------------------------------


def apart(network: MMDiT) -> MMDiT:
    """q, k, v and the two SwiGLU inputs as products of their own, as most implementations have."""

    def forward(module, parts: int, x: Tensor) -> Tensor:
        return torch.cat([module.product(x, w, None) for w in module.weight.chunk(parts)], dim=-1)

    for name, module in network.named_modules():
        for matrix, parts in {"qkv": 3, "up": 2}.items():
            if name.endswith(matrix):
                module.forward = partial(forward, module, parts)
    return network


def blocks(args: "Settings"):
    """Double or single blocks of equal parameters, fused or separate matrices, head_dim."""
    size = SIZES[BASE]
    base, configs = size.config, {}
    streams = base.n_layers + base.n_double_layers  # a double block has two
    for double in (base.n_double_layers, 0, streams // 2):
        config = replace(base, n_layers=streams - double, n_double_layers=double)
        configs[f"{double} double + {streams - 2 * double} single"] = config
    for d in (64, 128, 256, base.dim):
        if base.dim % d == 0:
            configs[f"head_dim {d}"] = replace(base, head_dim=d, base_dim=base.dim)
    configs |= {"separate q k v and SwiGLU": base, "compiled": base}
    steps, flops = {}, {}
    for name, config in configs.items():
        network, sized = built(config, name), size._replace(config=config)
        network = apart(network) if "separate" in name else network
        steps[name] = training(network, network.parameters(), sized)
        flops[name] = sized.training_flops()
    table = interleaved(steps, args.repeats, INNER).rename_axis("variant")
    table["tflops"] = pd.Series(flops) / table.ms / 1e9
    table["time_over_base"] = table.ms / table.ms.iloc[0]
    report(table.reset_index(), args.out / "blocks.csv")


# ------------------------------------------------------------------------------------------------
# sample: how long a picture takes
# ------------------------------------------------------------------------------------------------


def sample(args: "Settings"):
    """A guided 20-step sample: eager, compiled, and on a GPU with the network as a CUDA graph."""
    size, tables = SIZES[BASE], {}
    for batch in (1, 16) if CUDA else (1, 4):
        steps = {}
        for how in ("eager", "compiled", "graph" if CUDA else "mkl"):
            network = built(size.config, how)
            network = Graphed(network) if how == "graph" else network
            steps[how] = sampling(network, size._replace(batch=batch))
        table = tables[batch] = interleaved(steps, args.repeats)
        table["over_eager"] = table.ms / table.ms["eager"]
    report(pd.concat(tables, names=["batch", "variant"]).reset_index(), args.out / "sample.csv")


# ------------------------------------------------------------------------------------------------
# memory: what it costs to give memory back to the system (cpu.keep_memory)
# ------------------------------------------------------------------------------------------------


def memory(args: "Settings"):
    """Chapter 1's training step and sampling with freed memory kept, and given back as usual."""
    found = {"kept": [], "usual": []}
    # how malloc behaves is settled once in a process: a new one for each measurement
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(args.repeats):
            for how, rounds in found.items():
                rounds.append(pool.apply(digits_ms, [how == "kept"]))
    tables = {how: summary(rounds) for how, rounds in found.items()}
    for table in tables.values():
        table["over_kept"] = table.ms / tables["kept"].ms
    report(pd.concat(tables, names=["memory", "what"]).reset_index(), args.out / "memory.csv")


def digits_ms(keep: bool, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each, in this process, on the CPU."""
    if keep:
        cpu.keep_memory()
    cpu.use()
    size = SIZES["digits"]
    network = built(size.config, device="cpu", dtype=torch.float32)
    train = training(network, network.parameters(), size)
    draw = sampling(network, size._replace(batch=128), steps=24, device="cpu")
    return {
        **interleaved({"training step, batch 64": train}, repeats, inner=40).ms,
        **interleaved({"24 guided steps, batch 128": draw}, repeats).ms,
    }


# ------------------------------------------------------------------------------------------------
# step: train_t2i.py's own loop, part by part
# ------------------------------------------------------------------------------------------------


def step(args: "Settings"):
    """train_t2i.py's whole step: over a bare one, and where its time goes (a table and a trace)."""
    cls = train_t2i.Settings
    typed = parse(cls, args.options, train_t2i.__doc__, train_t2i.RECIPES)
    ranks, device = train_t2i.start_ranks(typed.get("threads")), train_t2i.local_device()
    own = [{"precision": "bf16" if train_t2i.native_bf16(device) else "fp32"}]
    with tempfile.TemporaryDirectory() as folder:
        typed |= {"out": Path(folder)}
        settings, rows = settle_run(cls, typed, {}, device, train_t2i.recipe_of, own=own)
        run = train_t2i.Run(settings, rows, ranks, None)
        run.open()
        batches, signals = run.batches(), Signals()
        with progress_bar(settings.samples, 0, ranks.rank == 0) as bar:

            def trainer():  # a turn of train_t2i.train's loop
                train_t2i.train_step(run, batches)
                with record_function("part log"):
                    run.end_step(bar)
                with record_function("part signals"):
                    run.requests.exchange(signals.take())

            times = interleaved({"trainer": trainer, "bare": bare(run)}, args.repeats, args.steps)
            with torch.profiler.profile() as profile:
                for _ in range(args.steps):
                    trainer()
        dist.destroy_process_group()
    if ranks.rank == 0:
        table = pd.concat([parts(profile, args.steps), times[["ms"]]]).rename_axis("part")
        table["of_step"] = table.ms / table.ms["trainer"]
        report(table.reset_index(), args.out / "step.csv")
        trace = str(args.out / "step_trace.json.gz")
        profile.export_chrome_trace(trace)
        print(f"wrote {trace}: open it in ui.perfetto.dev")


def bare(run: train_t2i.Run) -> Callable:
    """Loss, gradients and AdamW of the same network on one batch that is there already."""
    engine, compiles = run.engine, run.settings.compile
    how = "compiled" if compiles == "on" or (compiles == "auto" and CUDA) else ""
    network = built(run.config, how, engine.device, next(engine.module.parameters()).dtype)
    side, _ = max(run.rows.sides())
    micro_batch = engine.train_micro_batch_size_per_gpu()
    size = Size(run.config, micro_batch, side, run.rows.text.tokens)
    return training(network, network.parameters(), size, engine.gradient_accumulation_steps())


RANGES = {  # part → what the profiler calls it
    "data": ("part batch", "part encode"),
    "forward": ("part forward",),
    "backward": ("part backward",),
    "ZeRO-2 step": ("part step",),
    "AdamW": ("Optimizer.step#AdamW.step",),
    "Muon": ("part muon",),
    "averages": ("aten::_foreach_lerp_",),
    "log": ("part log",),
    "signals": ("part signals",),
    "communication, inside": ("gloo:", "nccl:"),
}


def parts(profile, steps: int) -> pd.DataFrame:
    """part → milliseconds a step on the host, and of the kernels that it launches on the GPU.

    The step is without AdamW, which it calls, and AdamW without Muon and the averages, which hooks
    of it make. Communication is also inside backward and step.
    """
    events = profile.key_averages()

    def ms(names: tuple[str, ...], clock: str, device=DeviceType.CPU) -> float:
        found = [e for e in events if e.device_type == device and e.key.startswith(names)]
        return sum(getattr(e, clock) for e in found) / 1e3 / steps

    clocks = {"ms": "cpu_time_total", "device_ms": "device_time_total"}
    table = pd.DataFrame(
        {
            column: {part: ms(names, clock) for part, names in RANGES.items()}
            for column, clock in clocks.items()
        }
    )
    # autograd launches from a thread of its own, NCCL outside of any range
    own = ms(("autograd::engine::evaluate_function",), "device_time_total")
    nccl = ms(("ncclDevKernel",), "device_time_total", DeviceType.CUDA)
    table.loc["backward", "device_ms"] += own
    table.loc["communication, inside", "device_ms"] = nccl
    table.loc["ZeRO-2 step"] -= table.loc["AdamW"]
    table.loc["AdamW"] -= table.loc["averages"] + table.loc["Muon"]
    return table


# ------------------------------------------------------------------------------------------------
# data: is the loader ever the slower one?
# ------------------------------------------------------------------------------------------------

MFU = 0.55  # share of the peak that a training step is taken to reach: the demand, not a claim
GPU = "H100"
GPU_PRESETS = ("0.2b", "1b", "auraflow-6.8b")
LOADED = 32  # rows in a batch


def demand(preset: str, side: int, tokens: int) -> float:
    """Images/s that one GPU takes at MFU of its dense bf16 peak."""
    flops = Size(PRESETS[preset], 1, side, tokens).training_flops()
    return MFU * PEAK_TFLOPS[GPU] * 1e12 / flops


def made_up(folder: Path, side: int, form: TextFormat, length: int, rows: int = 1024):
    """A prepared folder of four chunks: random latents and features of the real sizes."""
    files = [folder / "chunks" / f"{k}.json" for k in range(4)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        made = [
            {
                "row": 0,
                "image": torch.randn(2, 4, side, side).half().numpy().tobytes(),
                "captions": ["made up"],
                "text": [form.pack(0.1 * torch.randn(length, form.dim))],
                "where": ("train", 8 * side, 8 * side),
            }
            for _ in range(rows // len(files))
        ]
        write_chunk(file, made, [], "", {})
    facts = {
        "schema": SCHEMA,
        "made": "",
        "size": 8 * side,
        "noise_seed": 0,
        "text_encoder": "hash",
        "text_tokens": form.tokens,
        "text_format": asdict(form),
        "null_text": "",
        "vae": "pixels",
        "models": ["", ""],
        "image": {"kind": "moments", "channels": 4, "factor": 8},
        "captions": [{"column": "text", "weight": 1.0}],
    }
    (folder / "manifest.json").write_text(json.dumps(finish(files, facts)))


def rows_per_second(folder: Path, workers: int, repeats: int) -> dict[str, float]:
    typed = {"data": [str(folder)], "batch_size": LOADED, "workers": workers}
    how = (typed, {}, torch.device("cpu"), lambda preset: {})
    settings, rows = settle_run(train_t2i.Settings, *how)
    rows.random = True  # as with a VAE: a noise of its own picks the latent
    batches = train_t2i.loader(rows, settings, 0, LOADED, Ranks(), CUDA)
    enough = 4 + 3 * workers  # more than the workers make ahead
    ((ms, spread),) = interleaved({"": partial(next, batches)}, repeats, enough).values
    return {"rows_per_s": 1e3 * LOADED / ms, "spread": spread}


def data(args: "Settings"):
    """Rows/s by workers, bits of the text and length of the caption, against the presets' need."""
    torch.set_num_threads(1)  # as in a worker
    side, rows = args.size // 8, []
    with tempfile.TemporaryDirectory() as parent:
        for bits, length in product((16, 8), sorted({args.length, args.tokens})):
            folder = Path(parent) / f"{bits} {length}"
            made_up(folder, side, TextFormat(args.tokens, 2048, bits), length)
            for workers in args.workers or (0, 1, 2, 4):
                row = {"text_bits": bits, "caption_tokens": length, "workers": workers}
                rows.append(row | rows_per_second(folder, workers, args.repeats))
    table = pd.DataFrame(rows)
    print(f"{args.size}² pixels, {args.tokens} text tokens; images/s of a {GPU} at {MFU:.0%} MFU:")
    for preset in GPU_PRESETS:
        need = demand(preset, side, args.tokens)
        print(f"  {preset} takes {need:.0f}; x_{preset}: rows/s over that")
        table[f"x_{preset}"] = table.rows_per_s / need
    report(table, args.out / "data.csv", "rows_per_s")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

COMMANDS = {f.__name__: f for f in (model, blocks, sample, memory, step, data)}


@dataclass(frozen=True)
class Settings(Options):
    command: str = option(None, "one of the above", choices=COMMANDS, positional=True)
    options: list[str] = option([], "step: options of train_t2i.py, after --", positional=True)
    out: Path = option(Path("runs/throughput"), "folder")
    repeats: int = option(5, "turns of each variant", least=1)
    sizes: list[str] = option(HERE, f"model: some of {', '.join(SIZES)}", choices=SIZES)
    steps: int = option(20, "step: of one turn", least=1)
    size: int = option(256, "data: pixels a side", least=8)
    tokens: int = option(256, "data: text tokens", least=1)
    length: int = option(64, "data: tokens of a usual caption", least=1)
    workers: list[int] = option([], "data: of the loader (0 1 2 4)", least=0)


@program("experiments.throughput")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, "experiments.throughput")
    begin(DEVICE)
    mark(args.out, "experiments.throughput")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
