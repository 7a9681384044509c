"""MEMORY: what a run needs on each GPU, from exact counts; nothing is allocated.

train_t2i.py chooses its pass (micro-batch) by it, and tools/plan.py prints it.

N parameters, W GPUs, b bytes of a weight (2 in bf16, 4 in fp32), r bytes of a gradient on its way
between GPUs, B elements of the reduction's bucket (ds_config.json; N at most). ZeRO-2 (1910.02054,
section 5.2) keeps on each GPU, in bytes:

    weights       b·N
    gradients     4·N/W    fp32, while they add up; in stage 1 up to (8 + b)·N: whole, twice while
                  they are reduced, and once more as they came
    optimizer     4·N/W    fp32 weights
    moments       8·N/W    Adam's two, fp32; 4 for the M weights that Muon moves (common/muon.py)
    averages      8·N/W    two fp32 states beside Adam's (rf.keep_averages)
    bucket        b·B, of gradients on their way; twice that with "overlap_comm"
    activations   what the forward pass keeps for the backward pass, not compiled; compiled blocks
                  keep about a fifth less. With --recompute blocks: the inputs of all blocks, the
                  last block's own, and what lies outside blocks
    update        what comes later and needs more than the activations did, of which it takes the
                  place: the larger of
                  - a flat copy of the bucket, b·B, and one of r·B if r differs from b; when the
                    bucket is full, the share B/N of the activations is free
                  - Muon's 20·M/W: directions and products of the matrices that it moves

Not counted: CUDA, NCCL and cuBLAS (2 to 3 GiB), the gradients of the block under way (of its
activations, and b times its weights), the text encoder and the VAE. Held against real steps on
CPU ranks (tests/plan_bytes.py): docs/gpu.md.
"""

import torch
from torch._subclasses import FakeTensorMode

from common.settings import Positive, check
from mmdit import MMDiT, MMDiTConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Of a device's memory: the rest is for what is not counted, and for gaps between the allocator's
# pieces.
USABLE = 0.85


def bucket_size(ds: dict, parameters: int) -> int:
    """Gradients that are reduced at a time: as ds_config.json says, and no more than there are.

    DeepSpeed allocates all of it in each pass, also for a network that cannot fill it.
    """
    size = ds["zero_optimization"].get("reduce_bucket_size", 5e8)  # DeepSpeed's default
    check('"reduce_bucket_size" of ds_config.json', size, Positive)
    return min(size, parameters)


def needs(images: int, config: MMDiTConfig, settings, gpus: int, sides: tuple, ds: dict) -> dict:
    """Bytes on each GPU, by what they hold. ValueError if ds_config.json has no good bucket.

    images: of one pass, each of these sides (h, w) as the network sees it. settings: options of a
    program, among them precision, recompute and text_tokens. ds: ds_config.json.
    """
    dtype = DTYPES[settings.precision]
    with FakeTensorMode():  # shapes and dtypes without memory
        model = MMDiT(config)
        model.load_state_dict(
            {name: w.to(dtype) for name, w in model.state_dict().items()}, assign=True
        )
        model.recompute = settings.recompute == "blocks"
        kept = activations(model, images, sides, settings.text_tokens)
    N, b, zero = model.n_parameters(), dtype.itemsize, ds["zero_optimization"]
    r = DTYPES.get(ds.get("communication_data_type"), dtype).itemsize
    M = sum(p.numel() for name, p in model.named_parameters() if model.role(name) == "hidden")
    B = bucket_size(ds, N)
    copies = (b + (r if r != b else 0)) * B
    return {
        "weights": b * N,
        "gradients": (8 + b) * N if zero.get("stage") == 1 else 4 * N / gpus,
        "optimizer": 4 * N / gpus,
        "moments": (8 * N - 4 * M) / gpus,
        "averages": 8 * N / gpus,
        "bucket": (1 + bool(zero.get("overlap_comm"))) * b * B,
        "activations": kept,
        # What comes later in the place of the activations, and is larger than they are.
        "update": max(0, copies - kept * B / N, 20 * M / gpus - kept),
    }


def activations(model: MMDiT, images: int, sides: tuple, tokens: int) -> int:
    """Bytes that autograd keeps between forward and backward, without the weights.

    Tensors that share memory are counted once. On fake tensors this takes no memory at all.
    """
    kept = {}  # storages by their number; held, so that no other takes it

    def keep(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    x = torch.zeros(images, model.config.in_channels, *sides)
    text = torch.zeros(images, tokens, model.config.text_dim)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ((model(x, torch.zeros(images), text).float() - x) ** 2).mean()
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def largest_pass(free: float, share: int, *where) -> int:
    """The most images in a pass that fit into so many free bytes; at least one.

    share: a GPU's images of a step; the pass divides it. where: as needs has it.
    """
    fitting = (m for m in range(share, 0, -1) if share % m == 0)
    return next((m for m in fitting if sum(needs(m, *where).values()) <= free), 1)
