"""What only a GPU can prove: the project on the device that is here, check by check.

    python -m tests.gpu_check --out runs/gpu_check           one GPU, about nine minutes
    python -m tests.gpu_check --out runs/gpu_check --two     two ranks, too (on one GPU: over gloo)
    python -m tests.gpu_check --out runs/gpu_check --cpu     what a CPU can do; CI runs this
    python -m tests.gpu_check --out runs/gpu_check --only B  one section

    A machine     what it is, and how fast its products are
    B numbers     network, attention, optimizers and averages against double precision
    C chapter 1   trains, resumes, and does not wait for the device
    D chapter 2   DeepSpeed on one rank: precision, compiled blocks, memory, bad steps, signals
    E speed       against diffusers and the plain product; the bar's figures
    F two ranks   what ZeRO-2 splits, and how it ends

A line a check: name, what was measured, the rule, ok or FAILED. All of them go to OUT/checks.csv.
Each section is a process of its own with a limit of time, so a crash hides no other section. The
exit status is 0 if all hold.
"""

import argparse
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rf
import train_mnist
import train_t2i
from common import log, muon
from common.pipeline import checkpoints, read_averages
from common.start import begin
from experiments.measure import interleaved
from inputs import digits
from mmdit import PRESETS, MMDiT, MMDiTConfig, load_model
from tests.host_reads import HostReads

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"A": 60, "B": 200, "C": 150, "D": 420, "E": 420, "F": 300}  # seconds
HERE = [sys.executable, "-m", "tests.gpu_check"]
NO_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class Check(NamedTuple):
    name: str
    measured: str
    rule: str
    ok: bool


def most(name: str, measured: float, limit: float) -> Check:
    return Check(name, f"{measured:.4g}", f"≤ {limit:g}", measured <= limit)


def least(name: str, measured: float, limit: float) -> Check:
    return Check(name, f"{measured:.4g}", f"≥ {limit:g}", measured >= limit)


def holds(name: str, truth: bool, said: str = "") -> Check:
    return Check(name, said or str(bool(truth)), "holds", bool(truth))


def told(name: str, said) -> Check:
    """Measured and written down; nothing is asked of it."""
    return Check(name, str(said), "-", True)


