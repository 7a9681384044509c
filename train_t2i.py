"""CHAPTER 2: text-to-image under DeepSpeed ZeRO-2.

    deepspeed train_t2i.py                          every GPU of this machine
    deepspeed --num_accelerators 2 train_t2i.py     two CPU processes
    torchrun --nproc_per_node 8 train_t2i.py        eight GPUs, without DeepSpeed's launcher
    python train_t2i.py                             one process
    deepspeed train_t2i.py --resume                 continue the run in --out, or begin it
    deepspeed train_t2i.py --resume --samples 2000000    continue, and make the run longer
    deepspeed train_t2i.py --data data/my           images of your own (tools/prepare.py)
    deepspeed train_t2i.py --data PAIRS --init RUN --out RUN2    straighten a run (tools/pairs.py)
    deepspeed train_t2i.py --data data/my512 --init runs/my256 --out runs/my512

Start reading at train_step() and train(), in part 4. The step is that of chapter 1; the new parts
are around it.

    1 settings      one line for each option, and what each machine can do
    2 samples       one endless sequence of samples, and which of them each rank reads
    3 ranks         processes, precision, and what ZeRO-2 splits between them
    4 step, loop    train_step, train, and Run, which holds all that changes
    5 save, resume  checkpoints of many ranks, whole or not there at all

One sample on its way:

    position --Rows.draw--> what is stored, caption, u, noise      in a worker (GPUs)
             --Rows.encode--> states, text, u, noise               on the device
             --rf.line--> data, noise, t                           a line, and a time on it
             --rf.rf_loss--> loss                                  through DeepSpeed's engine
             --backward, step--> shards                            gradients, AdamW, averages

Words. A rank is one process, with one GPU or on the CPU. A step moves the weights once. It may take
several passes (micro-batches) of each rank, whose gradients are averaged. A sample is one image
with its caption. The lengths of the run, its warm-up and its cooldown, and the intervals between
evaluations and between saves, are counted in samples: so they mean the same at any batch size and
number of GPUs.

What comes out, in --out: checkpoints/, model.safetensors + config.json (the averaged weights, at
the end), samples.png (a sheet with its captions), progress.png (one row for each evaluation,
from strips/), curves.png, log.csv, eval.csv. ds_config.json holds DeepSpeed's settings; what it
leaves "auto" comes from the command line.
"""

import atexit
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset

import rf
from common import pictures
from common.evaluate import COLUMNS, Judge, Ranks, asked, draw_asked, eval_row, validation
from common.log import Log, append_row, device_peak, progress_bar, show, write_rows
from common.memory import DTYPES, USABLE, bucket_size, largest_pass
from common.muon import use_muon
from common.pipeline import (
    RUN_FILE,
    Pipeline,
    checkpoints,
    drop_export,
    load_shard,
    mark_of,
    open_checkpoint,
    rank_of,
    read_record,
    run_facts,
    same_checkpoint,
    settle_run,
)
from common.settings import Count, NotNegative, changes, check, option, parse, read_json
from common.start import (
    NOTHING,
    SAVE,
    SHORTAGE,
    STOP,
    Signals,
    begin,
    claim,
    intact,
    line_of,
    listing,
    move_away,
    owned,
    program,
    real,
    still_there,
)
from inputs.rows import Batch, Rows
from inputs.sources import DataOptions
from inputs.stage import Copier
from mmdit import RESIDUALS, MMDiT, fitted, save_model

FILES = ("log.csv", "eval.csv", "samples.png", "progress.png", "curves.png")  # and weights
LOG_EVERY = 10  # steps in one row of log.csv
BETAS, EPS = (0.9, 0.99), 1e-15  # as in chapter 1: a tiny eps, or the rate would not transfer (muP)
# Two averages of the weights. If several checkpoints are kept, an average of any width between
# the two can be computed afterwards (EDM2, section 3.2): the best width is known only when the run
# is over.
EMA_WIDTHS = (0.05, 0.10)

# ------------------------------------------------------------------------------------------------
# 1 Settings and recipes
# ------------------------------------------------------------------------------------------------

# What a machine can do in reasonable time. The network is mmdit's preset of the same name. tiny and
# tiny-wide are for two CPU cores: half an hour (tiny), few shapes and colours, 25 image tokens.
# tiny-image is for small sets of pictures with captions, also there (docs/emoji.md). The others are
# for GPUs, with all shapes and colours; they were chosen by reasoning and have not run.
RECIPE = (
    "size", "shapes", "colors", "places", "batch_size", "samples", "warmup_samples",
    "cooldown_samples", "eval_every_samples", "save_every_samples",
)  # fmt: skip
RECIPES = {
    # In each row the first four values describe the world of shapes.
    "tiny": (20, 4, 6, 10, 64, 832_000, 6_400, 832_000, 83_200, 83_200),
    "tiny-wide": (20, 4, 6, 10, 64, 832_000, 6_400, 832_000, 83_200, 83_200),
    "tiny-image": (20, 4, 6, 10, 64, 448_000, 6_400, 448_000, 44_800, 44_800),
    "small": (32, 6, 10, 32, 256, 2_560_000, 25_600, 1_280_000, 256_000, 256_000),
    "0.2b": (64, 6, 10, 64, 512, 10_240_000, 102_400, 2_048_000, 512_000, 512_000),
    "1b": (64, 6, 10, 64, 1024, 51_200_000, 512_000, 10_240_000, 2_048_000, 1_024_000),
    "auraflow-6.8b": (
        64, 6, 10, 64, 2048, 102_400_000, 2_048_000, 20_480_000, 4_096_000, 1_024_000,
    ),
}  # fmt: skip
RECIPES = {name: dict(zip(RECIPE, row, strict=True)) for name, row in RECIPES.items()}


def recipe_of(preset: str | None) -> dict:
    """Defaults of a preset; --help shows them beside each option."""
    return RECIPES.get(preset or Settings.preset, {})


