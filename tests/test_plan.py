"""tools/plan.py, common/memory.py: counts without tensors equal those of a real pass."""

import re
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import call, refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.memory import DTYPES, largest_pass, needs
from common.muon import orthogonal
from mmdit import MMDiT, MMDiTConfig
from tools.plan import Settings, main, plan

SIZES = {"dim": 64, "head_dim": 32, "base_dim": 64, "mlp_multiple_of": 32, "text_dim": 24}
SMALL = MMDiTConfig(**SIZES, n_layers=4, n_double_layers=2, max_grid=4)
ASKED = Settings(gpus=3, micro_batch=4, batch_size=12, text_tokens=5)


class Live(TorchDispatchMode):
    """Bytes of tensors that operators have made inside, and that are still there.

    before: tensors that do not count, nor do views of them.
    """

    def __init__(self, before):
        super().__init__()
        self.before = {x.untyped_storage()._cdata for x in before}
        self.bytes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.bytes.keys() | self.before:
                    self.bytes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.bytes.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.bytes.values()))
        return made


def through(config, precision, recompute):
    """→ bytes that are there after a forward pass, and at most during the backward pass."""
    model = MMDiT(config).to(DTYPES[precision])
    model.recompute = recompute == "blocks"
    for p in model.parameters():  # as ZeRO-2 does
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x, t, text = torch.randn(4, 4, 8, 8), torch.rand(4), torch.randn(4, 5, 24)
    with Live([*model.parameters(), x, t, text]) as live:
        loss = ((model(x, t, text).float() - x) ** 2).mean()
        kept = sum(live.bytes.values())
        live.most = 0
        loss.backward()
    return kept, live.most


@pytest.mark.parametrize("precision", DTYPES)
def test_activations_are_what_a_real_pass_keeps(precision):
    """Of twelve layers. The backward pass takes little more; recomputation leaves an eighth."""
    config, counts = replace(SMALL, n_layers=12), []
    for recompute in ("none", "blocks"):
        asked = replace(ASKED, precision=precision, recompute=recompute)
        counted = needs(4, config, asked, 3, (8, 8), DS)["activations"]
        kept, most = through(config, precision, recompute)
        assert counted == pytest.approx(kept, rel=0.01) and most < 1.15 * counted
        counts.append(counted)
    assert counts[1] < 0.15 * counts[0]


N = MMDiT(SMALL).n_parameters()
DS = {"communication_data_type": "fp32", "zero_optimization": {"reduce_bucket_size": 1000}}
OWNER = {"use_multi_rank_bucket_allreduce": False}
TWICE = {"stage": 2, "overlap_comm": True}


def computed_again(model):
    """FLOPs of one image in the backward pass, beyond those of a model that keeps everything."""
    counts = []
    for model.recompute in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 5, 24)).sum().backward()
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    "change, wire, zero, buckets, copies, sent",
    [
        # one pass of fp32 gradients to all, then bf16 weights
        ({}, "fp32", {}, 2, 2 + 4, (8 + 2) * N),
        ({"micro_batch": 2}, "fp32", OWNER, 2, 2 + 4, (2 * 4 + 2) * N),  # two, to owners
        ({"micro_batch": 2}, "bf16", OWNER, 2, 2, (2 * 2 + 2) * N),
        ({"micro_batch": 2}, None, TWICE, 2 + 2, 2, (2 * 4 + 2) * N),
        ({"micro_batch": 2}, "fp32", {"stage": 1} | OWNER, 2, 2 + 4, (8 + 2) * N),
        ({"precision": "fp32"}, "fp32", {}, 4, 4, (8 + 4) * N),
        ({"recompute": "blocks"}, "fp32", {}, 2, 2 + 4, (8 + 2) * N),
    ],
)
def test_bytes_and_flops_are_closed_forms(change, wire, zero, buckets, copies, sent):
    asked = replace(ASKED, **change)
    ds = {"communication_data_type": wire, "zero_optimization": DS["zero_optimization"] | zero}
    parameters, memory, useful, flops, found = plan(SMALL, asked, ds)
    weights = (4 if "precision" in change else 2) * N
    model = MMDiT(SMALL)
    hidden = {n: p for n, p in model.named_parameters() if model.role(n) == "hidden"}
    M = sum(p.numel() for p in hidden.values())
    summed = 10 * N if zero.get("stage") == 1 else 4 * N / 3
    states = {"weights": weights, "gradients": summed, "optimizer": 4 * N / 3}
    states |= {"moments": (8 * N - 4 * M) / 3, "averages": 8 * N / 3}
    kept = memory["activations"]
    later = max(1000 * copies + kept * (1 - 1000 / N), 20 * M / 3)
    expected = states | {"bucket": 1000 * buckets, "activations": kept}
    expected["update"] = max(0, later - kept)
    assert memory == expected | {"in all": sum(expected.values())}
    assert parameters == N and found == pytest.approx(2 / 3 * sent)  # each keeps a third
    with FlopCounterMode(display=False) as muon:
        for name, p in hidden.items():
            for part in p.chunk(3 if "qkv" in name else 2 if "up" in name else 1):
                orthogonal(part[None])
    # of four images on each, and a third of Muon's products
    assert useful == 3 * 4 * model.flops_per_image(8, 8, 5)
    again = 4 * computed_again(model) if "recompute" in change else 0
    assert flops == useful + muon.get_total_flops() // 3 + again