def off(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# ------------------------------------------------------------------------------------------------
# A machine
# ------------------------------------------------------------------------------------------------


def machine(device: torch.device, out: Path) -> Iterator[Check]:
    yield told("A0 versions", f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(), log.device_peak(device)
        yield told("A0 device", f"{name}, CUDA {torch.version.cuda}, cuDNN {cudnn()}")
        yield holds("A1 its peak is in log.PEAK_TFLOPS", peak is not None, f"{peak} TFLOP/s")
        yield holds("A1 bf16 is its own", train_t2i.native_bf16(device))
        yield holds("A1 cuDNN's attention is off", not torch.backends.cuda.cudnn_sdp_enabled())
        yield holds("A1 fp32 products in TF32", torch.get_float32_matmul_precision() == "high")
        found = product_tflops(8192, torch.bfloat16, device)
        yield least("A2 bf16 product over the peak", found / (peak or 1e9), 0.65)
    else:
        names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
        for name, peak in zip(names, (989, 312), strict=True):
            with mock.patch("torch.cuda.get_device_name", lambda device, name=name: name):
                found = log.device_peak(torch.device("cuda", 0))
            yield holds(f"A1 the peak of {name}", found == peak, f"{found} TFLOP/s")
        if Path("/proc/cpuinfo").exists():
            tiles = "amx_bf16" in Path("/proc/cpuinfo").read_text()
            native = train_t2i.native_bf16(device)
            yield holds("A1 bf16 by default where there are AMX tiles", native == tiles)
        yield least("A2 GFLOP/s", 1e3 * product_tflops(512, torch.float32, device), 1)


def cudnn() -> int:
    return torch.backends.cudnn.version()


def seconds(step: Callable, calls: int) -> float:
    """Of one call, of many in a row."""
    return interleaved({"step": step}, 1, calls).ms["step"] / 1e3


def product_tflops(n: int, dtype: torch.dtype, device) -> float:
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, 20) / 1e12


# ------------------------------------------------------------------------------------------------
# B numbers
# ------------------------------------------------------------------------------------------------

AURA = {"n_layers": 3, "n_double_layers": 1, "text_dim": 64, "residual": "auraflow"}
NETWORKS = {  # name → config, side of the picture
    "digits": (PRESETS["digits"], 28),
    "tiny": (PRESETS["tiny"], 20),
    "auraflow residual": (MMDiTConfig(3, 2, 128, 64, **AURA), 16),
    "heads of 256": (
        MMDiTConfig(4, 2, 512, 256, n_layers=2, n_double_layers=1, text_dim=64, max_grid=8), 16,
    ),
}  # fmt: skip


def case(name: str) -> tuple[MMDiT, tuple[Tensor, ...], Tensor]:
    """A network whose weights all differ from zero, an input, and the gradient of its output."""
    torch.manual_seed(0)
    config, side = NETWORKS[name]
    model = MMDiT(config)
    for parameter in model.parameters():
        fan_in = parameter.shape[1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    x = torch.randn(4, config.in_channels, side, side)
    t = torch.tensor([0.01, 0.3, 0.7, 0.999])
    return model, (x, t, torch.randn(4, 7, config.text_dim)), torch.randn_like(x)


def passed(model: MMDiT, given, cotangent, device, dtype, how: str = "") -> dict[str, Tensor]:
    """name → gradient of the weights, and the output as "output"."""
    copy = MMDiT(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(device, dtype)
    if how:
        copy.compile_blocks(**({} if how == "inductor" else {"backend": how}))
    x, t, text = (value.to(device) for value in given)
    if dtype == torch.float64:
        x, text = x.double(), text.double()
    velocity = copy(x, t, text)
    velocity.backward(cotangent.to(velocity))
    return {name: p.grad for name, p in copy.named_parameters()} | {"output": velocity}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Of the output, and of the gradient that is furthest off."""
    errors = {name: off(found[name], expected[name]) for name in expected}
    return errors.pop("output"), max(errors.values())


def networks(device: torch.device, out: Path) -> Iterator[Check]:
    cuda = device.type == "cuda"
    for name in NETWORKS:
        model, given, cotangent = case(name)
        both = partial(passed, model, given, cotangent)
        exact = both("cpu", torch.float64)
        torch.set_float32_matmul_precision("highest")
        # The sinusoids of 1000·t are of fp32 in both, and their angles may differ in the last bit.
        output, gradient = worst(both(device, torch.float32), exact)
        yield most(f"B1 {name}: output, fp32", output, 1e-4 if cuda else 1e-5)
        yield most(f"B1 {name}: worst gradient, fp32", gradient, 3e-4 if cuda else 1e-5)
        if cuda:
            torch.set_float32_matmul_precision("high")
            output, gradient = worst(both(device, torch.float32), exact)
            yield most(f"B2 {name}: output, TF32", output, 5e-3)
            yield most(f"B2 {name}: worst gradient, TF32", gradient, 1.5e-2)
        half = {key: value.bfloat16().float() for key, value in model.state_dict().items()}
        model.load_state_dict(half)  # so that only the arithmetic differs
        exact = both("cpu", torch.float64)
        output, gradient = worst(both(device, torch.bfloat16), exact)
        yield most(f"B3 {name}: output, bf16", output, 2e-2)
        yield most(f"B3 {name}: worst gradient, bf16", gradient, 6e-2)
        if cuda or name == "tiny":
            how = "inductor" if cuda else "aot_eager"
            compiled, grad_compiled = worst(both(device, torch.bfloat16, how), exact)
            yield most(f"B3 {name}: output, compiled over eager", compiled / output, 1.2)
            yield most(f"B3 {name}: gradient, compiled over eager", grad_compiled / gradient, 1.3)


def attention(device: torch.device, out: Path) -> Iterator[Check]:
    """Fused kernels against plain sums in fp32. q and k are normed, q k v are views of one."""
    cuda = device.type == "cuda"
    kernels = [SDPBackend.FLASH_ATTENTION]
    kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION] * cuda
    lengths = (17, 37, 276, 328, 520, 1044) if cuda else (17, 37)
    dtype = torch.bfloat16 if cuda else torch.float32
    for d, length in [(d, n) for d in (32, 64, 256) for n in lengths]:
        heads = max(1, 64 // 4)
        torch.manual_seed(length)
        packed = torch.randn(4, length, 3, heads, d, device=device).to(dtype)
        weight = torch.randn(4, heads, length, d, device=device)
        expected, times = attended(packed.float(), weight, SDPBackend.MATH), {}
        for kernel in kernels:
            try:
                found = attended(packed, weight, kernel)
                times[kernel.name] = seconds(partial(attended, packed, weight, kernel), 3)
            except RuntimeError as error:  # this card has none for such heads
                yield told(f"B4 {kernel.name} d {d} L {length}", f"not here: {error}"[:80])
                continue
            worst_of = max(map(off, found, expected))
            finite = all(x.isfinite().all() for x in found)
            rule = 2e-2 if cuda else 1e-4
            yield most(f"B4 {kernel.name} d {d} L {length}", worst_of if finite else 1e9, rule)
        if cuda:
            ms = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in times.items())
            yield told(f"B4 ms d {d} L {length}", ms)
    if cuda:  # whether the kernel that is switched off would be safe
        bad = sum(
            not x.isfinite().all()
            for seed in range(200)
            for x in attended(*drawn(seed, device), SDPBackend.CUDNN_ATTENTION)
        )
        yield told("B4 cuDNN's tensors that are not finite in 200 draws", bad)


def drawn(seed: int, device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    packed = torch.randn(4, 328, 3, 16, 64, device=device).bfloat16()
    return packed, torch.randn(4, 16, 328, 64, device=device)


def attended(packed: Tensor, weight: Tensor, kernel) -> list[Tensor]:
    """Output and gradient of attention as mmdit.attend calls it."""
    packed = packed.detach().requires_grad_()
    q, k, v = packed.unbind(2)
    normed = (F.layer_norm(x, x.shape[-1:]) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (*normed, v))
    with sdpa_kernel(kernel):
        y = F.scaled_dot_product_attention(q, k, v)
    y.backward(weight.to(y))
    return [y, packed.grad]


def optimizers(device: torch.device, out: Path) -> Iterator[Check]:
    cuda = device.type == "cuda"
    scales = torch.tensor([0, 1e-30, 1e-20, 1e-8, 1.0]).repeat_interleave(8)

    def adam(device, dtype):
        w = torch.zeros(len(scales), device=device, dtype=dtype).requires_grad_()
        how = {"lr": 0.1, "betas": train_t2i.BETAS, "eps": train_t2i.EPS}
        adamw = torch.optim.AdamW([w], **how, fused=dtype == torch.float32)
        for step in range(20):
            noise = torch.randn(len(scales), generator=torch.Generator().manual_seed(step))
            w.grad = (scales * noise).to(w)
            adamw.step()
        return w.detach()

    found, exact = adam(device, torch.float32), adam("cpu", torch.float64)
    large = scales >= 1e-8
    yield most("B5 fused AdamW", off(found[large.to(device)], exact[large]), 1e-5)
    yield holds("B5 a weight without a gradient does not move", bool((found[:8] == 0).all()))

    def averages(device, dtype):
        model = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        adamw = torch.optim.AdamW([model.weight], lr=0)
        rf.keep_averages(adamw, [0.05])
        debug = device == "cuda" and torch.cuda.set_sync_debug_mode
        for step in range(20):
            moved = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            model.weight.data.add_(moved.to(model.weight))
            model.weight.grad = torch.zeros_like(model.weight)
            if debug:
                debug("error")
            adamw.step()
            if debug:
                debug("default")
        return adamw.state[model.weight]["ema_0.05"]

    # By the formula alone: code that averages nothing would agree with itself.
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    exact, gamma = torch.zeros_like(w), rf.gamma_from_sigma_rel(0.05)
    for step in range(20):
        w += torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).double()
        exact += (1 - (1 - 1 / (step + 1)) ** (gamma + 1)) * (w - exact)
    yield most("B6 averages after 20 steps", off(averages(device.type, torch.float32), exact), 1e-5)
    shapes = [(3, 96, 96), (1, 256, 96), (1, 96, 256)]
    torch.manual_seed(0)
    row = torch.randn(sum(n * r * c for n, r, c in shapes))
    found = muon.directions(row.to(device), shapes).cpu()
    exact = [
        muon.orthogonal(piece.view(n, r, c)).flatten() * (r / c) ** 0.5
        for piece, (n, r, c) in zip(
            row.double().split([n * r * c for n, r, c in shapes]), shapes, strict=True
        )
    ]
    exact = torch.cat(exact)
    yield most("B7 Muon's directions", off(found, exact), 5e-2 if cuda else 1e-3)
    for piece, (n, r, c) in zip(
        found.split([n * r * c for n, r, c in shapes]), shapes, strict=True
    ):
        values = torch.linalg.svdvals(piece.view(n, r, c) / (r / c) ** 0.5)
        low, high = float(values.quantile(0.1)), float(values.max())
        yield holds(
            f"B7 singular values of {r} x {c}", low > 0.4 and high < 1.4, f"{low:.2f} to {high:.2f}"
        )


def numbers(device: torch.device, out: Path) -> Iterator[Check]:
    for part in (networks, attention, optimizers):
        yield from part(device, out)


# ------------------------------------------------------------------------------------------------
# C chapter 1
# ------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@contextmanager
def stopped_when(module, name: str, calls: int, number=signal.SIGTERM):
    """Inside, this process gets a signal before the call of that number of module.name."""
    original, count = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with mock.patch.object(module, name, counted):
        yield


def chapter_1(device: torch.device, out: Path) -> Iterator[Check]:
    few = digits.glyphs  # all of them take ten seconds
    with mock.patch.object(digits, "glyphs", lambda n, seed: few(min(n, 2000), seed)):
        yield from trained(device, out)


def trained(device: torch.device, out: Path) -> Iterator[Check]:
    cuda = device.type == "cuda"
    steps, preset = (400, "digits-wide") if cuda else (44, "digits-narrow")
    how = ["--data", "glyphs", "--preset", preset, "--steps", steps, "--warmup-steps", 20]
    how += ["--device", device.type, "--sample-steps", 8, "--checkpoint-every", steps // 2]
    how = [str(word) for word in how]
    if cuda:
        tests = ["tests/test_train_mnist.py", "tests/test_sample_t2i.py"]
        quiet = ["-n", "0", "-k", "cuda or graph or reads", "-p", "no:cacheprovider"]
        done = subprocess.run([sys.executable, "-m", "pytest", *quiet, *tests], cwd=ROOT)
        yield holds("C1 the tests that need a GPU", done.returncode == 0)
    started = time.perf_counter()
    train_mnist.main([*how, "--out", str(out / "whole")])
    rate = steps / (time.perf_counter() - started)
    whole = rows_of(out / "whole" / "log.csv")
    losses = [float(row["loss"]) for row in whole]
    yield most("C2 last loss over the first", losses[-1] / losses[0], 0.5 if cuda else 0.9)
    yield least("C2 steps a second, start and pictures included", rate, 15 if cuda else 0.2)
    with stopped_when(train_mnist, "train_step", steps // 2 + 10):
        train_mnist.main([*how, "--out", str(out / "cut")])
    model = torch.load(out / "cut" / "checkpoint.pt", map_location="cpu", weights_only=True)
    yield holds(
        "C3 a signal leaves a checkpoint",
        steps // 2 < model["step"] < steps,
        f"step {model['step']}",
    )
    train_mnist.main([*how, "--out", str(out / "cut"), "--resume"])
    again = {row["step"]: float(row["loss"]) for row in rows_of(out / "cut" / "log.csv")}
    same = [
        again[r["step"]] / float(r["loss"]) - 1 for r in whole if int(r["step"]) > steps // 2 + 20
    ]
    limit = 0.02 if cuda else 0  # a GPU adds up in another order each time
    yield most("C3 losses after it, relative", max(map(abs, same)), limit)
    yield holds(
        "C3 the weights load on a CPU", load_model(out / "cut", "cpu").config.patch_size == 7
    )
    yield no_reads("C4", device, [*how, "--out", str(out / "quiet"), "--overwrite"])


def no_reads(name: str, device: torch.device, options: list[str]) -> Check:
    """Steps, averages and the log between its rows do not wait for the device."""
    found, original = [], train_mnist.train_step

    def watched(model, adamw, rows, settings, step, generator):
        if step < 21 or step > 38:  # the first compiles, the epoch's order is drawn on the host
            return original(model, adamw, rows, settings, step, generator)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                return original(model, adamw, rows, settings, step, generator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        with HostReads() as reads:
            result = original(model, adamw, rows, settings, step, generator)
        found.extend(reads.seen)
        return result

    try:
        with mock.patch.object(train_mnist, "train_step", watched):
            train_mnist.main([*options, "--steps", "41"])
    except (RuntimeError, SystemExit) as error:
        found.append(f"{error}"[:80])
    return holds(f"{name} steps 22 to 39 never wait", not found, " ".join(found) or "no read")


# ------------------------------------------------------------------------------------------------
# D chapter 2, one rank
# ------------------------------------------------------------------------------------------------


@contextmanager
def before_steps(action: Callable):
    """Inside, action(run) is called before each step of chapter 2. And a process may call main
    again: DeepSpeed cannot begin a second process group."""
    original = train_t2i.train_step

    def step(run, batches):
        action(run)
        return original(run, batches)

    keep = mock.patch.object(dist, "destroy_process_group", lambda: None)
    with mock.patch.object(train_t2i, "train_step", step), keep:
        yield


def t2i(out: Path, *options, before: Callable = lambda run: None) -> int:
    """Chapter 2's main, here. → its exit status."""
    try:
        with before_steps(before):
            train_t2i.main([str(word) for word in ("--out", out, *options)])
    except SystemExit as ended:
        return ended.code
    return 0


def losses_of(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows_of(out / "log.csv")]


def furthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


TINY = """--batch-size 16 --samples 320 --eval-every-samples 999999 --save-every-samples 999999
--eval-prompts 1 --sample-steps 2 --warmup-samples 80 --threads 1"""


def precision(device: torch.device, out: Path) -> Iterator[Check]:
    """The same 20 steps on the CPU and here."""
    cuda = device.type == "cuda"
    command = [sys.executable, str(ROOT / "train_t2i.py"), "--out", str(out / "cpu"), *TINY.split()]
    done = subprocess.run([*command, "--precision", "fp32"], env=NO_GPU, capture_output=True)
    if done.returncode:
        yield holds("D1 the run on the CPU", False, done.stderr.decode()[-200:])
        return
    exact = losses_of(out / "cpu")

    def fp32(run):
        torch.set_float32_matmul_precision("highest")

    other = ["--compile", "off"] if cuda else ["--micro-batch", "4"]  # on a CPU: four passes
    t2i(out / "fp32", *TINY.split(), "--precision", "fp32", *other, before=fp32)
    yield most("D1 losses of 20 steps, fp32", furthest(losses_of(out / "fp32"), exact), 2e-3)
    if cuda:
        torch.set_float32_matmul_precision("high")
        t2i(out / "bf16", *TINY.split(), "--precision", "bf16")
        yield most("D1 the same in bf16", furthest(losses_of(out / "bf16"), exact), 3e-2)


def run_options(cuda: bool) -> tuple[list[str], int]:
    """The longer run: 60 steps, two evaluations, two saves."""
    preset, batch = ("small", 256) if cuda else ("tiny", 16)
    words = f"""--preset {preset} --batch-size {batch} --samples {60 * batch}
    --warmup-samples {10 * batch} --cooldown-samples {60 * batch} --eval-every-samples {30 * batch}
    --save-every-samples {30 * batch} --eval-prompts 4 --sample-steps 8 --compile on --threads 1"""
    return words.split(), batch


def weights_of(run):
    return run.engine.module.named_parameters()


def watched(run, seen: dict):
    """What is looked at during the run, by step."""
    cuda, step = run.engine.device.type == "cuda", run.step
    if step == 0:  # Run.warm_up has compiled both directions
        seen["graphs"] = counters["stats"]["unique_graphs"]
        seen["first"] = {name: p.detach().clone().cpu() for name, p in weights_of(run)}
        torch.compiler.set_stance("fail_on_recompile")
    if step == 5 and cuda:
        torch.cuda.reset_peak_memory_stats()
    if step == 11 and cuda:
        seen["profile"] = torch.profiler.profile().__enter__()
    if step == 16 and cuda:
        seen["profile"].__exit__(None, None, None)
    if step == 21:
        seen["started"] = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            seen["warnings"] = ExitStack()
            seen["said"] = seen["warnings"].enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
    if step == 28 and cuda:
        torch.cuda.set_sync_debug_mode("default")
        seen["warnings"].close()
    if step == 29:
        first = seen.pop("first")
        seen["still"] = [n for n, p in weights_of(run) if torch.equal(p.detach().cpu(), first[n])]
        if cuda:
            torch.cuda.synchronize()
            seen["peak"] = torch.cuda.max_memory_allocated()
        seen["seconds"] = (time.perf_counter() - seen["started"]) / 8
        seen["config"], seen["flops"] = run.config, 3 * run.flops * run.settings.batch_size


def averages_of(checkpoint: Path) -> dict:
    name = rf.average_name(train_t2i.EMA_WIDTHS[0])
    return read_averages(checkpoint, [name])[name]


def training(device: torch.device, out: Path) -> Iterator[Check]:
    cuda, seen = device.type == "cuda", {}
    options, batch = run_options(cuda)
    with ExitStack() as around:
        if not cuda:  # the rules of compiling are the same, and nothing is translated to C++
            fast = partialmethod(MMDiT.compile_blocks, backend="eager")
            around.enter_context(mock.patch.object(MMDiT, "compile_blocks", fast))
        status = t2i(out / "run", *options, before=partial(watched, seen=seen))
        torch.compiler.set_stance("default")
        yield holds("D3 no step compiles anything", status == 0)
        more = counters["stats"]["unique_graphs"] - seen["graphs"]
        yield most("D3 graphs that evaluations compile", more, 0)
        found = losses_of(out / "run")
        yield most("D2 last loss over the first", found[-1] / found[0], 0.8 if cuda else 0.95)
        evals = rows_of(out / "run" / "eval.csv")
        finite = all(float(value) < 1e9 for row in evals for value in row.values())
        yield holds("D2 two evaluations, all finite", len(evals) == 2 and finite)
        skipped = rows_of(out / "run" / "log.csv")[-1]["skipped"]
        yield holds("D2 no step was skipped", skipped == "0", skipped)
        yield holds("D2 every weight moves", not seen["still"], " ".join(seen["still"][:3]))
        if cuda:
            yield from waits(seen)
            yield from memory(seen, batch)
        # Back to the save in the middle; the rest again.
        newest = checkpoints(out / "run" / "checkpoints")[-1]
        later = newest.rename(newest.with_name("later"))
        status = t2i(out / "run", *options, "--resume")
        again = losses_of(out / "run")
        limit = 0.02 * found[-1] if cuda else 0
        yield most("D6 losses after a resume", furthest(again, found) if not status else 1e9, limit)
        first, second = (averages_of(path) for path in (later, newest))
        away = max(off(second[name], first[name]) for name in first)
        yield most("D6 the averages after a resume", away, 2e-2 if cuda else 0)
    yield told("D2 seconds a step", f"{seen['seconds']:.4f}")
    bar = log.device_peak(device)
    if bar:
        yield told("D2 MFU", f"{seen['flops'] / seen['seconds'] / bar / 1e12:.3f}")


def waits(seen: dict) -> Iterator[Check]:
    """Five steps under the profiler, then seven in which PyTorch names each wait."""
    events = Counter()
    for event in seen["profile"].events():
        events[event.name] += 1
    yield most("D4 cudaDeviceSynchronize in five steps", events["cudaDeviceSynchronize"], 1)
    yield most("D4 cudaStreamSynchronize a step", events["cudaStreamSynchronize"] / 5, 15)
    packages = str(Path(torch.__file__).parents[1])
    ours = [w for w in seen["said"] if str(ROOT) in w.filename and packages not in w.filename]
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in ours}
    yield holds("D4 none of our lines waits", not ours, " ".join(sorted(places)) or "none")


def memory(seen: dict, batch: int) -> Iterator[Check]:
    from tools import plan

    ds = json.loads((ROOT / "ds_config.json").read_text())
    wanted = plan.Settings(
        preset="small", gpus=1, micro_batch=batch, batch_size=batch, text_tokens=12, vae="pixels"
    )
    planned = plan.plan(seen["config"], wanted, ds)[1]["in all"]
    ratio = seen["peak"] / planned
    yield holds("D5 memory over the plan's", 0.75 <= ratio <= 1.1, f"{ratio:.3f}")


def sampling(device: torch.device, out: Path) -> Iterator[Check]:
    """Pictures of the run above: a CUDA graph draws the same ones; a CPU nearly."""
    from common.pipeline import Pipeline
    from sample_t2i import Graphed

    pipeline = Pipeline.open(out / "run", device)
    captions = ["a red circle", "a blue square", "two green circles", "a ring"]
    noise = pipeline.noise(0, range(4))
    plain = pipeline.draw(captions, noise).int()
    if device.type == "cuda":
        pipeline.model = graphed = Graphed(pipeline.model)
        near = (pipeline.draw(captions, noise).int() - plain).abs() <= 2
        yield least("D7 bytes that a CUDA graph draws alike", float(near.float().mean()), 0.995)
        pipeline.draw(captions[:3], noise[:3])
        yield holds("D7 two shapes are captured", len(graphed.captured) == 2)
    other = Pipeline.open(out / "run", torch.device("cpu")).draw(captions, noise).int()
    near = ((other - plain).abs() <= 8).float().mean()
    yield least("D7 bytes that a CPU draws alike", float(near), 0.9 if device.type == "cuda" else 1)


def bad_steps(device: torch.device, out: Path) -> Iterator[Check]:
    """Losses that are not finite: skipped; too many in a row end the run."""
    original = rf.rf_loss

    def spoilt(bad, *args, **kwargs):
        loss = original(*args, **kwargs)
        return loss * torch.nan if bad() else loss

    for name, first, last, limit in (("two", 4, 6, 20), ("many", 4, 99, 3)):
        now = {}
        bad = partial(lambda a, b, now: a <= now["step"] < b, first, last, now)
        with mock.patch.object(rf, "rf_loss", partial(spoilt, bad)):
            before = partial(lambda run, now: now.update(step=run.step), now=now)
            status = t2i(out / name, *TINY.split(), "--max-bad-steps", limit, before=before)
        if name == "two":
            rows = rows_of(out / name / "log.csv")
            yield holds("D8 two bad steps are skipped", rows[-1]["skipped"] == "2" and not status)
        else:
            yield holds("D8 three in a row end the run", status == 1, f"status {status}")


def signals(device: torch.device, out: Path) -> Iterator[Check]:
    """SIGTERM in the middle of a run: status 0 and a whole checkpoint, soon."""
    command = [
        sys.executable,
        str(ROOT / "train_t2i.py"),
        "--out",
        str(out / "term"),
        *TINY.split(),
    ]
    env = os.environ if device.type == "cuda" else NO_GPU
    process = subprocess.Popen([*command, "--samples", "160000"], env=env)
    deadline = time.monotonic() + 120
    while not (out / "term" / "log.csv").exists() or len(rows_of(out / "term" / "log.csv")) < 1:
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    started = time.monotonic()
    process.terminate()
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        status = "killed"
    yield holds("D9 SIGTERM ends it with status 0", status == 0, f"status {status}")
    yield most("D9 seconds until then", time.monotonic() - started, 20)
    saved = checkpoints(out / "term" / "checkpoints")
    yield holds(
        "D9 it leaves a checkpoint", bool(saved) and bool(train_t2i.whole_record(saved[-1]))
    )


def buckets(device: torch.device, out: Path) -> Iterator[Check]:
    """Prepared pictures of three shapes, by loader processes; each shape is compiled once."""
    from tools import prepare

    source = out / "pictures"
    made_up_pictures(source, 240)
    words = ["--size", "32", "--text-tokens", "8", "--text-bits", "8", "--validation", "16"]
    prepare.main([str(source), "--out", str(out / "rows"), *words])
    shapes = set()

    def before(run):
        if run.step == 0:
            torch.compiler.set_stance("fail_on_recompile")

    options = ["--data", out / "rows", "--preset", "tiny", *TINY.split(), "--batch-size", 16]
    options += ["--samples", 640, "--workers", 2, "--compile", "on"]
    original = rf.rf_loss

    def looked(model, data, *args, **kwargs):
        shapes.add(tuple(data.shape[2:]))
        return original(model, data, *args, **kwargs)

    with ExitStack() as around:
        around.enter_context(mock.patch.object(rf, "rf_loss", looked))
        if device.type != "cuda":
            fast = partialmethod(MMDiT.compile_blocks, backend="eager")
            around.enter_context(mock.patch.object(MMDiT, "compile_blocks", fast))
        status = t2i(out / "buckets", *options, before=before)
    torch.compiler.set_stance("default")
    yield holds("D10 three shapes", len(shapes) == 3, str(sorted(shapes)))
    yield holds("D10 no step compiles anything", status == 0, f"status {status}")


def made_up_pictures(folder: Path, count: int):
    from PIL import Image

    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        size = ((48, 48), (64, 36), (36, 64))[i % 3]
        torch.manual_seed(i)
        small = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def chapter_2(device: torch.device, out: Path) -> Iterator[Check]:
    for part in (precision, training, sampling, bad_steps, signals, buckets):
        yield from part(device, out)


# ------------------------------------------------------------------------------------------------
# E speed
# ------------------------------------------------------------------------------------------------


def speed(device: torch.device, out: Path) -> Iterator[Check]:
    from experiments import throughput

    if device.type != "cuda":
        size = throughput.SIZES["digits"]
        yield flops_counted("digits", size)
        network = throughput.built(size.config)
        took = seconds(throughput.training(network, network.parameters(), size), 5)
        share = size.training_flops() / took / 1e12 / product_tflops(1024, torch.float32, device)
        yield least("E1 digits: of the plain product", share, 0.05)
        return
    for name, share in (("0.2b", 0.4), ("1b", 0.5)):
        size = throughput.SIZES[name]
        yield flops_counted(name, size)
        table = throughput.model_rows(size, 5)
        for variant, row in table.iterrows():
            said = f"{row.ms:.2f} ms, of the ceiling {row.of_ceiling:.2f}"
            yield told(f"E1 {name}, {variant}", said)
        ms = table.ms
        yield most(f"E1 {name}: compiled over eager", ms["ours compiled"] / ms["ours"], 0.9)
        graph = ms["ours compiled graph"] / ms["ours compiled"]
        yield most(f"E1 {name}: graph over compiled", graph, 1.02)
        theirs = ms["diffusers compiled"] / ms["ours compiled"]
        yield least(f"E1 {name}: diffusers compiled over ours", theirs, 1.0)
        best = table.of_ceiling.drop("plain product").max()
        yield least(f"E1 {name}: of the plain product", best, share)
    command = ["experiments.throughput", "sample", "--repeats", "3", "--out", str(out)]
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    by = {(row["batch"], row["variant"]): row for row in rows_of(out / "sample.csv")}
    for batch, limit in (("1", 0.7), ("16", 1.02)):
        ratio = float(by[batch, "graph"]["over_eager"])
        yield most(f"E3 a picture, batch {batch}: graph over eager", ratio, limit)


def flops_counted(name: str, size) -> Check:
    """The bar's MFU rests on this count."""
    with torch.device("meta"):
        model = MMDiT(size.config)
        x = torch.empty(1, size.config.in_channels, size.side, size.side)
        text, t = torch.empty(1, size.tokens, size.config.text_dim), torch.empty(1)
        with FlopCounterMode(display=False) as counter:
            model(x, t, text)
    ours = model.flops_per_image(size.side, size.side, size.tokens)
    ratio = ours / counter.get_total_flops()
    return holds(f"E5 {name}: FLOPs over those counted", abs(ratio - 1) < 1e-9, f"{ratio:.6f}")


# ------------------------------------------------------------------------------------------------
# F two ranks
# ------------------------------------------------------------------------------------------------


def two(device: torch.device, out: Path, *options, kill: int = 0, spoil: int = 0) -> tuple:
    """Two ranks of chapter 2 → their exit statuses and what they said. kill: the signal that rank 1
    gets at step 10 (SIGUSR1: both). spoil: the step at which the loss of rank 1 is NaN."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"CHECK_KILL": str(kill), "CHECK_SPOIL": str(spoil)}
    env |= {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    one_card = device.type == "cuda" and torch.cuda.device_count() < 2
    processes = []
    for rank in "01":
        own = {
            "RANK": rank,
            "LOCAL_RANK": "0" if one_card else rank,
            "CHECK_GLOO": str(int(one_card)),
        }
        words = [*HERE, "--rank", "--out", str(out), *map(str, options)]
        processes.append(
            subprocess.Popen(
                words, cwd=ROOT, env=env | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=120)[0].decode())
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[0].decode() + "\nkilled after two minutes")
        if process.returncode:  # as launchers do
            for other in processes:
                other.kill()
    return [process.returncode for process in processes], said


def one_of_two(out: Path, options: list[str]):
    """This process is one of the two ranks: train_t2i.py, and what the environment asks for.

    On a single GPU NCCL refuses two ranks, so gloo takes its place.
    """
    rank, counts = os.environ["RANK"], Counter()
    kill, spoil = int(os.environ["CHECK_KILL"]), int(os.environ["CHECK_SPOIL"])
    if os.environ["CHECK_GLOO"] == "1":
        dist.init_process_group("cpu:gloo,cuda:gloo")
    step_now = {"step": 0}

    def before(run):
        step_now["step"] = run.step
        both = kill == signal.SIGUSR1
        if kill and (rank == "1" or both) and run.step == 10:
            os.kill(os.getpid(), kill)
        if run.step == 19:
            kept = [s for state in run.adamw.state.values() for s in state.values()]
            counts["bytes"] = sum(s.nbytes for s in kept)
            counts["parameters"] = sum(p.numel() for p in run.engine.module.parameters())

    def counted(name):
        original = getattr(dist, name)

        def call(tensor, *args, **kwargs):
            if step_now["step"] == 15:
                counts[name] += tensor.nbytes
            return original(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, call)

    original = rf.rf_loss

    def spoilt(*args, **kwargs):
        loss = original(*args, **kwargs)
        return loss * torch.nan if spoil and rank == "1" and step_now["step"] == spoil else loss

    with ExitStack() as around:
        for name in ("all_reduce", "reduce"):
            around.enter_context(counted(name))
        around.enter_context(mock.patch.object(rf, "rf_loss", spoilt))
        status = t2i(out, *options, before=before)
    (out.parent / f"{out.name}.{rank}.json").write_text(json.dumps(counts))
    sys.exit(status)


def two_ranks(device: torch.device, out: Path) -> Iterator[Check]:
    options = [*TINY.split(), "--precision", "fp32"]
    codes, said = two(device, out / "two", *options)
    yield holds("F1 two ranks train", codes == [0, 0], "" if codes == [0, 0] else said[0][-300:])
    if codes != [0, 0]:
        return
    t2i(out / "one", *options)
    away = furthest(losses_of(out / "two"), losses_of(out / "one"))
    yield most("F1 losses on two ranks and on one", away, 1e-3 if device.type == "cuda" else 1e-5)
    counts = json.loads((out / "two.0.json").read_text())
    # fp32 moments and two averages: 8 to 16 bytes a parameter, halved
    share = counts["bytes"] / counts["parameters"]
    yield holds("F2 states a rank and parameter", 4 < share < 8.5, f"{share:.2f} bytes")
    sent = counts.get("reduce", 0) / counts["parameters"]
    yield holds(
        "F3 gradients go to their owner, fp32", 3.5 < sent < 5, f"{sent:.2f} bytes a parameter"
    )
    yield told("F3 all-reduced bytes in that step", counts.get("all_reduce", 0))
    found, expected = (
        averages_of(checkpoints(out / name / "checkpoints")[-1]) for name in ("two", "one")
    )
    yield most("F4 the averages", max(off(found[k], expected[k]) for k in expected), 2e-2)
    codes, said = two(device, out / "killed", *options, kill=signal.SIGKILL)
    yield holds(
        "F5 one rank is killed: the other ends",
        codes[1] == -9 and codes[0] not in (0, -9),
        str(codes),
    )
    codes, _ = two(device, out / "spoilt", *options, spoil=4)
    skipped = [row["skipped"] for row in rows_of(out / "spoilt" / "log.csv")][-1]
    yield holds(
        "F6 NaN on one rank: both skip the step", codes == [0, 0] and skipped == "1", skipped
    )
    codes, _ = two(device, out / "term", *options, kill=signal.SIGTERM)
    saved = [int(path.name) for path in checkpoints(out / "term" / "checkpoints")]
    near = bool(saved) and 160 < saved[-1] <= 208
    yield holds(
        "F7 SIGTERM to one rank: both save and end", codes == [0, 0] and near, f"{codes} {saved}"
    )
    codes, _ = two(device, out / "usr1", *options, kill=signal.SIGUSR1)
    saved = [int(path.name) for path in checkpoints(out / "usr1" / "checkpoints")]
    end = int(rows_of(out / "two" / "log.csv")[-1]["samples"])
    yield holds(
        "F7 SIGUSR1 to both: they save, and go on to the end",
        codes == [0, 0] and len(saved) == 2 and saved[-1] == end,
        f"{codes} {saved}",
    )


SECTIONS = {"A": machine, "B": numbers, "C": chapter_1, "D": chapter_2, "E": speed, "F": two_ranks}

# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def section(name: str, device: torch.device, out: Path):
    """All checks of a section, in this process; they are written as they come."""
    begin(device)
    try:
        for check in SECTIONS[name](device, out / name):
            show(out, check)
    except BaseException as error:
        traceback.print_exc()
        show(
            out, Check(f"{name} ended early", f"{type(error).__name__}: {error}"[:120], "-", False)
        )


def show(out: Path, check: Check):
    print(
        f"{'ok    ' if check.ok else 'FAILED'} {check.name}: {check.measured} ({check.rule})",
        flush=True,
    )
    with open(out / "checks.csv", "a", newline="") as file:
        csv.writer(file).writerow(check)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--cpu", action="store_true", help="what a CPU can check")
    parser.add_argument("--two", action="store_true", help="section F, too")
    parser.add_argument("--only", default="", help="sections, say BD")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # this process is that section
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    args.out = args.out.resolve()
    if args.rank:
        one_of_two(args.out, rest)
    if rest:
        parser.error(f"{rest[0]} is unknown")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device is here: --cpu checks what a CPU can")
    if args.section:
        section(args.section, torch.device("cpu" if args.cpu else "cuda"), args.out)
        return 0
    if args.out.exists():
        parser.error(f"--out {args.out} is there already: give a new folder")
    args.out.mkdir(parents=True)
    (args.out / "checks.csv").write_text("check,measured,rule,ok\n")
    wanted = args.only or "ABCDE" + "F" * args.two
    for name in wanted:
        (args.out / name).mkdir()
        words = [*HERE, "--section", name, "--out", str(args.out)]
        env = NO_GPU if args.cpu else os.environ
        try:
            done = subprocess.run(
                [*words, *["--cpu"] * args.cpu], cwd=ROOT, env=env, timeout=LIMITS[name]
            )
            ended = f"status {done.returncode}"
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            ended, failed = f"more than {LIMITS[name]} s", True
        if failed:
            show(args.out, Check(f"{name} did not end well", ended, "-", False))
    rows = rows_of(args.out / "checks.csv")
    bad = [row["check"] for row in rows if row["ok"] != "True"]
    print(f"{len(rows) - len(bad)} of {len(rows)} checks hold; {args.out}/checks.csv has them all")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
