"""CPU: what makes the same arithmetic faster on processors; on GPUs no result changes.

    keep_memory   what a step frees is kept for the next one, not handed back to the system
    product       y = x Wᵀ + b twice as fast on AMD's Zen 5

A training step allocates and frees the same tensors again and again. glibc gives large ones back to
the system at once, which then clears each page anew: a fifth of chapter 1's training time, and
half of its sampling (experiments/throughput.py memory). The price is memory: what is kept lies in
pieces, and the process grows by about a quarter.

PyTorch hands fp32 products to MKL, which gives AMD processors its AVX2 kernels. oneDNN, which
PyTorch carries too, looks at the instructions that are there: with AVX-512 its product is about
twice as fast on Zen 5. Zen 4 computes AVX-512 in two halves, so there it gains nothing and loses a
tenth in chapter 1 (experiments/throughput.py model measures both). Same formula, same fp32; only
the order of the sum differs. Elsewhere nothing changes.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit import Linear

# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MOST = 2**31 - 1  # bytes


def keep_memory() -> bool:
    """Let glibc's malloc keep what is freed. False where there is no glibc: nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows has no CDLL(None)
        return False
    # The first decides: older releases take no more than 32 MiB, and a trim threshold alone would
    # freeze the other at 128 KiB.
    kept = mallopt(M_MMAP_THRESHOLD, MOST) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, MOST))


# ------------------------------------------------------------------------------------------------
# Products
# ------------------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (…, K), b (N, K) → a bᵀ + bias, (…, N)."""
    if torch.compiler.is_compiling():
        return _black_box(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@torch.library.custom_op("t2i::product", mutates_args=())  # torch.compile does not look into it
def _black_box(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@_black_box.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, g: Tensor):
        # oneDNN takes whole rows and their transpose; other layouts cost it a thousand times more
        x, weight = (saved.contiguous() for saved in ctx.saved_tensors)
        g = g.contiguous()
        dx = product(g, weight.t()) if ctx.needs_input_grad[0] else None
        x, g = x.flatten(0, -2), g.flatten(0, -2)  # (M, K), (M, N)
        dw = _weight_gradient(x, g) if ctx.needs_input_grad[1] else None
        return dx, dw, g.sum(0) if ctx.needs_input_grad[2] else None


def _weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """gᵀ x, (N, K). oneDNN copies its first factor: it had better be the smaller one."""
    K, N = x.shape[1], g.shape[1]
    if max(K, N) < 192:
        return g.t() @ x  # the copy would cost more than the product saves
    return product(x.t(), g.t()).t() if N > K else product(g.t(), x.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for fp32 on the CPU; anything else goes to F.linear."""
    if x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype and x.numel():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def present() -> bool:
    """Whether this PyTorch has oneDNN's product."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def available() -> bool:
    """Whether it is faster: on AMD processors from Zen 5 on."""
    can = torch.cpu.get_capabilities()
    return (
        "AMD" in str(can.get("cpu_name", ""))
        and bool(can.get("avx512_f"))
        and bool(can.get("avx_vnni"))  # Zen 4 has the first, Zen 5 both
        and present()
    )


def use(wanted: bool | None = None):
    """Every Linear of mmdit.py takes it from here on; None: where available."""
    wanted = available() if wanted is None else wanted
    Linear.product = staticmethod(linear if wanted else F.linear)


def tune():
    """Both, where they help: for the start of a program that computes on the CPU."""
    keep_memory()
    use()
