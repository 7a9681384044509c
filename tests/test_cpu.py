"""cpu.py: memory is kept; the same products in the same precision, and only where it says so."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import close

from common import cpu
from mmdit import PRESETS, Linear, MMDiT

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("shape", [(40, 24, 72), (2, 7, 5, 3), (3, 9, 96, 256), (1, 300, 200, 96)])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2], ids=["all", "no x", "no weight", "no bias"])
def test_the_product_and_its_gradients_in_fp32(shape, frozen):
    *rows, K, N = shape
    torch.manual_seed(0)
    inputs = [torch.randn(*rows, 2 * K)[..., K:], torch.randn(N, K), torch.randn(N)]
    g = torch.randn(*rows, 2 * N)[..., N:]  # part of a wider one, as gradients may lie
    with_bias = 3 if frozen != 2 else 2

    def outcome(function, dtype):
        given = [x.to(dtype).requires_grad_(i != frozen) for i, x in enumerate(inputs)][:with_bias]
        y = function(*given)
        y.backward(g.to(dtype))
        return [y.detach(), *(x.grad for x in given if x.requires_grad)]

    exact = outcome(F.linear, torch.float64)
    for found, expected in zip(outcome(cpu.linear, torch.float32), exact, strict=True):
        close(found, expected, atol=3e-6 * expected.abs().max().item(), rtol=0)  # bf16: 4e-3


@needs_onednn
def test_a_model_trains_alike_with_it_compiled_or_not():
    torch.manual_seed(0)
    model = MMDiT(replace(PRESETS["tiny"], n_layers=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs, outcomes = (torch.randn(3, 3, 8, 12), torch.rand(3), torch.randn(3, 5, 128)), []
    for wanted, compiled in ((False, False), (True, False), (True, True)):
        cpu.use(wanted)
        if compiled:
            torch._dynamo.reset()
            model.compile_blocks(backend="aot_eager")
        model.zero_grad()
        out = model(*inputs)
        out.square().mean().backward()
        outcomes.append([out.detach(), *(p.grad for p in model.parameters())])
    plain, *others = outcomes
    for found in others:
        for a, b in zip(plain, found, strict=True):
            close(a, b, atol=1e-5 * a.abs().max().item() + 1e-9)


@pytest.mark.parametrize(
    "can, expected",
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, cpu.linear),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, F.linear),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, F.linear),
        ({}, F.linear),
    ],
)
@needs_onednn
def test_it_is_used_where_it_is_available_alone(monkeypatch, can, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    cpu.tune()
    assert Linear.product is expected
    half = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(cpu.linear(half, half), F.linear(half, half))  # not its business


@needs_onednn
def test_every_product_gets_whole_rows(monkeypatch):
    """Part of a wider gradient, or one number for all of it (y.sum()), took seconds as it lay."""
    layouts, product = [], cpu.product

    def spy(a, b, bias=None):
        layouts.extend([a, b])
        return product(a, b, bias)

    monkeypatch.setattr(cpu, "product", spy)
    x, wide = torch.randn(6, 2, 256, requires_grad=True), torch.randn(256, 600)
    weight = wide[:, :256].detach().requires_grad_()
    whole = torch.cat([cpu.linear(x, weight), cpu.linear(x, weight)], dim=-1)
    (whole.sum() + cpu.linear(x, weight).sum()).backward()
    backward = layouts[6:]  # the three products of the forward pass have two factors each
    assert len(backward) == 12
    for factor in backward:
        rows = factor.flatten(0, -2)
        assert rows.is_contiguous() or rows.t().is_contiguous()


@pytest.mark.parametrize(
    "most, asked",
    [
        (2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**31 - 1), (-3, 2**25), (-1, 2**31 - 1)]),  # older glibc
        (0, [(-3, 2**31 - 1), (-3, 2**25)]),  # refused: nothing else may be touched
        (None, []),  # macOS, musl
    ],
)
def test_older_c_libraries_are_not_made_slower(monkeypatch, most, asked):
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return int(option == -1 or value <= most)

    library = SimpleNamespace(mallopt=mallopt) if most is not None else object()
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: library)
    assert cpu.keep_memory() == bool(most) and calls == asked


STEPS = """
import resource, sys, torch
from common import cpu
from mmdit import MMDiT, PRESETS
if sys.argv[1] == "keep" and not cpu.keep_memory():
    sys.exit(3)
model = MMDiT(PRESETS["digits"])
inputs = torch.randn(64, 1, 28, 28), torch.rand(64), torch.randn(64, 1, 11)
for step in range(12):
    if step == 6:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(*inputs).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept(pytestconfig):
    """In processes of their own: how many pages the system hands out anew for the same steps."""
    faults = []
    for how in ("keep", "usual"):
        command = [sys.executable, "-c", STEPS, how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
        if done.returncode == 3:
            pytest.skip("this C library is not glibc")
        faults.append(int(done.stdout))
    assert faults[0] <= 0.3 * faults[1]
