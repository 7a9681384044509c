"""plan_t2i.py: counts without tensors equal those of a real forward and backward pass."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import plan_t2i
import train_t2i
from mmdit import MMDiT, MMDiTConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = MMDiTConfig(
    dim=64, head_dim=32, n_layers=4, n_double_layers=2, text_dim=24, max_grid=4, base_dim=64,
    mlp_multiple_of=32,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_a_real_pass_keeps(dtype):
    """The bytes that the process holds after forward, over those before it: another count."""
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
    assert plan_t2i.activations(SMALL, 6, 8, 5, dtype) == pytest.approx(real, rel=0.02)
    assert torch.get_default_dtype() == torch.float32
    assert plan_t2i.activations(SMALL, 12, 8, 5, dtype) == pytest.approx(2 * real, rel=0.05)
    del loss


def test_flops_and_memory_of_a_plan():
    found = plan_t2i.plan(
        SMALL, gpus=2, micro_batch=3, batch_size=12, samples=120, side=8, tokens=5, mfu=0.5,
        tflops=1e-6, image_bytes=100,
    )  # fmt: skip
    model = MMDiT(SMALL)
    N = model.n_parameters()
    x, text = torch.randn(12, 4, 8, 8, requires_grad=True), torch.randn(12, 5, 24)
    with FlopCounterMode(display=False) as counter:
        model(x, torch.rand(12), text)
    assert found.flops == 3 * counter.get_total_flops()
    assert found.parameters == N and found.memory["weights"] == 2 * N
    assert found.memory["optimizer"] == 6 * N and found.memory["averages"] == 4 * N
    assert found.communication == 0.5 * (4 * N * 2 + 2 * N)  # two passes a step, half stays here
    assert found.days == pytest.approx(10 * found.flops / (2 * 1e6 * 0.5) / 86400)
    assert found.cached == 1e6 * (100 + 2 * 64 * 24)


def test_the_command_prints_a_page_and_trains_nothing(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train_t2i.py", "--plan", "--preset", "auraflow-6.8b"]
    command += ["--gpus", "64", "--micro-batch", "8", "--out", out]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "6,831,080,448 parameters" in said and "2,048 = 8 x 64 GPUs x 4 passes" in said
    assert "GPU-hours at 50% MFU of 989 TFLOP/s" in said and not out.exists()


def test_a_batch_that_does_not_divide_is_refused():
    options = ["--plan", "--preset", "1b", "--gpus", "3", "--micro-batch", "7"]
    with pytest.raises(ValueError, match="must be --micro-batch 7 x --gpus 3 x a whole number"):
        plan_t2i.describe(train_t2i.build_parser().parse_args(options))
