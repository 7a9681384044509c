"""MUON: an optimizer for weight matrices; AdamW keeps all other weights.

AdamW moves every entry of a matrix by about the same amount. The step of a matrix is then dominated
by a few directions that many samples share, and rare directions hardly move. Muon (Jordan et al.
2024, kellerjordan.github.io/posts/muon) keeps the directions of the momentum and makes them equally
large: from its singular value decomposition U Σ Vᵀ it takes U Vᵀ. So rare directions are learned as
fast as frequent ones (docs/recipes.md has what it gave), and one moment is kept instead of two.

    m ← 0.95·m + 0.05·gradient                       the momentum
    u = 0.95·m + 0.05·gradient                       a look ahead (Nesterov)
    W ← W − rate·√(out/in)·orthogonal(u)             out x in: the shape of W

√(out/in) is muP for Muon. From an input whose values are about 1, an orthogonal matrix makes an
output whose values are at most about √(in/out). So with the factor every layer's output moves by at
most about `rate` a step, at every width (spectral condition: Yang et al. 2023, 2310.17813), and the
rate of a narrow network is that of a wide one.

Muon takes the matrices inside the network, of role "hidden" in mmdit.py. First and last layers,
modulations, biases and tables stay with AdamW, as its authors advise: their inputs or outputs are
no hidden features.

Start reading at use_muon. Under ZeRO-2 a rank owns a piece of the flat row of all matrices, which
may begin and end inside a matrix; see of_shard.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

MOMENTUM = 0.95
# x ← a·x + b·x³ + c·x⁵ brings each singular value in (0, 1] to about 1 (0.7 to 1.2) in five rounds.
# Muon's authors chose the coefficients for speed: exact ones are not needed.
NEWTON_SCHULZ, ROUNDS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(x: Tensor) -> Tensor:
    """U Vᵀ of each matrix x = U Σ Vᵀ, nearly: (n, rows, columns) of one shape, in its dtype.

    By a polynomial in X Xᵀ (Newton–Schulz), which needs products only. A decomposition would be
    many times slower on a GPU. bf16 is enough: the error is smaller than that of the polynomial.
    """
    a, b, c = NEWTON_SCHULZ
    wide = x if x.shape[1] <= x.shape[2] else x.mT  # X Xᵀ is the smaller product
    wide = wide / (1.01 * wide.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(ROUNDS):
        square = wide @ wide.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b·S + c·S²
        wide = torch.baddbmm(wide, factor, wide, beta=a)  # (a + b·S + c·S²) X
    return wide if x.shape[1] <= x.shape[2] else wide.mT


def directions(row: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """√(out/in)·orthogonal(u) of each matrix: a flat row of all of them → the same, fp32.

    shapes: (parts, out, in) of each weight. q, k and v lie in one weight but are three matrices.
    Matrices of one shape are stacked and go through the products together.
    """
    # fp32 on CPUs: most of them convert bf16 for each product
    dtype = torch.bfloat16 if row.is_cuda else torch.float32
    pieces = row.split([n * rows * columns for n, rows, columns in shapes])
    places, moved = defaultdict(list), [None] * len(shapes)
    for i, shape in enumerate(shapes):
        places[shape[1:]].append(i)
    for (rows, columns), where in places.items():
        stack = torch.cat([pieces[i].view(-1, rows, columns) for i in where]).to(dtype)
        done = orthogonal(stack).float().mul_((rows / columns) ** 0.5)
        for i, matrix in zip(where, done.split([shapes[i][0] for i in where]), strict=True):
            moved[i] = matrix.reshape(-1)
    return torch.cat(moved)


def use_muon(adamw: torch.optim.AdamW):
    """From its next step on, AdamW leaves the groups with "matrices" to Muon.

    group["matrices"]: (parts, out, in) of each weight, in the order of group["params"]; MMDiT's
    param_groups writes it. group["lr"] is Muon's rate. A hook, not a subclass, because DeepSpeed
    accepts AdamW itself only. The hook moves the weights and takes their gradients away, and AdamW
    skips weights without a gradient. The momentum is a state of the optimizer, so it is saved,
    restored and split with Adam's moments.
    """

    @torch.no_grad()
    @record_function("part muon")
    def step(adamw, args, kwargs):
        for group in adamw.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if "matrices" not in group or not weights:
                continue
            ahead = []
            for w in weights:
                state = adamw.state[w]
                if not state:  # AdamW cannot load a state without "step"
                    state |= {"step": w.new_zeros(()), "momentum": torch.zeros_like(w)}
                state["step"] += 1
                state["momentum"].lerp_(w.grad, 1 - MOMENTUM)
                ahead.append(w.grad.lerp(state["momentum"], MOMENTUM).view(-1))
                w.grad = None
            shard = weights[0].ndim == 1  # ZeRO's: the only weight of the group
            find = of_shard if shard else directions
            moved = find(torch.cat(ahead), group["matrices"])
            for w, move in zip(weights, moved.split([w.numel() for w in weights]), strict=True):
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(move.view_as(w), alpha=-group["lr"])

    adamw.register_step_pre_hook(step)


def of_shard(shard: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """As directions, but each rank gives its piece of the row, and gets its piece of the result.

    ZeRO-2 lays all weights of a group end to end and gives each rank an equal piece:

        weights   |---- A ----|---- B ----|---- C ----|---- D ----|
        ranks     |------ 0 ------|------ 1 ------|------ 2 ------|

    Rank 1 owns the end of B, and most of C. It needs B and C whole, so ranks 0 and 2 send it the
    rest. Only matrices that are cut travel, and each rank works on those that it has a part of.
    """
    sizes = [parts * out * into for parts, out, into in shapes]
    starts = [0, *accumulate(sizes)]
    ranks, rank, size = dist.get_world_size(), dist.get_rank(), len(shard)

    def needed(rank: int) -> tuple[int, int]:
        """The weights that a rank has a part of: the first, and the last + 1."""
        first, last = rank * size, (rank + 1) * size
        inside = [i for i, (a, b) in enumerate(pairwise(starts)) if a < last and b > first]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def common(owner: int, reader: int) -> slice:
        """What the owner's shard holds of that which the reader needs, as places in the shard."""
        first, last = (starts[i] - owner * size for i in needed(reader))
        return slice(min(max(first, 0), size), min(max(last, 0), size))

    first, last = needed(rank)
    sent = [shard[common(rank, reader)] for reader in range(ranks)]
    received = [common(owner, rank) for owner in range(ranks)]
    row = shard.new_empty(starts[last] - starts[first])
    dist.all_to_all_single(
        row, torch.cat(sent), [s.stop - s.start for s in received], [len(s) for s in sent]
    )
    own, moved = received[rank], torch.zeros_like(shard)  # zeros: the padding at the row's end
    begin = rank * size - starts[first] + own.start
    if last > first:
        found = directions(row, shapes[first:last])
        moved[own] = found[begin : begin + own.stop - own.start]
    return moved
