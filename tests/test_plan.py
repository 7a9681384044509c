"""tools/plan.py: counts without tensors equal those of a real forward and backward pass."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import call, refused
from torch.utils.flop_counter import FlopCounterMode

from common.muon import orthogonal
from mmdit import MMDiT, MMDiTConfig
from tools.plan import DTYPES, Settings, main, plan

SIZES = {"dim": 64, "head_dim": 32, "base_dim": 64, "mlp_multiple_of": 32, "text_dim": 24}
SMALL = MMDiTConfig(**SIZES, n_layers=4, n_double_layers=2, max_grid=4)
ASKED = Settings(gpus=3, micro_batch=4, batch_size=12, text_tokens=5)


@pytest.mark.parametrize("precision", DTYPES)
def test_activations_are_what_a_real_pass_keeps(precision):
    """Counted without memory, and the storages that are there before a backward pass."""
    model, kept = MMDiT(SMALL).to(DTYPES[precision]), {}
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 24)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ((model(x, torch.rand(4), text).float() - x) ** 2).mean()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(s.nbytes() for pointer, s in kept.items() if pointer not in weights)
    memory = plan(SMALL, replace(ASKED, precision=precision), {"reduce_bucket_size": 1})[1]
    assert memory["activations"] == pytest.approx(real, rel=0.02)


N = MMDiT(SMALL).n_parameters()
OWNER = {"use_multi_rank_bucket_allreduce": False}


@pytest.mark.parametrize(
    "change, bucket, zero, reduction, sent",
    [
        # one pass of fp32 gradients to all, then bf16 weights
        ({}, 10**9, {}, 2 * 10**9 + 6 * N, (8 + 2) * N),
        ({"micro_batch": 2}, 10**9, OWNER, 2 * 10**9 + 6 * N, (2 * 4 + 2) * N),  # two, to owners
        ({"precision": "fp32"}, 1000, {}, 4 * 1000 + 4 * 1000, (8 + 4) * N),
    ],
)
def test_bytes_and_flops_are_closed_forms(change, bucket, zero, reduction, sent):
    zero, asked = zero | {"reduce_bucket_size": bucket}, replace(ASKED, **change)
    parameters, memory, flops, found = plan(SMALL, asked, zero)
    weights = (4 if "precision" in change else 2) * N
    model = MMDiT(SMALL)
    hidden = {n: p for n, p in model.named_parameters() if model.role(n) == "hidden"}
    M = sum(p.numel() for p in hidden.values())
    states = {"weights": weights, "gradients": 4 * N / 3, "optimizer": 4 * N / 3}
    states |= {"moments": (8 * N - 4 * M) / 3, "averages": 8 * N / 3}
    expected = states | {"reduction": reduction, "activations": memory["activations"]}
    assert memory == expected | {"in all": sum(expected.values())}
    assert (parameters, found) == (
        N,
        pytest.approx(2 / 3 * sent),
    )  # each keeps a third
    with FlopCounterMode(display=False) as muon:
        for name, p in hidden.items():
            for part in p.chunk(3 if "qkv" in name else 2 if "up" in name else 1):
                orthogonal(part[None])
    # of four images on each, and a third of Muon's products
    assert flops == 3 * 4 * model.flops_per_image(8, 8, 5) + muon.get_total_flops() // 3


@pytest.mark.parametrize("size", ["auto", 0])
def test_a_bucket_that_cannot_be_is_named(size):
    with pytest.raises(ValueError, match=rf'"reduce_bucket_size" of ds_config.json .*{size}'):
        plan(SMALL, ASKED, {"reduce_bucket_size": size})
    _, memory, *_ = plan(SMALL, ASKED, {})
    assert memory["reduction"] == 2 * 5e8 + 6 * N  # DeepSpeed's own


def test_the_command_prints_its_lines(capsys):
    """The figures of the 6.8B network on 64 GPUs: 0.86 s of products in a step of 4 passes."""
    options = "--gpus 64 --micro-batch 8 --batch-size 2048 --samples 102400000 --gb-per-s 45"
    call(main, *options.split())
    said = capsys.readouterr().out
    assert "6,831,080,448 parameters, 256 pixels, 256 text tokens, bf16" in said
    assert "batch 2,048 = 8 x 64 GPUs x 4 passes; 102,400,000 samples, 50,000 steps" in said

    def numbers(word):
        """Of the line that begins with a word."""
        line = re.search(rf"^ *{word}.*", said, re.MULTILINE)[0]
        return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d\.?\d*", line)]

    assert numbers("computation") == [0.859, 424.9, 50, 989]
    N = 6_831_080_448
    gigabytes = 63 / 64 * (4 * 4 + 2) * N / 1e9  # to their owners, as ds_config.json says
    seconds = gigabytes / 45
    assert numbers("communication") == pytest.approx([seconds, gigabytes, 45], rel=1e-3)
    days = 50_000 * (0.848 + seconds) / 86400
    assert numbers("time") == pytest.approx([days, days * 24 * 64], rel=1e-2)
    assert numbers("weights") == [round(2 * N / 2**30, 2)]
    assert numbers("in all") == pytest.approx([40], abs=2)


def test_a_pass_is_the_largest_that_divides_a_gpus_share(capsys):
    """And at 1024 pixels the position table is AuraFlow's; --size is in pixels of the image."""
    call(main, "--size", 1024, "--gpus", 8, "--batch-size", 88)
    said = capsys.readouterr().out
    assert "6,842,876,928 parameters, 1024 pixels" in said and "88 = 1 x 8 GPUs x 11" in said


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--gpus 3 --micro-batch 7", "must be --micro-batch 7 x --gpus 3 x a whole"),
        ("--gpus 0", "--gpus 0 must be at least 1"),
        ("--mfu 0", "--mfu 0.0 must be above 0"),
        ("--preset huge", "--preset 'huge' must be one of tiny"),
        ("--vae sdxl", "--vae 'sdxl' must be one of latents, pixels"),
        ("--size 100", "--size 100 must be a multiple of 8, the VAE's factor"),
        ("--size 24", "a patch of 2 to 2 must divide what the network sees, 3x3"),
    ],
)
def test_wrong_input_ends_in_one_line(options, reason, capsys):
    said = refused(main, capsys, *options.split())
    assert reason in said and said.startswith("plan: ")