@dataclass(frozen=True)
class Settings(DataOptions):
    """All options: common/settings.py makes the command line, --help and the checks from them.

    fixed: a resumed run must have the same value. What is not fixed may change from the checkpoint
    on (--resume --samples 2000000 --lr 0.002), and log.csv says so. local: belongs to this call and
    is not saved. DataOptions (inputs/sources.py) adds the options of the data; RECIPES give some
    of the defaults.
    """

    DATA = "shapes"  # the data if --data is not given
    # Workers prepare batches ahead. On a CPU they would compete with the training for its cores.
    workers: int | None = option(
        None, "loader processes a rank (on GPUs one a core, at most 8; else 0)", least=0, local=True
    )
    # For data that does not fit on the local disk: its files (chunks of rows) are copied before
    # they are used and deleted afterwards.
    stage: Path | None = option(None, "a fast local disk: chunks are copied there", local=True)
    stage_limit: float = option(100.0, "GB that it may hold", above=0, local=True)

    # The network. precision: bf16 halves the memory of weights and activations and is faster on a
    # GPU; ZeRO-2 keeps fp32 weights beside them, which AdamW updates.
    preset: str = option("tiny", ", ".join(RECIPES), choices=RECIPES, fixed=True, group="network")
    residual: str | None = option(
        None,
        "form of a block: prenorm, or auraflow, which diffusers can read (the preset's)",
        choices=RESIDUALS,
        fixed=True,
    )
    init: Path | None = option(
        None, "start from the weights of run INIT; --size may differ", local=True
    )
    compile: str = option(
        "auto", "the blocks: on, off, auto (with GPUs)", choices=("auto", "on", "off"), local=True
    )
    precision: str = option("auto", "bf16, fp32", choices=("auto", "bf16", "fp32"))
    # A network or picture that does not fit, or a larger pass. It costs about a third more time.
    recompute: str = option(
        "none",
        "blocks: keep little for the backward pass and run them again there",
        choices=("none", "blocks"),
        local=True,
    )

    # Training. batch_size changes the result, micro_batch only memory and speed. lr holds at every
    # width (muP): it was searched with tiny. shift 2 was best on shapes: near the noise the network
    # decides what stands where, and the pictures have few details.
    samples: int = option(832_000, "to train on in all", least=1, group="training")
    batch_size: int = option(64, "samples a step, of all ranks together", least=1, most=2**20)
    # A larger pass uses a GPU better until its memory is full; the steps stay the same.
    micro_batch: int | None = option(None, "samples a pass of one rank (what fits)", least=1)
    # AdamW and Muon share the weights: Muon takes the matrices in the blocks (common/muon.py). The
    # rates mean different things: AdamW's is how far an entry moves in a step, Muon's how far an
    # output of a matrix moves. One schedule scales both.
    lr: float = option(4e-3, "learning rate at the base width; holds over width", least=0)
    muon_lr: float = option(
        0.04, "Muon's rate for the matrices in blocks; 0: AdamW moves them", least=0
    )
    warmup_samples: int = option(6_400, "until the full rate", least=0)
    cooldown_samples: int = option(832_000, "at the end, a line to 0", least=0)
    # Decay helps where images are seen in many epochs. Shapes never come twice.
    weight_decay: float = option(0.0, "AdamW's and Muon's, at the base width", least=0)
    shift: float = option(2.0, "above 1: more training times near the noise", least=0.01, most=100)
    time: str = option(
        "logit_normal", ", ".join(rf.TIME_DISTRIBUTIONS), choices=rf.TIME_DISTRIBUTIONS
    )
    # fixed: one curve of the log cannot hold two kinds of loss.
    loss: str = option("mse", "mse or pseudo_huber", choices=rf.LOSSES, fixed=True)
    segments: int = option(1, "pairs: straight pieces of a path", least=1, fixed=True)
    anneal: float = option(
        0.0,
        "pairs: first share of the run, in which fresh noise gives way",
        least=0,
        most=1,
    )
    # A step whose gradient is not finite is skipped on all ranks: one bad batch must not end a run
    # of weeks. But weights that have diverged give such gradients for ever.
    max_bad_steps: int = option(20, "skipped steps in a row that end the run", least=1)

    # Evaluation, always with the averaged weights. target_eval_loss is MLPerf's rule: the time
    # until a validation loss is reached measures speed and quality together.
    # An evaluation draws 6 · eval_prompts pictures. Each takes two forward passes with guidance for
    # each of two evaluations (rf_solver) in a step: at the defaults 5,000 training samples' work.
    eval_every_samples: int = option(83_200, "between evaluations", least=1, group="evaluation")
    eval_prompts: int = option(50, "scored captions of each of the six tags", least=1)
    # Images of one's own have no exact reader. A CLIP model (openai/clip-vit-base-patch32, say)
    # compares pictures of held-out captions with these captions and with the real pictures. The
    # fewer pictures there are, the larger the Fréchet distance: compare it at one number only.
    judge: str | None = option(
        None,
        "CLIP, name or folder: CLIP score, and Fréchet distance of its features (not Inception's,"
        " so not the FID of papers)",
        fixed=True,
    )
    judge_images: int = option(
        256,
        "--judge: pictures, or all held-out rows; few make the distance large",
        least=2,
        fixed=True,
    )
    cfg: float = option(3.0, "guidance of the pictures", least=-100, most=100)
    cfg_below: float = option(1.0, "guidance at times t up to this alone", least=0, most=1)
    solver: str = option("rf_solver", "of the pictures", choices=rf.SOLVERS)
    sample_steps: int = option(12, "solver steps of the pictures", least=1)
    target_eval_loss: float | None = option(
        None, "stop when the validation loss is reached", least=0
    )

    # The run and its folder. A cluster stops jobs at their time limit: --resume continues a run or
    # begins it, so the same command can be queued again and again.
    out: Path = option(Path("runs/shapes"), "folder of the run's files", local=True, group="run")
    resume: bool = option(False, "continue the run in --out, or begin it", local=True)
    overwrite: bool = option(False, "begin anew; the run in --out becomes OUT.old", local=True)
    # A checkpoint of the 6.8B network holds 150 GB (22 bytes a parameter): save by time, keep few.
    save_every_samples: int = option(83_200, "between checkpoints", least=1)
    save_minutes: float | None = option(None, "also save when so many have passed", above=0)
    keep: int = option(3, "checkpoints kept", least=1)
    ds_config: Path = option(
        Path(__file__).with_name("ds_config.json"), "DeepSpeed's configuration", local=True
    )
    threads: int | None = option(None, "CPU threads a rank (cores / ranks)", least=1, local=True)

    def __post_init__(self):
        """Refuse options that contradict each other, before any work is done."""
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")


def learning_rate(settings: Settings, seen: int) -> float:
    """Share of the base rate after `seen` samples: warm-up, constant, a line down to 0.

    A high rate learns fast, and the line down reduces the noise of the weights at the end. Presets
    from 0.2b on keep the full rate for most of the run, small for half of it; the line of tiny
    spans its whole run. The samples of a skipped step count, too.
    """
    rise = (seen + settings.batch_size) / max(1, settings.warmup_samples)  # not 0 in the first step
    return min(1, rise, (settings.samples - seen) / max(1, settings.cooldown_samples))


def annealing(settings: Settings, seen: int) -> float:
    """beta of rf.line: from 1 (fresh noise) to 0 (pairs) over the first share `anneal` of a run."""
    samples = settings.anneal * settings.samples
    return 1 - seen / samples if seen < samples else 0.0


