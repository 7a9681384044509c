"""cpu.py: memory is kept; the same products in the same precision, and only where it says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cpu
import rf
from mmdit import Linear, MMDiT, MMDiTConfig

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN"
)


@pytest.mark.parametrize("shape", [(40, 24, 72), (2, 7, 5, 3), (3, 9, 96, 256), (1, 300, 200, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_and_its_gradients_in_fp32(shape, with_bias):
    *rows, K, N = shape
    torch.manual_seed(0)
    x, weight, g = torch.randn(*rows, K), torch.randn(N, K), torch.randn(*rows, N)
    inputs = [x, weight, *([torch.randn(N)] * with_bias)]

    def outcome(function, dtype):
        mine = [i.detach().to(dtype).requires_grad_() for i in inputs]
        y = function(*mine)
        y.backward(g.to(dtype))
        return [y.detach(), *(i.grad for i in mine)]

    exact = outcome(F.linear, torch.float64)
    for found, expected in zip(outcome(cpu.linear, torch.float32), exact, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()  # bf16: 4e-3


def test_transposed_inputs_and_frozen_weights():
    x, weight = torch.randn(6, 9).t(), torch.randn(4, 6, requires_grad=True)
    assert torch.allclose(cpu.linear(x, weight), F.linear(x, weight), atol=1e-5)
    x = torch.randn(5, 6, requires_grad=True)
    cpu.linear(x, weight.detach()).sum().backward()
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(5, -1), atol=1e-5)


def test_a_model_trains_alike_with_it():
    config = MMDiTConfig(
        dim=64, head_dim=32, n_layers=3, n_double_layers=1, text_dim=12, max_grid=4, base_dim=64
    )
    torch.manual_seed(0)
    model = MMDiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    data, noise = torch.randn(2, 3, 4, 8, 8)
    outcomes = []
    for wanted in (False, True):
        cpu.use(wanted)
        loss = rf.rf_loss(
            model, data, torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)),
            t=torch.tensor([0.1, 0.5, 0.9]), noise=noise,
        ).mean()  # fmt: skip
        model.zero_grad()
        loss.backward()
        outcomes.append((loss, [p.grad for p in model.parameters()]))
    (a, mine), (b, theirs) = outcomes
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    for p, q in zip(mine, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-5 * p.abs().max().item() + 1e-9)


def test_it_is_used_where_it_is_available_alone(monkeypatch):
    for name, avx512, expected in (
        ("AMD EPYC", True, cpu.linear), ("AMD EPYC", False, F.linear),
        ("Intel(R) Xeon(R)", True, F.linear), (None, None, F.linear),
    ):  # fmt: skip
        can = {"cpu_name": name, "avx512_f": avx512} if name else {}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        cpu.tune()
        assert Linear.product is expected
    cpu.use(True)
    half = torch.randn(3, 4, dtype=torch.bfloat16)
    assert torch.equal(Linear.product(half, half), F.linear(half, half))  # not its business


def test_every_product_gets_whole_rows(monkeypatch):
    """Part of a wider gradient, or one number for all of it (y.sum()), took seconds as it lay."""
    layouts, product = [], cpu.product

    def spy(a, b, bias=None):
        layouts.extend([a, b])
        return product(a, b, bias)

    monkeypatch.setattr(cpu, "product", spy)
    torch.manual_seed(0)
    x, wide = torch.randn(6, 2, 256, requires_grad=True), torch.randn(256, 600)
    weight = wide[:, :256].detach().requires_grad_()
    whole = torch.cat([cpu.linear(x, weight), cpu.linear(x, weight)], dim=-1)
    (whole.sum() + cpu.linear(x, weight).sum()).backward()
    backward = layouts[6:]  # the three products of the forward pass have two factors each
    assert len(backward) == 12
    for factor in backward:
        rows = factor.flatten(0, -2) if factor.ndim > 2 else factor
        assert rows.is_contiguous() or rows.t().is_contiguous()
    expected = 3 * x.detach().flatten(0, 1).sum(0).expand(256, 256)
    assert torch.allclose(weight.grad, expected, atol=1e-3)


@pytest.mark.parametrize("most, asked", [
    (2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]),
    (2**25, [(-3, 2**31 - 1), (-3, 2**25), (-1, 2**31 - 1)]),  # older glibc
    (0, [(-3, 2**31 - 1), (-3, 2**25)]),  # refused: nothing else may be touched
])  # fmt: skip
def test_older_c_libraries_are_not_made_slower(monkeypatch, most, asked):
    calls = []

    class Library:
        @staticmethod
        def mallopt(option, value):
            calls.append((option, value))
            return int(option == -1 or value <= most)

    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: Library)
    assert cpu.keep_memory() == (most > 0) and calls == asked
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())  # macOS, musl
    assert not cpu.keep_memory()


def test_freed_memory_is_kept():
    """In processes of their own: how many pages the system hands out anew for the same steps."""
    script = """
import resource, sys, torch, cpu
from mmdit import MMDiT, PRESETS
if sys.argv[1] == "keep" and not cpu.keep_memory():
    sys.exit(3)
model = MMDiT(PRESETS["digits"])
x, t, text = torch.randn(64, 1, 28, 28), torch.rand(64), torch.eye(11)[torch.arange(64) % 11]
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x, t, text[:, None]).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for how in ("keep", "usual"):
        command = [sys.executable, "-c", script, how]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode == 3:
            pytest.skip("this C library is not glibc")
        faults[how] = int(done.stdout)
    assert faults["keep"] <= 0.3 * faults["usual"]  # here about 300 and 25,000
