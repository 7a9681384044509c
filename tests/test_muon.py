"""common/muon.py: against the singular value decomposition, a plain loop, and several ranks."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers import close

from common.muon import directions, of_shard, orthogonal, use_muon
from mmdit import PRESETS, MMDiT

SHAPES = [(3, 8, 8), (1, 8, 8), (2, 16, 8), (1, 8, 16), (1, 4, 8)]  # 640 values
TOTAL = sum(parts * out * into for parts, out, into in SHAPES)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 32, 32), (4, 16, 48), (4, 48, 16), (1, 1, 7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonal_keeps_the_directions_and_evens_their_sizes(shape, scale):
    x = random(*shape) * scale
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    found = u.mT @ orthogonal(x).double() @ v.mT  # in the basis of x: nearly the identity
    sizes = found.diagonal(dim1=1, dim2=2)
    # the smallest of 32 singular values of a random matrix is about a fiftieth of the largest
    assert (sizes > 0.3).all() and (sizes < 1.25).all() and 0.65 < sizes.mean() < 1.2
    close(found, torch.diag_embed(sizes), atol=1e-3)


def test_orthogonal_of_nothing_is_nothing():
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def plain(row):
    """The directions, matrix by matrix."""
    found, at = [], 0
    for parts, out, into in SHAPES:
        for _ in range(parts):
            matrix = row[at : at + out * into].view(1, out, into)
            found.append((out / into) ** 0.5 * orthogonal(matrix).flatten())
            at += out * into
    return torch.cat(found)


def test_directions_are_those_of_each_matrix_alone():
    row = random(TOTAL)
    close(directions(row, SHAPES), plain(row), atol=1e-5)


def test_the_hidden_matrices_of_a_network_are_muons():
    model = MMDiT(PRESETS["tiny"])
    *others, group = sorted(
        model.param_groups(0.1, 0.2, muon_lr=0.3), key=lambda g: "matrices" in g
    )
    assert not any("matrices" in other for other in others)
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.2
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {n for n in names.values() if model.role(n) == "hidden"}
    assert {names[id(p)] for p in group["params"]} == hidden
    for weight, (parts, out, into) in zip(group["params"], group["matrices"], strict=True):
        name = names[id(weight)]
        known = 3 if "qkv" in name else 2 if "up" in name or ".kv." in name else 1
        assert parts == known and (parts * out, into) == weight.shape
    every = [p for g in (*others, group) for p in g["params"]]
    assert len(every) == len(set(map(id, every))) == len(names)
    assert not any("matrices" in g for g in model.param_groups(0.1))


def test_steps_are_momentum_orthogonalised_and_adam_for_the_rest():
    """Three steps beside the formulas of the docstring, and beside AdamW alone."""
    start = [random(16, 8, seed=1), random(8, 8, seed=2), random(5, seed=3)]
    ours, theirs = ([x.clone() for x in start] for _ in range(2))
    rates = {"lr": 0.1, "weight_decay": 0.5}
    groups = [{"params": ours[:2], "matrices": [(2, 8, 8), (1, 8, 8)], **rates}]
    adamw = torch.optim.AdamW([*groups, {"params": ours[2:], **rates}])
    use_muon(adamw)
    other = torch.optim.AdamW([{"params": theirs[2:], **rates}])
    momenta = [torch.zeros_like(x) for x in theirs[:2]]
    for step in range(3):
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = b.grad = random(*a.shape, seed=10 * step + k)
        for w, m in zip(theirs[:2], momenta, strict=True):
            m.copy_(0.95 * m + 0.05 * w.grad)
            ahead = 0.05 * w.grad + 0.95 * m
            moved = torch.cat([orthogonal(part[None])[0] for part in ahead.split(8)])
            w.copy_((1 - 0.1 * 0.5) * w - 0.1 * moved)
        adamw.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, atol=1e-5)
    assert set(adamw.state[ours[0]]) == {"step", "momentum"} and adamw.state[ours[0]]["step"] == 3
    close(adamw.state[ours[1]]["momentum"], momenta[1])


def a_rank(rank, ranks, port, row, wanted):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    size = len(row) // ranks
    mine = slice(rank * size, (rank + 1) * size)
    found = of_shard(row[mine].clone(), SHAPES)
    dist.destroy_process_group()
    assert torch.equal(found, wanted[mine])


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shards_move_as_the_whole(ranks):
    """Shards that end inside matrices, hold several, lie inside one, and are padded."""
    size = -(-TOTAL // ranks) + 3
    row = torch.zeros(size * ranks)
    row[:TOTAL] = random(TOTAL)
    wanted = torch.zeros_like(row)
    wanted[:TOTAL] = directions(row[:TOTAL], SHAPES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(a_rank, (ranks, port, row, wanted), nprocs=ranks)