# ------------------------------------------------------------------------------------------------
# 2 The sequence of samples, divided among ranks
# ------------------------------------------------------------------------------------------------
# A run reads one endless sequence of samples, numbered by position. What stands at a position
# (image, caption, whether the caption is dropped, noise, time) depends on the seed and the position
# alone. A step takes the next B positions, however many ranks share them; B is the batch size. So,
# up to rounding, the result does not depend on the number of ranks, and a resumed run needs to know
# one number: how many samples it has seen. It may go on with another B. But rows of several sizes
# or folders take turns by whole steps: then what stands at a position depends on B, too, and a
# resumed run must keep it.


class Samples(Dataset):
    """Positions in the sequence of samples → a Batch.

    __getitems__ and not __getitem__: torch's loader then asks for a whole micro-batch at once, and
    draw makes it as one Batch.
    """

    def __init__(self, rows: Rows, seed: int):
        self.rows, self.seed = rows, seed

    def __getitems__(self, positions: list[int]) -> Batch:
        return self.rows.draw(positions, self.seed)


def rank_positions(seen: int, micro_batch: int, ranks: Ranks) -> Iterator[list[int]]:
    """The positions of one rank's micro-batches, from `seen` on, endless.

    With 2 ranks and micro-batches of 3, rank 0 reads [0 1 2] [6 7 8] …, rank 1 [3 4 5] [9 10 11] …
    A step takes ranks · passes · micro_batch consecutive positions.
    """
    for first in count(seen + ranks.rank * micro_batch, ranks.count * micro_batch):
        yield list(range(first, first + micro_batch))


def loader(
    rows: Rows, settings: Settings, seen: int, micro_batch: int, ranks: Ranks, pin_memory=False
) -> Iterator[Batch]:
    """Endless micro-batches of one rank, made ahead by worker processes.

    A worker reads, decodes and draws noise while the GPU computes. pin_memory: batches lie in
    memory from which the GPU can copy by itself, so the host need not wait for the copy.
    """
    workers = settings.workers
    if workers is None:  # this rank's share of the cores (start_ranks)
        workers = min(8, torch.get_num_threads()) if pin_memory else 0
    if workers:
        atexit.register(_end_workers)
    return iter(
        DataLoader(
            Samples(rows, settings.seed),
            batch_sampler=rank_positions(seen, micro_batch, ranks),
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_trainer,
            persistent_workers=workers > 0,
        )
    )


def _as_it_is(batch: Batch) -> Batch:
    """In place of the loader's own collation: draw has made a whole batch already."""
    return batch


def _end_workers():
    """Kill the workers at exit: they ignore SIGTERM, and the program would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch reports killed workers as an error
    for worker in multiprocessing.active_children():
        worker.kill()


def _leave_signals_to_the_trainer(worker: int):
    """Launchers send signals to the whole process tree. The trainer still needs batches from its
    workers to end its step and save, so workers ignore these signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------
# 3 Ranks, and what ZeRO-2 splits between them
# ------------------------------------------------------------------------------------------------
# Plain data parallelism keeps everything on every rank: for each parameter 2 bytes of bf16 weight,
# 4 of gradient, 4 of fp32 weight, 8 of Adam's moments, and 8 of two averages, 26 in all. A network
# of 6.8 billion parameters then needs 178 GB on each GPU. ZeRO-2 (Rajbhandari et al. 2019,
# 1910.02054) keeps only the bf16 weights on every rank. Each of N ranks owns 1/N of all the rest.
# (Muon keeps one moment for each of its weights, so for those it is 4 bytes less.)
#
#     group     parameters that share a learning rate and decay, laid end to end in one flat row
#     shard     this rank's 1/N of that row, fp32: what AdamW steps on
#
# One step on two ranks, with a batch of 64:
#
#              rank 0                               rank 1
#     weights  all, bf16                            all, bf16
#     samples  0 … 31                               32 … 63
#     backward gradients of all weights             gradients of all weights
#              └─── reduce: the owner of each shard takes the mean of its gradients    ───┘
#     AdamW    moves the first half                 moves the second half
#     Muon     needs whole matrices: ranks exchange the pieces of those that are cut
#              └─── gather: every rank receives all new weights, as bf16 ───┘
#
# The averages are split with the moments, because rf.keep_averages makes them states of AdamW. In
# DeepSpeed's default every rank receives the whole mean gradient and takes its own part of it. With
# "use_multi_rank_bucket_allreduce": false in ds_config.json each part goes to its owner alone, that
# is half the bytes: a quarter less than plain data parallelism. The file also switches off a timer
# of DeepSpeed that would wait for the GPU twice in every pass. common/memory.py counts memory,
# tools/plan.py traffic, for any number of GPUs and passes.


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


def told(*names: str) -> int:
    """The first of these numbers that the environment has; else 1. ValueError if it is none."""
    name = next((name for name in names if os.environ.get(name)), "")
    value = os.environ.get(name, "1")
    if not value.isdecimal():
        raise ValueError(f"{name} {value!r} in the environment must be a number: unset it")
    return int(value)