@pytest.mark.parametrize("size", ["auto", 0])
def test_a_bucket_that_cannot_be_is_named(size):
    with pytest.raises(ValueError, match=rf'"reduce_bucket_size" of ds_config.json .*{size}'):
        plan(SMALL, ASKED, {"zero_optimization": {"reduce_bucket_size": size}})
    for zero in ({}, {"reduce_bucket_size": 10**9}):  # no more than there are gradients
        _, memory, *_ = plan(SMALL, ASKED, DS | {"zero_optimization": zero})
        assert memory["bucket"] == 2 * N


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_pass_fills_the_memory_that_is_free(recompute):
    """And divides the share. No room at all: one image, and the device has to say it."""
    where = (SMALL, replace(ASKED, recompute=recompute), 3, (8, 8), DS)
    totals = [sum(needs(images, *where).values()) for images in range(1, 15)]
    for free in (0.99 * totals[0], *(1.01 * needed for needed in totals)):
        for share in (1, 7, 12, 14):
            fitting = [m for m in range(1, share + 1) if share % m == 0 and totals[m - 1] <= free]
            assert largest_pass(free, share, *where) == max(fitting, default=1)
    needed = totals[6]
    assert largest_pass(2 * needed, 11, *where) == 11 and largest_pass(0, 11, *where) == 1


def numbers(said, word):
    """Of the line that begins with a word."""
    line = re.search(rf"^ *{word}.*", said, re.MULTILINE)[0]
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d\.?\d*", line)]


def test_the_command_prints_its_lines(capsys):
    """The figures of the 6.8B network on 64 GPUs: 0.86 s of products in a step of 4 passes."""
    options = "--gpus 64 --micro-batch 8 --batch-size 2048 --samples 102400000 --gb-per-s 45"
    call(main, *options.split())
    said = capsys.readouterr().out
    assert "6,831,080,448 parameters, 256 pixels, 256 text tokens, bf16" in said
    assert "batch 2,048 = 8 x 64 GPUs x 4 passes; 102,400,000 samples, 50,000 steps" in said
    assert numbers(said, "computation") == [0.859, 424.9, 50, 989]
    N = 6_831_080_448
    gigabytes = 63 / 64 * (4 * 4 + 2) * N / 1e9  # to their owners, as ds_config.json says
    seconds = gigabytes / 45
    assert numbers(said, "communication") == pytest.approx([seconds, gigabytes, 45], rel=1e-3)
    days = 50_000 * (0.848 + seconds) / 86400
    assert numbers(said, "time") == pytest.approx([days, days * 24 * 64], rel=1e-2)
    assert numbers(said, "weights") == [round(2 * N / 2**30, 2)]
    assert numbers(said, "in all") == pytest.approx([38.5], abs=2)
    step = 0.859 + seconds
    share = 100 * 419.3 / step / 989
    assert numbers(said, "MFU") == pytest.approx([share, 419.3], abs=0.6)


def test_the_command_counts_what_is_computed_again(capsys):
    """At 512 pixels the 6.8B network keeps a tenth; a step computes more, and its MFU is lower."""
    said = []
    for recompute in ("none", "blocks"):
        options = f"--gpus 64 --size 512 --micro-batch 1 --recompute {recompute}"
        call(main, *options.split())
        said.append(capsys.readouterr().out)
    for word, least, most in (
        ("activations", 0.05, 0.12),
        ("computation", 1.3, 1.34),
        ("MFU", 0.7, 0.99),
        ("time", 1.01, 1.34),
    ):
        before, after = (numbers(text, word)[0] for text in said)
        assert least < after / before < most, word
    assert numbers(said[0], "MFU")[1] == numbers(said[1], "MFU")[1]


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
        ("--hfu 0", "--hfu 0.0 must be at least 0.001"),
        ("--recompute all", "--recompute 'all' must be one of none, blocks"),
        ("--preset huge", "--preset 'huge' must be one of tiny"),
        ("--vae sdxl", "--vae 'sdxl' must be one of latents, pixels"),
        ("--size 100", "--size 100 must be a multiple of 8, the VAE's factor"),
        ("--size 24", "a patch of 2 to 2 must divide what the network sees, 3x3"),
    ],
)
def test_wrong_input_ends_in_one_line(options, reason, capsys):
    said = refused(main, capsys, *options.split())
    assert reason in said and said.startswith("plan: ")
