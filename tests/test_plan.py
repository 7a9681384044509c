"""tools/plan.py: counts without tensors equal those of a real forward and backward pass."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmdit import MMDiT, MMDiTConfig
from tools.plan import Settings, main, plan

ROOT = Path(__file__).resolve().parents[1]
SMALL = MMDiTConfig(
    dim=64,
    head_dim=32,
    n_layers=4,
    n_double_layers=2,
    text_dim=24,
    max_grid=4,
    base_dim=64,
    mlp_multiple_of=32,
)
ASKED = Settings(gpus=2, micro_batch=3, batch_size=12, text_tokens=5)
ZERO = {"reduce_bucket_size": 1000}


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_activations_are_what_a_real_pass_keeps(precision, dtype):
    """Counted without memory, and the storages of a backward pass that runs."""
    model = MMDiT(SMALL).to(dtype)
    x, text = torch.randn(6, 4, 8, 8), torch.randn(6, 5, 24)
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = ((model(x, torch.rand(6), text).float() - x) ** 2).mean()
    real = sum(s.nbytes() for pointer, s in kept.items() if pointer not in weights)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    asked = replace(ASKED, precision=precision, micro_batch=6)
    assert plan(SMALL, asked, ZERO)[1]["activations"] == pytest.approx(real, rel=0.02)
    assert torch.get_default_dtype() == torch.float32
    twice = plan(SMALL, replace(asked, micro_batch=12, gpus=1), ZERO)[1]["activations"]
    assert twice == pytest.approx(2 * real, rel=0.05)


def test_flops_are_those_of_torchs_counter():
    x, text = torch.randn(12, 4, 8, 8), torch.randn(12, 5, 24)
    # torch's counter knows no fused attention of CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        MMDiT(SMALL)(x, torch.rand(12), text)
    _, _, flops, _ = plan(SMALL, ASKED, ZERO)
    assert flops == 3 * counter.get_total_flops() / 2  # on each of two GPUs


BIG, LITTLE = {"reduce_bucket_size": 10**9}, {"reduce_bucket_size": 1000}
OWNER = {"use_multi_rank_bucket_allreduce": False}
N = MMDiT(SMALL).n_parameters()


@pytest.mark.parametrize(
    "change, zero, reduction, sent",
    [
        # two passes of fp32 gradients to their owners, then bf16 weights to all
        ({}, BIG | OWNER, 2 * 10**9 + 6 * N, (2 * 4 + 2) * N),
        ({}, BIG, 2 * 10**9 + 6 * N, (2 * 8 + 2) * N),  # all-reduced is DeepSpeed's default
        ({"micro_batch": 6}, BIG | OWNER, 2 * 10**9 + 6 * N, (4 + 2) * N),
        ({"precision": "fp32"}, BIG | OWNER, 4 * 10**9 + 4 * N, (2 * 4 + 4) * N),
        ({}, LITTLE | OWNER, 2 * 1000 + 6 * 1000, (2 * 4 + 2) * N),
        ({"precision": "fp32"}, LITTLE, 4 * 1000 + 4 * 1000, (2 * 8 + 4) * N),
    ],
)
def test_bytes_are_closed_forms(change, zero, reduction, sent):
    parameters, memory, _, found = plan(SMALL, replace(ASKED, **change), zero)
    weights = (4 if "precision" in change else 2) * N
    states = {"weights": weights, "gradients": 2 * N, "optimizer": 6 * N, "averages": 4 * N}
    expected = states | {"reduction": reduction, "activations": memory["activations"]}
    assert memory == expected | {"in all": sum(expected.values())}
    assert parameters == N and found == sent / 2  # half stays on each of two GPUs


def numbers(text, word):
    """The numbers of the line that begins with a word."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(word))
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d\.?\d*", line)]


def test_the_command_prints_its_lines(capsys):
    """The figures of the 6.8B network on 64 GPUs: 0.85 s of products in a step of 4 passes."""
    main(["--gpus", "64", "--micro-batch", "8", "--batch-size", "2048", "--samples", "102400000"])
    said = capsys.readouterr().out
    assert "6,831,080,448 parameters, 256 pixels, 256 text tokens, bf16" in said
    assert "batch 2,048 = 8 x 64 GPUs x 4 passes; 102,400,000 samples, 50,000 steps" in said
    compute, teraflops, mfu, peak = numbers(said, "computation")
    assert (compute, teraflops, mfu, peak) == (0.848, 419.3, 50, 989)
    N = 6_831_080_448
    zero = json.loads((ROOT / "ds_config.json").read_text())["zero_optimization"]
    reduced = 8 if zero.get("use_multi_rank_bucket_allreduce", True) else 4
    seconds, gigabytes, rate = numbers(said, "communication")
    assert gigabytes == pytest.approx(63 / 64 * (4 * reduced + 2) * N / 1e9, rel=1e-3)
    assert seconds == pytest.approx(gigabytes / 350, rel=1e-2) and rate == 350
    days, hours = numbers(said, "time")
    assert days == pytest.approx(50_000 * (compute + seconds) / 86400, abs=0.01)
    assert hours == pytest.approx(24 * 64 * 50_000 * (compute + seconds) / 86400, rel=1e-2)
    assert numbers(said, "weights") == [round(2 * N / 2**30, 2)]
    assert sum(numbers(said, "in all")) == pytest.approx(40, abs=2)


def test_the_released_size(capsys):
    """At 1024 pixels the position table is AuraFlow's; --size is in pixels of the image."""
    main(["--size", "1024", "--gpus", "8", "--micro-batch", "1", "--batch-size", "8"])
    assert "6,842,876,928 parameters, 1024 pixels" in capsys.readouterr().out


def test_slower_networks_take_longer(capsys):
    times = []
    for rate in ("350", "45"):
        main(["--preset", "1b", "--gb-per-s", rate])
        times.append(numbers(capsys.readouterr().out, "communication")[0])
    assert times[1] == pytest.approx(times[0] * 350 / 45, rel=0.02)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--gpus", "3", "--micro-batch", "7"], "must be --micro-batch 7 x --gpus 3 x a whole"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--mfu", "0"], "--mfu 0.0 must be above 0"),
        (["--preset", "huge"], "--preset 'huge' must be one of tiny"),
        (["--vae", "sdxl"], "--vae 'sdxl' must be one of latents, pixels"),
        (["--size", "100"], "--size 100 must be a multiple of 8, the VAE's factor"),
        (["--size", "24"], "a patch of 2 to 2 must divide what the network sees, 3x3"),
    ],
)
def test_wrong_input_ends_in_one_line(options, reason, capsys):
    with pytest.raises(SystemExit):
        main(options)
    said = capsys.readouterr().err
    assert reason in said and said.startswith("plan: ") and said.count("\n") == 1