def start_ranks(threads: int | None = None) -> Ranks:
    """Join the other ranks, as the launcher's environment says; alone without a launcher.

    deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. For a
    single process we set them ourselves, so there is one code path. threads: CPU threads of each
    rank; None: cores / ranks of this machine.
    """
    if find_spec("deepspeed") is None:  # chapter 1 does without it
        raise ValueError("deepspeed is not installed: pip install -r requirements.txt")
    if "RANK" not in os.environ:
        if told("SLURM_NTASKS") > 1:
            raise ValueError("several Slurm tasks without RANK: see the srun line in docs/gpu.md")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {key: str(value) for key, value in {**alone, "MASTER_PORT": port}.items()}
    lacks = [key for key in LAUNCHED if not os.environ.get(key)]
    if lacks:
        raise ValueError(f"the launcher has set RANK, but not {', '.join(lacks)}: see docs/gpu.md")
    numbers = [os.environ[key] for key in LAUNCHED[:4]]
    if not all(n.isdecimal() for n in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise ValueError(
            f"{', '.join(LAUNCHED[:4])} {' '.join(numbers)} must be numbers, RANK < WORLD_SIZE"
        )
    if sys.platform == "darwin":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # ZeRO's collectives do not run on MPS
    import deepspeed  # a slow import: only when the options have been read

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or each forked worker complains
    device = local_device()
    # Ranks with all cores each would slow each other down, on GPUs too (the evaluation's reader).
    local = max(1, told("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local))
    begin(device)
    # DeepSpeed ends a save with a barrier on the GPUs, in which all wait for the slowest disk: its
    # own limit of ten minutes would end a run with a large checkpoint.
    try:
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))
    except RuntimeError as error:
        if "extension" not in str(error):
            raise
        raise ValueError(
            f"DeepSpeed cannot compile its operators, is g++ there? {line_of(error)}"
        ) from error
    # A second group of all ranks, with gloo, for tensors and objects in host memory: it never waits
    # for a GPU.
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


def local_device() -> torch.device:
    """This rank's device: one GPU, or the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    if not accelerator.is_available():  # named by DS_ACCELERATOR
        raise ValueError(f"DS_ACCELERATOR {accelerator.device_name()} is not here: unset it")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.device_name(), int(os.environ["LOCAL_RANK"]))


def room(device: torch.device, ranks: Ranks) -> float:
    """Bytes that a run may take: of a GPU, or of a rank's share of its machine's memory.

    The least of all ranks, or they would take different passes. Called before the network is on the
    device: what lies there now is text encoder and VAE. All memory counts, not what happens to be
    free, so that a run and its resume on the same machines take the same passes.
    """
    from deepspeed.accelerator import get_accelerator

    here = get_accelerator()
    sharing = max(1, told("LOCAL_WORLD_SIZE", "LOCAL_SIZE")) if device.type == "cpu" else 1
    return min(ranks.gather(USABLE * here.total_memory() / sharing - here.memory_allocated()))


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is the fast precision: on accelerators that have it, and CPUs with AMX tiles.

    Most other CPUs convert bf16 to fp32 and back for each product: about three times slower.
    """
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


# What a ds_config.json may hold besides the keys of ours: none changes what is learned.
MAY_STAND = (
    "wandb", "comet", "flops_profiler", "comms_logger", "dump_state", "memory_breakdown",
    "prescale_gradients", "gradient_predivide_factor", "checkpoint", "aio",
)  # fmt: skip


def read_ds_config(settings: Settings, ranks: int, fits: Callable) -> dict:
    """ds_config.json with every "auto" filled in. ValueError if it contradicts the settings.

    A value that stands in the file and on the command line could differ, and DeepSpeed would use
    the file's. So the file says "auto" for what the command line knows; a number in place of "auto"
    must equal the command line's.

    fits: this file, a rank's share of a batch → the largest pass that fits, without --micro-batch.
    """
    file = settings.ds_config
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--ds-config {file} cannot be read: {error}") from error
    for section in ("zero_optimization", "bf16"):
        if not isinstance(config.setdefault(section, {}), dict):
            raise ValueError(f'{file}: "{section}" must be an object')
    # With stage 3 (split weights) or offloaded states, averages and weights would not lie side by
    # side on this device, and exchange_averages could not swap them. fp16 would need a loss scale.
    # Round-robin gradients lay a group's row in another order than load_checkpoint and Muon know.
    zero = config["zero_optimization"]
    if zero.get("stage") not in (1, 2) or zero["stage"] is True:
        raise ValueError(f'{file}: "stage" {zero.get("stage")!r} must be 1 or 2: see docs/gpu.md')
    # With an elastic checkpoint the shards would have another form.
    refused = ("offload_optimizer", "cpu_offload", "round_robin_gradients", "elastic_checkpoint")
    refused = dict.fromkeys(refused, zero)
    # optimizer, scheduler: the trainer brings its own.
    own = ("fp16", "torch_autocast", "optimizer", "scheduler")
    for key, holder in (refused | dict.fromkeys(own, config)).items():
        if holder.get(key, False) is not False:
            raise ValueError(f'{file}: "{key}" is not supported here: take it out')
    # DeepSpeed passes over a key that it does not know: a typing error would change the training.
    unknown = config.keys() - {*read_json(Settings.ds_config), *own, *MAY_STAND}
    if unknown:
        raise ValueError(f"{file}: {', '.join(sorted(unknown))} is not known here: take it out")
    check(f'{file}: "gradient_clipping"', config.get("gradient_clipping", 0.0), NotNegative)
    check(f'{file}: "steps_per_print"', config.setdefault("steps_per_print", 10**9), Count)
    if config.get("communication_data_type", "fp32") not in DTYPES:
        raise ValueError(f'{file}: "communication_data_type" must be fp32 or bf16')
    for key in ("tensorboard", "csv_monitor"):  # made before the folder is the run's
        path = dict(config.get(key) or {}).get("output_path")
        if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(settings.out)):
            raise ValueError(f'{file}: "output_path" of {key} lies in --out: choose another')
    batch = settings.batch_size
    micro = settings.micro_batch or fits(config, max(1, batch // ranks))
    # DeepSpeed's rule: batch = micro-batch · ranks · passes.
    passes, rest = divmod(batch, micro * ranks)
    if rest or not passes:
        per_pass = micro * ranks
        fitting = max(per_pass, batch // per_pass * per_pass)
        raise ValueError(
            f"--batch-size {batch} must be --micro-batch {micro} x {ranks} ranks x a whole number"
            f" of passes, but {batch} / {per_pass} = {batch / per_pass:.2f}: take --batch-size"
            f" {fitting}"
        )
    wanted = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
    }
    for key, value in wanted.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{file}: {key} {config[key]!r} contradicts the command line, which gives {value}"
                f' ({batch} = {micro} x {ranks} ranks x {passes}): write "auto" there'
            )
    bf16 = config["bf16"]
    if bf16.get("enabled", "auto") not in ("auto", settings.precision == "bf16"):
        raise ValueError(f"{file}: bf16 contradicts --precision {settings.precision}")
    bf16["enabled"] = settings.precision == "bf16"
    return config | wanted


class Requests:
    """A signal may reach some ranks only; all must save or stop at the same step, or they hang.

    Each step starts an asynchronous all-reduce of the requests, over gloo in host memory, and reads
    the result of the step before. So no rank waits, and all act together, one step later than
    asked.
    """

    def __init__(self, group):
        self.group, self.in_flight = group, None

    def exchange(self, request: int) -> int:
        """Send this rank's request on its way; → the greatest one of the step before."""
        flag = torch.tensor(request)  # on the CPU
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        before, self.in_flight = self.in_flight, (work, flag)
        if before is None:
            return NOTHING
        before[0].wait()  # sent a whole step ago: it is there
        return int(before[1])

    def saved(self):
        """A checkpoint has just been written: drop a request to save that is still under way."""
        if self.in_flight is not None:  # the maximum is the same on all ranks: all decide alike
            work, flag = self.in_flight
            work.wait()
            if int(flag) == SAVE:
                self.in_flight = None


@contextmanager
def averaged(engine, adamw, width: float):
    """Inside, the model holds averaged weights, on every rank; afterwards the trained ones again.

    Averages and fp32 weights lie in the same shards, so each rank swaps its own part, and DeepSpeed
    then gathers the network's weights from the shards as it does after every step.
    """
    rf.exchange_averages(adamw, rf.average_name(width))
    engine.optimizer.update_lp_params()  # fp32 shards → the network's weights, on every rank
    yield engine.module  # no finally: a rank that fails alone would hang in it
    rf.exchange_averages(adamw, rf.average_name(width))
    engine.optimizer.update_lp_params()


# ------------------------------------------------------------------------------------------------
# 4 Step and loop
# ------------------------------------------------------------------------------------------------


def train_step(run: "Run", batches: Iterator[Batch]):
    """One step on E‖v(x_t, t) − (noise − data)‖², on every rank, each on its share.

    The same as in chapter 1, with two differences: several passes may add up to one step, and
    DeepSpeed's engine takes the place of model, backward and optimizer. record_function names the
    parts for a profiler (experiments/throughput.py step).
    """
    settings, engine, rows = run.settings, run.engine, run.rows
    # Not by DeepSpeed's WarmupLR: it would give all groups one rate, and muP would be lost.
    for group in run.adamw.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(settings, run.seen)
    for _ in range(engine.gradient_accumulation_steps()):
        with record_function("part batch"):
            batch = next(batches)
        with record_function("part encode"):  # on the device: sample latents, encode the text
            states, text, u, noise = rows.encode(batch, engine.device)
            data, noise, t = rf.line(
                states,
                noise,
                u,
                segments=settings.segments,
                time=settings.time,
                shift=settings.shift,
                beta=annealing(settings, run.seen),
            )
        with record_function("part forward"):
            loss = rf.rf_loss(engine, data, text, t=t, noise=noise, loss=settings.loss).mean()
        with record_function("part backward"):  # gradients are averaged over the ranks
            engine.backward(loss)
        with record_function("part step"):
            engine.step()  # only the last pass of a step moves the weights
        run.log.add(loss)


def train(run: "Run"):
    """The loop. All ranks run it and make the same decisions at the same step.

    An evaluation or a save is work of all ranks together, so no rank may decide on it alone:
    run.seen is the same on all, and requests are exchanged. A stop saves but does not evaluate,
    because clusters kill a job a short time after they have asked it to stop.
    """
    settings = run.settings
    batches, bar = run.batches(), progress_bar(settings.samples, run.seen, run.ranks.rank == 0)
    with bar, Signals(settings.save_minutes) as signals:
        while run.seen < settings.samples and not run.stopped:
            train_step(run, batches)
            run.end_step(bar)
            # One clock decides when --save-minutes have passed: rank 0's.
            request = run.requests.exchange(signals.take(clock=run.ranks.rank == 0))
            run.stopped |= request == STOP
            if run.passed("eval_every_samples") and not run.stopped:
                run.evaluate(bar)
            if run.passed("save_every_samples") or request == SAVE:
                run.save()
                bar.unpause()  # the save does not count for the speed
        run.log.flush()
        if not run.stopped:
            run.evaluate(bar)
        run.save()


class Run:
    """All that changes while training: network, optimizer, position, log.

    In chapter 1 these are a handful of arguments. Here evaluations and saves come between the steps
    and need nearly all of them, so they are kept in one place.

    step: number of steps, skipped ones included. seen: number of samples read so far; it determines
    which sample comes next.
    """

    def __init__(self, settings: Settings, rows: Rows, ranks: Ranks, record: dict | None):
        import deepspeed
        import pydantic

        self.settings, self.rows, self.ranks = settings, rows, ranks
        self.step, self.seen, self.saved_at, self.bad_in_row = 0, 0, None, 0
        self.stopped, self.copier, self.evals = False, None, []
        device = local_device()
        judge = Judge(settings.judge, device) if settings.judge else None
        sides = rows.sides()
        # Build the network of the preset for the channels, text features and grid of the data. All
        # ranks have the same seed, so they start with the same weights.
        torch.manual_seed(settings.seed)  # no step draws from global state
        sizes = {"channels": rows.latent_channels, "text_dim": rows.text.dim, "sides": list(sides)}
        model = MMDiT(fitted(settings.preset, **sizes, residual=settings.residual))
        model.recompute, self.config = settings.recompute == "blocks", model.config
        largest = max(sides, key=math.prod)

        def fits(ds, share):
            free = room(device, ranks)
            return largest_pass(free, share, self.config, settings, ranks.count, largest, ds)

        config = read_ds_config(settings, ranks.count, fits)
        bucket = bucket_size(config, model.n_parameters())
        config["zero_optimization"]["reduce_bucket_size"] = bucket
        if settings.init and record is None:
            older = Pipeline.open(settings.init)
            model.start_from(older.model, settings.size / older.facts["size"])
        model.to(device)
        # Average FLOPs of a sample over all shapes of images, for the MFU (model FLOPs
        # utilisation): what --recompute computes a second time does not count.
        tokens = settings.text_tokens
        self.flops = sum(
            share * model.flops_per_image(h, w, tokens) for (h, w), share in sides.items()
        )
        # Compiled blocks on GPUs: each is one graph, of which Triton makes a few large kernels.
        cuda = device.type == "cuda" and find_spec("triton") is not None
        self.compiles = settings.compile == "on" or (settings.compile == "auto" and cuda)
        if self.compiles:
            model.compile_blocks()  # in place, so the names of the parameters do not change
        # Fused: all weights of a group move in one kernel, not several kernels for each tensor.
        # The matrices in the blocks are a group for Muon (common/muon.py).
        groups = model.param_groups(settings.lr, settings.weight_decay, muon_lr=settings.muon_lr)
        fused = device.type in ("cpu", "cuda")
        self.adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused)
        use_muon(self.adamw)  # both before DeepSpeed takes the optimizer over
        rf.keep_averages(self.adamw, EMA_WIDTHS)
        # DeepSpeed takes model and optimizer over: it casts the weights to the precision, makes
        # fp32 shards of them, and puts those into the optimizer's groups.
        try:
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.adamw, config=config, dist_init_required=False
            )
        except Exception as error:  # a dozen kinds, for what it was told or what is not installed
            said = line_of(error)
            if any(word in said for word in SHORTAGE):
                raise
            if isinstance(error, pydantic.ValidationError):
                said = ": ".join(f"{error}".splitlines()[1:3])
            raise ValueError(f"{settings.ds_config} is refused by DeepSpeed: {said}") from error
        # Choose the captions of the evaluations, once: so pictures of one prompt can be compared
        # over the run. Open the log, which rank 0 writes.
        self.asked = asked(rows, settings.eval_prompts, judge, settings.judge_images)
        self.peak = device_peak(device)
        path = settings.out / "log.csv" if ranks.rank == 0 else None
        self.log, self.requests = Log(path, LOG_EVERY, gather_losses), Requests(ranks.group)

    def warm_up(self):
        """Compile the blocks for each shape of picture, before the ranks need each other.

        Compiling takes minutes, on one rank more than on another. In training the faster one would
        wait in NCCL, whose time-out ends the run; here it waits at a barrier over gloo, for hours
        if need be. Only gradients of the input are asked for, so DeepSpeed's hooks on those of the
        weights stay still. A pass too large for the memory shows here, too.
        """
        if not self.compiles:
            return
        images, tokens = self.engine.train_micro_batch_size_per_gpu(), self.settings.text_tokens
        for side in self.rows.sides():
            shape = (images, self.config.in_channels, *side)
            x = torch.zeros(shape, device=self.engine.device, requires_grad=True)
            text = x.new_zeros(images, tokens, self.config.text_dim)
            velocity = self.engine.module(x, x.new_zeros(images), text)
            torch.autograd.grad(velocity.float().sum(), x)
        dist.barrier(group=self.ranks.group)

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from here on. Called once, after a checkpoint is loaded."""
        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        pinned = self.engine.device.type == "cuda"
        batches = loader(self.rows, self.settings, self.seen, micro_batch, self.ranks, pinned)
        # The copier is a thread. It starts after the workers, because forking a process that has
        # threads can deadlock.
        if self.copier is not None:
            self.copier.begin(self.seen)
        return batches

    def end_step(self, bar):
        """Count, log, show. Raises FloatingPointError after too many steps that were skipped.

        DeepSpeed skips a step whose gradient is not finite: a rare overflow must not end a run of
        weeks. Many in a row mean that the weights have diverged, and further training is useless.
        """
        settings = self.settings
        lr = settings.lr * learning_rate(settings, self.seen)  # of the step just made
        self.step += 1
        self.seen += settings.batch_size  # of all ranks together
        skipped = self.engine.optimizer.overflow
        self.bad_in_row = self.bad_in_row + 1 if skipped else 0
        if self.copier is not None:
            self.copier.passed(self.seen)
        loss, norm = self.log.losses[-1], self.engine.get_global_grad_norm()
        skips = self.engine.skipped_steps
        row = self.log.end_step(self.step, self.seen, norm, lr=lr, skipped=skips)
        if self.bad_in_row >= settings.max_bad_steps:
            # The gradient is a mean over ranks, so all of them see NaN. Name the ranks whose own
            # loss is not finite: this identifies a faulty GPU.
            finite = self.ranks.gather(bool(loss.isfinite()))
            bad = [str(rank) for rank, fine in enumerate(finite) if not fine]
            where = f"on rank {', '.join(bad)}" if bad else "in the gradient alone"
            saved = checkpoints(settings.out / "checkpoints")
            left = f"{saved[-1]} is from before" if saved else "nothing was saved before it"
            raise FloatingPointError(
                f"{self.bad_in_row} steps in a row were not finite, the last one step {self.step}"
                f" ({where}, lr {lr:.3g}); {left}; start again with a lower --lr"
            )
        if row:
            show(bar, row, self.flops, self.peak, self.ranks.count)
            self.monitor({f"Train/{key}": row[key] for key in ("loss", "grad_norm", "lr")})
        bar.update(settings.batch_size)

    def monitor(self, values: dict[str, float], sheet: Path | None = None):
        """To tensorboard, wandb or csv, whichever ds_config.json switches on.

        sheet: a PNG for the first two, past DeepSpeed, which passes on numbers alone.
        """
        monitor = self.engine.monitor
        if self.ranks.rank != 0 or not monitor.enabled:
            return
        if sheet and monitor.tb_monitor:
            picture = pictures.read_png(sheet)
            monitor.tb_monitor.summary_writer.add_image("Eval/pictures", picture, self.seen)
        if sheet and monitor.wandb_monitor:
            import wandb

            monitor.wandb_monitor.log({"Eval/pictures": wandb.Image(str(sheet))}, self.seen)
        monitor.write_events([(k, v, self.seen) for k, v in values.items()])

    def passed(self, interval: str) -> bool:
        """Whether the last step crossed a multiple of this interval."""
        # Not `seen % every == 0`: an interval need not be a multiple of the batch, and then this
        # would be true for few steps or none.
        every = getattr(self.settings, interval)
        return self.seen // every > (self.seen - self.settings.batch_size) // every

    def evaluate(self, bar):
        """The validation loss, the scores and the pictures of the averaged weights.

        Every rank computes a share; rank 0 writes. Held-out rows, captions and noise are always the
        same, so two evaluations differ by the weights alone.
        """
        if self.evals and self.evals[-1]["samples"] == self.seen:
            return
        settings, device = self.settings, self.engine.device
        # The narrower average: during training the wider one lags too far behind. Not compiled:
        # an evaluation has batches of many other shapes, and each would cost a compilation.
        eager = torch.compiler.set_stance("force_eager")
        with eager, averaged(self.engine, self.adamw, EMA_WIDTHS[0]) as model:
            by_time = validation(model, self.rows, settings, device, self.ranks)
            frames, scores = draw_asked(model, self.rows, self.asked, settings, device, self.ranks)
        row = eval_row(self.seen, by_time) | scores
        loss = row["loss"]
        self.evals.append(row)  # on every rank, so that all skip the same evaluation (above)
        if self.ranks.rank == 0:
            out = settings.out
            captions = [self.asked.captions[i] for i in self.asked.shown]
            append_row(out / "eval.csv", row)
            pictures.curves(self.log.rows, self.evals, out / "curves.png")
            # Each evaluation keeps its strip as a file: progress.png is drawn from all of them,
            # also from those before a resume.
            if captions:
                first = 2 * COLUMNS
                pictures.captioned(frames[-1], captions, out / "samples.png", COLUMNS)
                pictures.strip(frames[-1][:first], out / "strips" / f"{self.seen:012d}.png")
                pictures.progress(out / "strips", captions[:first], out / "progress.png")
            sheet = out / "samples.png" if captions else None
            self.monitor({f"Eval/{key}": value for key, value in row.items()}, sheet)
            shown = {"score": scores["mean"]} if "mean" in scores else scores
            said = "".join(f", {name} {value:.3f}" for name, value in shown.items())
            bar.write(f"{self.seen} samples: validation loss {loss:.4f}{said}")
        bar.unpause()  # the evaluation does not count for the speed
        # The losses were gathered, so every rank comes to the same decision.
        target = settings.target_eval_loss
        self.stopped |= target is not None and loss <= target

    def save(self):
        """Write checkpoints/<samples>, whole or not at all, and delete all but the last `keep`.

        Raises OSError if this rank could not write: earlier checkpoints are not changed.
        """
        if self.saved_at == self.seen:  # just saved, for another reason
            return
        self.saved_at = self.seen
        self.log.flush()  # or a resumed run would not know the losses since the last row
        # Of these, a sampler reads facts, model, widths and step; a resume reads step and the rest.
        facts = run_facts(self.settings, self.rows, self.config, self.seen)
        record = {
            "samples": self.seen,
            "step": self.step,
            "world_size": self.ranks.count,
            "settings": self.settings.saved(),
            "rows": self.rows.id,
            "model": asdict(self.config),
            "facts": facts,
            "widths": EMA_WIDTHS,
            "log": self.log.rows,
            "evals": self.evals,
        }
        # It goes into each file, with the rank: files of two checkpoints never mix.
        record["mark"] = self.ranks.gather(mark_of(record))[0]
        for group in self.adamw.param_groups:
            group["mark"] = f"{record['mark']} {self.ranks.rank}"
        write_checkpoint(
            self.engine, self.settings.out / "checkpoints", record, self.settings.keep, self.ranks
        )
        if self.ranks.rank == 0:
            drop_export(self.settings.out)  # of an earlier end; finish writes the new one
        self.requests.saved()

    def load(self, path: Path, record: dict):
        """Put back weights, shards, counts and log from a checkpoint."""
        for file in sorted(path.glob("*.pt"))[self.ranks.rank :: self.ranks.count]:
            intact(file)
        load_checkpoint(self.engine, self.adamw, path, record["mark"], self.ranks)
        self.step, self.seen = record["step"], record["samples"]
        self.evals, self.log.rows = record["evals"], record["log"]
        self.log.changed = changes(record["settings"], self.settings)
        # A finished run is saved again if options change, or the next resume would undo them.
        self.saved_at = None if self.log.changed else self.seen

    def open(self):
        """Bring the run's files to the state of the checkpoint, or of the start: later rows go.

        Steps after the checkpoint are made again, and with them their rows of the log. Without this
        a resumed run would hold them twice.
        """
        out = self.settings.out
        if self.ranks.rank == 0:
            if not self.seen:
                shutil.rmtree(out / "strips", ignore_errors=True)  # of a start without a checkpoint
            write_rows(out / "eval.csv", self.evals)
            self.log.begin()


def gather_losses(losses: torch.Tensor) -> torch.Tensor:
    """(k,) of each rank → (ranks, k), on the device: the log's only traffic, once an interval."""
    # Gathered straight into one tensor; a list of tensors would need a further copy.
    table = losses.new_empty(dist.get_world_size(), len(losses))
    dist.all_gather_into_tensor(table.view(-1), losses)
    return table


