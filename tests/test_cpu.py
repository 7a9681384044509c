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
def test_the_product_and_its_gradients_in_fp32_from_whole_rows(monkeypatch, shape, frozen):
    """Part of a wider gradient took seconds as it lay."""
    *rows, K, N = shape
    torch.manual_seed(0)
    inputs = [torch.randn(*rows, 2 * K)[..., K:], torch.randn(N, 2 * K)[:, K:], torch.randn(N)]
    g, factors, product = torch.randn(*rows, 2 * N)[..., N:], [], cpu.product

    def spy(a, b, bias=None):
        factors.extend([a.flatten(0, -2), b])
        return product(a, b, bias)

    def outcome(function, dtype):
        given = [x.to(dtype).requires_grad_(i != frozen) for i, x in enumerate(inputs)]
        y = function(*given)
        factors.clear()  # of the forward pass
        y.backward(g.to(dtype))
        return [y.detach(), *(x.grad for x in given if x.requires_grad)]

    monkeypatch.setattr(cpu, "product", spy)
    exact = outcome(F.linear, torch.float64)
    for a, b in zip(outcome(cpu.linear, torch.float32), exact, strict=True):
        close(a, b, atol=3e-6 * b.abs().max().item(), rtol=0)  # bf16: 4e-3
    assert all(x.is_contiguous() or x.t().is_contiguous() for x in factors)


@needs_onednn
def test_a_model_trains_alike_with_it_compiled_or_not():
    torch.manual_seed(0)
    model = MMDiT(replace(PRESETS["tiny"], n_layers=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs, outcomes = (torch.randn(3, 3, 8, 12), torch.rand(3), torch.randn(3, 5, 128)), []
    for how in ("plain", "faster", "compiled"):
        cpu.use(how != "plain")
        if how == "compiled":
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


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R)"])
@pytest.mark.parametrize("has", [{"avx512_f", "avx_vnni"}, {"avx512_f"}, set()])  # Zen 5, 4, 3
@needs_onednn
def test_it_is_used_where_it_is_faster_alone(monkeypatch, name, has):
    can = {"cpu_name": name} | dict.fromkeys(has, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    cpu.tune()
    assert Linear.product is (cpu.linear if len(has) == 2 and "AMD" in name else F.linear)
    half = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(cpu.linear(half, half), F.linear(half, half))  # not its business


@pytest.mark.parametrize(
    "most, asked",
    [
        (2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**31 - 1), (-3, 2**25), (-1, 2**31 - 1)]),  # older glibc
        (0, [(-3, 2**31 - 1), (-3, 2**25)]),  # refused: nothing else may be touched
    ],
)
def test_older_c_libraries_are_not_made_slower(monkeypatch, most, asked):
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return int(option == -1 or value <= most)

    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert cpu.keep_memory() == bool(most) and calls == asked
    monkeypatch.setattr(cpu.ctypes, "CDLL", str)  # macOS, musl
    assert not cpu.keep_memory()


STEPS = """
import resource, sys, torch
from common import cpu
from mmdit import MMDiT, PRESETS
if sys.argv[1] == "keep" and not cpu.keep_memory():
    sys.exit(3)
model = MMDiT(PRESETS["digits"])
inputs = torch.randn(64, 1, 28, 28), torch.rand(64), torch.randn(64, 1, 11)
for step in range(40):
    if step == 20:
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