# ------------------------------------------------------------------------------------------------
# 5 Save and resume
# ------------------------------------------------------------------------------------------------
# Each save makes one folder, a checkpoint. It is complete or not there at all:
#     *zero_pp_rank_*  DeepSpeed's shards of weights, moments and averages (pickles)
#     mp_rank_*        DeepSpeed's copy of the weights
#     run.json         settings, facts, position, log: what the trainer itself remembers
# A checkpoint of N ranks resumes on M: each takes its part of all shards (load_checkpoint).
#
# A resume restores the fp32 weights, the optimizer's moments and counts of steps, the averages, the
# number of samples seen, log and evaluations. Random generators, the order of the data and the
# loader's place need not be restored: they follow from seed and position. On the same number of
# ranks the rest of the run is bit-identical (tested on CPUs). On another number the order of sums,
# and so the rounding, differs. Nor are rates and decay restored: they follow from the settings,
# which may have changed, and the samples seen.

PARTIAL = "partial"  # a folder beside the checkpoints; safe to delete


def remove(path: Path):
    """Delete a folder, a file, or a link (not what it leads to), if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def write_checkpoint(engine, folder: Path, record: dict, keep: int, ranks: Ranks):
    """Every rank writes its shard into partial/; rank 0 then renames the folder.

    A rename is one operation of the file system. So a reader finds the whole checkpoint or none,
    whenever the power fails. Older checkpoints are deleted after the new one is complete.
    """
    partial, target = folder / PARTIAL, folder / f"{record['samples']:012d}"
    first = ranks.rank == 0
    if first:
        still_there(partial)
        remove(partial)
        partial.mkdir(parents=True)
    dist.barrier(group=ranks.group)  # the folder is there before anyone writes into it
    try:
        marked = {"mark": record["mark"]}
        engine.save_checkpoint(str(folder), tag=PARTIAL, client_state=marked, save_latest=False)
        if first:
            (partial / RUN_FILE).write_text(json.dumps(record))
        # On the disk before the name changes. Each rank its own: on a network's file system nobody
        # else can flush what a machine still holds.
        for path in partial.glob("*" if first else f"*zero_pp_rank_{ranks.rank}_*"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        dist.barrier(group=ranks.group)  # the files of every rank are written
        if first:
            remove(target)
            os.replace(partial, target)
            if (folder / "latest").is_dir():
                remove(folder / "latest")
            (folder / "latest.partial").write_text(target.name)
            os.replace(folder / "latest.partial", folder / "latest")  # for DeepSpeed's own tools
            for old in checkpoints(folder)[:-keep]:
                # Rename first: an interrupted deletion must not look like a checkpoint.
                os.replace(old, folder / PARTIAL)
                remove(folder / PARTIAL)
    except (OSError, RuntimeError) as error:  # torch's writer: RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        left = checkpoints(folder)
        left = f"{left[-1]} still stands" if left else "there is none before it"
        raise OSError(f"the checkpoint {target} could not be written: {error}; {left}") from error
    dist.barrier(group=ranks.group)


def whole_record(path: Path) -> dict:
    """What the trainer wrote with a checkpoint. ValueError if it is partial or not ours.

    A copy from another machine may be incomplete, although a checkpoint of ours never is.
    """
    try:
        record = read_record(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}: move {path} away, and --resume takes the one before") from error
    # One shard for each rank that wrote it, and the weights that rank 0 wrote.
    shards, wanted = len(list(path.glob("*zero_pp_rank_*_optim_states.pt"))), record["world_size"]
    if shards != wanted or not list(path.glob("mp_rank_*")):
        raise ValueError(
            f"{path} is partial: it holds {shards} of {wanted} optimizer shards"
            f" and {len(list(path.glob('mp_rank_*')))} mp_rank_*; delete it, and --resume takes"
            " the one before"
        )
    return record


def load_checkpoint(engine, adamw, path: Path, mark: str, ranks: Ranks):
    """Weights, moments and averages from a checkpoint of any number of ranks.

    The shards of a group, laid end to end in the order of the ranks that wrote them, are the
    group's row. This rank copies the part that is its shard now. The files are mapped into memory,
    so it reads little more than that. ValueError if the checkpoint is damaged.
    """
    try:
        loaded, client = engine.load_checkpoint(
            str(path.parent), tag=path.name, load_optimizer_states=False
        )
        if loaded is None or client.get("mark") != mark:  # DeepSpeed only warns of the first
            raise ValueError(f"mp_rank_* is not of the {RUN_FILE} beside it")
        files = sorted(path.glob("*zero_pp_rank_*_optim_states.pt"), key=rank_of)
        saved = [load_shard(file, checked=False)["optimizer_state_dict"] for file in files]
        for file, each in zip(files, saved, strict=True):
            same_checkpoint(file, each, mark)
        for i, group in enumerate(adamw.param_groups):
            (shard,) = group["params"]  # fp32
            states = [each["base_optimizer_state"]["state"][i] for each in saved]
            mine = partial(part_of_row, first=ranks.rank * len(shard), size=len(shard))
            shard.data.copy_(mine([each["single_partition_of_fp32_groups"][i] for each in saved]))
            adamw.state[shard] = {
                name: (x.clone() if x.ndim == 0 else mine([s[name] for s in states])).to(shard)
                for name, x in states[0].items()
            }
            written = saved[0]["base_optimizer_state"]["param_groups"][i]
            group["updates"] = written["updates"]  # without it the averages would start again
    except Exception as error:  # of torch, for a file that is cut or has changed
        raise ValueError(
            f"{path} is damaged ({line_of(error)}): move it away, and --resume takes the one before"
        ) from error
    engine.optimizer.update_lp_params()  # fp32 shards → the network's weights, on every rank


def part_of_row(pieces: list[torch.Tensor], first: int, size: int) -> torch.Tensor:
    """Elements first … first + size − 1 of the row that the pieces make, end to end. DeepSpeed pads
    a row, so that all shards are equally long: beyond its end lie zeros."""
    part, begin = torch.zeros(size), 0
    for piece in pieces:
        low, high = max(first, begin), min(first + size, begin + len(piece))
        if low < high:
            part[low - first : high - first] = piece[low - begin : high - begin]
        begin += len(piece)
    return part


def launch(typed: dict):
    """Everything before and after the loop. All checks come before the first file of the run is
    written, and an old run is moved away only when they have passed."""
    # 1. Join the other ranks. If --out holds a run: resume it, replace it, or stop. All ranks look
    # at the same folder, so they come to the same answer without asking each other.
    ranks = start_ranks(typed.get("threads"))
    out = typed["out"] = real(typed.get("out", Settings.out))
    claim(out, "train_t2i.py")
    before = listing(out)  # compared once the folder is ours: another process may write meanwhile
    present, record = checkpoints(out / "checkpoints"), None
    finished = present or (out / "model.safetensors").exists()  # what is worth keeping
    if present and typed.get("resume"):
        record = whole_record(present[-1])
    elif finished and typed.get("resume"):
        raise ValueError(f"the run in {out} has no checkpoint: begin anew with --overwrite")
    # One that was killed before its first checkpoint counts, too, or whose weights lie elsewhere.
    begun = finished or any((out / name).exists() for name in FILES)
    if begun and not typed.get("overwrite") and not typed.get("resume"):
        raise ValueError(
            f"--out {out} already holds a run: continue it with --resume, replace it with"
            " --overwrite, or choose another --out"
        )
    device, stage = local_device(), typed.get("stage")
    if stage is not None:  # each run has a folder of its own there
        stage = stage / f"t2i-{zlib.crc32(os.path.realpath(out).encode()):08x}"
    # 2. Combine the settings of the command line, the checkpoint and the data; open the data. Only
    # headers are read here: how large pictures are, which encoders made them, how many rows.
    saved = record["settings"] if record else {}
    # The default of --precision depends on the machine, but a resumed run keeps what it had.
    own = [{"precision": "bf16" if native_bf16(device) else "fp32"}]
    settings, rows = settle_run(Settings, typed, record or {}, device, recipe_of, stage, own)
    # The last step may go beyond --samples: what is not changed is never too little.
    if record and settings.samples < min(record["samples"], saved["samples"]):
        raise ValueError(
            f"--samples {settings.samples} is less than the {record['samples']} that the run in"
            f" {out} has seen: give more, or choose another --out"
        )
    if stage is not None and not any(source.ranges for source in rows.sources):
        raise ValueError("--stage is for the folders of tools.prepare: drop it")
    with ExitStack() as around:
        # 3. Data on slow storage: copy chunks before they are used.
        copier = None
        if stage is not None:  # before Run, which reads held-out rows from there
            if int(os.environ["LOCAL_RANK"]) == 0:  # one on each node
                # A copier empties the folder first: not while another run reads from it.
                around.enter_context(owned(stage, "train_t2i.py --stage", "--stage"))
                seen = record["samples"] if record else 0
                copier = Copier(rows, settings.stage_limit * 1e9, seen)
                around.callback(copier.close)
            dist.barrier(group=ranks.group)
        # 4. Network, optimizer, DeepSpeed; the checkpoint; the loop.
        run = Run(settings, rows, ranks, record)
        run.copier = copier
        if record:
            run.load(present[-1], record)
        run.warm_up()
        if ranks.rank == 0:
            if settings.overwrite and begun and move_away(out, "train_t2i.py", before):
                before = []
            around.enter_context(owned(out, "train_t2i.py", before=before))
            passes = run.engine.gradient_accumulation_steps()
            print(
                f"{ranks.count} ranks on {device.type}, {settings.precision};"
                f" a step: {settings.batch_size} samples in {passes} passes"
            )
        run.open()
        train(run)
        finish(run)


def finish(run: Run):
    """Write the averaged weights as safetensors, for programs that do not use DeepSpeed.

    Rank 0 reads them from the shards of the last checkpoint, in host memory. No GPU need hold them
    whole, and the other ranks have nothing to do.
    """
    settings, out = run.settings, run.settings.out
    if run.ranks.rank == 0:
        model, _ = open_checkpoint(out)
        facts = run_facts(settings, run.rows, model.config, run.seen)
        save_model(out, model, facts=facts)
        state = "stopped" if run.seen < settings.samples else "finished"
        again = "; add --resume to continue" if run.seen < settings.samples else ""
        print(f"{state} at {run.seen} of {settings.samples} samples; all is in {out}{again}")


@program("train_t2i.py")
def main(argv: list[str] | None = None):
    typed = parse(Settings, argv, __doc__, RECIPES)
    try:
        launch(typed)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
