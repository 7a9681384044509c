"""ZERO: how processes meet, what ZeRO-2 splits between them, how it becomes whole again, is saved.

ZeRO-2 (Rajbhandari et al. 2019, 1910.02054) keeps the weights on every rank, but each rank owns
only 1/N of the gradients, of the fp32 master weights and of Adam's moments:

    group     parameters that share a learning rate and decay, laid end to end in one flat row
    shard     this rank's 1/N of that row, fp32: what AdamW steps on, and what the EMA averages

    checkpoint folder, one a save, whole or not there at all:
        zero_pp_rank_*   DeepSpeed's shards of weights and moments   (pickles: open only your own)
        mp_rank_*        DeepSpeed's copy of the weights
        ema_0.05, …      the averaged weights, safetensors that mmdit.load_model opens
        run.json         settings, position, log: what the trainer itself remembers

A checkpoint of N ranks resumes on M: the EMA is stored whole, and DeepSpeed's universal checkpoint
re-cuts the rest. Tried with DeepSpeed 0.19.8; the attributes used here are internal to it, and a
version without them is refused by name.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

import cpu
from mmdit import save_weights

RUN_FILE = "run.json"
PARTIAL, UNIVERSAL = "partial", "universal"  # folders beside the checkpoints; safe to delete

# ------------------------------------------------------------------------------------------------
# Processes, batches, precision: what must fit together before anything is built
# ------------------------------------------------------------------------------------------------


def start_processes(threads: int | None = None):
    """Join the other ranks, as the launcher's environment says; alone without a launcher.

    threads: of the CPU, for each rank; None shares the cores out. Returns the gloo group for what
    stays in host memory.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError("several Slurm tasks without RANK: see the README's srun line")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {key: str(value) for key, value in {**alone, "MASTER_PORT": port}.items()}
    if sys.platform == "darwin":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # ZeRO's collectives do not run on MPS
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: fp32 range, shorter products
    if local_device().type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local))
        cpu.tune()
    deepspeed.init_distributed(verbose=False)
    return dist.new_group(backend="gloo", timeout=timedelta(hours=4))  # a large re-cut takes long


def local_device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(accelerator.device_name(), int(os.environ["LOCAL_RANK"]))


def read_ds_config(args: Namespace, world_size: int, universal: bool) -> dict:
    """ds_config.json with every "auto" filled in. ValueError if it contradicts the command line."""
    try:
        config = json.loads(args.ds_config.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--ds-config {args.ds_config} cannot be read: {error}") from error
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ValueError(f'{args.ds_config}: "stage" {stage} must be 2 (or 1), see zero.py')
    for key, holder in {"offload_optimizer": config["zero_optimization"], "fp16": config}.items():
        if key in holder:
            raise ValueError(f'{args.ds_config}: "{key}" is not supported here: take it out')
    micro = args.micro_batch
    if micro is None:  # the largest pass that divides a rank's share
        share = max(1, args.batch_size // world_size)
        micro = max(m for m in range(1, min(share, args.most_at_once) + 1) if share % m == 0)
    accumulation, rest = divmod(args.batch_size, micro * world_size)
    if rest or not accumulation:
        per_pass = micro * world_size
        fitting = max(per_pass, args.batch_size // per_pass * per_pass)
        raise ValueError(
            f"--batch-size {args.batch_size} must be --micro-batch {micro} x {world_size} ranks x a"
            f" whole number of passes, but {args.batch_size} / {per_pass} ="
            f" {args.batch_size / per_pass:.2f}: take --batch-size {fitting}"
        )
    wanted = {
        "train_batch_size": args.batch_size, "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    for key, value in wanted.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{args.ds_config}: {key} {config[key]} contradicts the command line, which gives"
                f" {value} ({args.batch_size} = {micro} x {world_size} ranks x {accumulation}):"
                ' write "auto" there'
            )
    config |= wanted
    bf16 = config.setdefault("bf16", {})
    if bf16.get("enabled", "auto") == "auto":
        bf16["enabled"] = args.precision == "bf16"
    elif bf16["enabled"] != (args.precision == "bf16"):
        raise ValueError(f"{args.ds_config}: bf16 contradicts --precision {args.precision}")
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is the fast precision: on accelerators that have it, and CPUs with AMX tiles."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


class Wishes:
    """What any rank wishes becomes known to all of them one step later: each step's flags travel
    over gloo, in host memory, while the next step is computed, so nobody waits for a device.

    SIGTERM and Ctrl-C save and stop, SIGUSR1 saves and goes on, so does --save-minutes. A second
    Ctrl-C interrupts at once.
    """

    NOTHING, SAVE, STOP = 0, 1, 2

    def __init__(self, minutes: float | None, host_group):
        self.minutes, self.group, self.wish = minutes, host_group, self.NOTHING
        self.last_save, self.in_flight = time.monotonic(), None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._heard)

    def _heard(self, number, frame):
        self.wish = max(self.wish, self.SAVE if number == signal.SIGUSR1 else self.STOP)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def exchange(self, clock: bool) -> int:
        """Send this rank's wish on its way; the greatest wish of the step before, of all ranks.

        clock: whether this rank looks after --save-minutes.
        """
        wish, self.wish = self.wish, self.NOTHING
        now = time.monotonic()
        if clock and self.minutes is not None and now - self.last_save >= 60 * self.minutes:
            self.last_save = now  # asked once, not again until it is done
            wish = max(wish, self.SAVE)
        flag = torch.tensor(wish)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        before, self.in_flight = self.in_flight, (work, flag)
        if before is None:
            return self.NOTHING
        before[0].wait()
        return int(before[1])

    def saved(self):
        """A checkpoint has just been written: what was asked for before it is done."""
        self.last_save = time.monotonic()
        if self.in_flight is not None:  # the greatest of all ranks: they decide alike
            work, flag = self.in_flight
            work.wait()
            if int(flag) == self.SAVE:
                self.in_flight = None


# ------------------------------------------------------------------------------------------------
# Shards ↔ whole tensors
# ------------------------------------------------------------------------------------------------


class Shards:
    """The fp32 rows of this rank, and where each parameter lies in the whole rows.

    mine: one flat fp32 tensor a group. Another set of tensors of the same shapes, an average of
    `mine` say, becomes whole in the same way.
    """

    NEEDED = (
        "single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets",
    )  # fmt: skip

    def __init__(self, engine, host_group):
        import deepspeed

        optimizer = engine.optimizer
        missing = [name for name in self.NEEDED if not hasattr(optimizer, name)]
        if missing:
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__} has no {missing[0]}, which the EMA averages:"
                ' set "stage": 2 in ds_config.json, and take a release near 0.19.8'
            )
        self.mine: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.host_group = host_group  # gloo: what travels through it stays in host memory
        self.world_size = dist.get_world_size()
        names = {id(p): name for name, p in engine.module.named_parameters()}
        self.layout = [  # for each group: (name, shape, where it starts in the row)
            [(names[id(p)], p.shape, offset) for p, offset in zip(group, offsets, strict=True)]
            for group, offsets in zip(
                optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
        ]

    def whole(self, shards: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """On every rank: name → the full tensor, in `dtype`, on the device (views of one row)."""
        tensors = {}
        for shard, layout in zip(shards, self.layout, strict=True):
            row = shard.new_empty(self.world_size * shard.numel(), dtype=dtype)
            dist.all_gather_into_tensor(row, shard.to(dtype))
            tensors |= self._named(row, layout)
        return tensors

    def whole_on_rank_0(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """On rank 0 (elsewhere {}): name → the full fp32 tensor, in host memory."""
        tensors, first = {}, dist.get_rank() == 0
        for shard, layout in zip(shards, self.layout, strict=True):
            mine = shard.detach().cpu()
            parts = [torch.empty_like(mine) for _ in range(self.world_size)] if first else None
            dist.gather(mine, parts, group=self.host_group)
            if first:
                tensors |= self._named(torch.cat(parts), layout)
        return tensors

    def cut(self, read: Callable[[str], Tensor]) -> list[Tensor]:
        """This rank's shards of whole tensors; `read` gives one by name, when its turn comes."""
        rank, shards = dist.get_rank(), []
        for shard, layout in zip(self.mine, self.layout, strict=True):
            first, last = rank * shard.numel(), (rank + 1) * shard.numel()
            out = torch.zeros_like(shard)  # padding stays zero
            for name, shape, offset in layout:
                begin, end = max(first, offset), min(last, offset + shape.numel())
                if begin < end:
                    flat = read(name).reshape(-1)[begin - offset : end - offset]
                    out[begin - first : end - first].copy_(flat)
            shards.append(out)
        return shards

    @staticmethod
    def _named(row: Tensor, layout) -> dict[str, Tensor]:
        return {
            name: row[offset : offset + shape.numel()].view(shape) for name, shape, offset in layout
        }


# ------------------------------------------------------------------------------------------------
# Checkpoints: a folder appears whole, under its name, or not at all
# ------------------------------------------------------------------------------------------------


def save(engine, shards: Shards, folder: Path, record: dict, averages: dict, keep: int):
    """Write folder/<samples> and delete all but the last `keep` of its kind. Every rank calls it.

    record: what the trainer itself remembers (JSON values); its "samples" names the folder.
    averages: name → (shards, MMDiTConfig, sections of config.json): exported whole under that name.
    Raises OSError if this rank could not write: the checkpoints before it stand untouched.
    """
    partial, target = folder / PARTIAL, folder / f"{record['samples']:012d}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=shards.host_group)
    try:
        engine.save_checkpoint(str(folder), tag=PARTIAL, save_latest=False)
        for name, (average, config, sections) in averages.items():
            tensors = shards.whole_on_rank_0(average)
            if first:
                save_weights(partial / name, config, tensors, **sections)
        dist.barrier(group=shards.host_group)  # the files of every rank are written
        if first:
            (partial / RUN_FILE).write_text(json.dumps(record))
            flush_to_disk(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            (folder / "latest.partial").write_text(target.name)
            os.replace(folder / "latest.partial", folder / "latest")  # for DeepSpeed's own tools
            for old in checkpoints(folder)[:-keep]:
                os.replace(old, folder / PARTIAL)  # a half-deleted folder must not keep the name
                shutil.rmtree(folder / PARTIAL)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer: RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        left = checkpoints(folder)
        left = f"{left[-1]} still stands" if left else "there is none before it"
        raise OSError(f"the checkpoint {target} could not be written: {error}; {left}") from error
    dist.barrier(group=shards.host_group)


def flush_to_disk(folder: Path):
    """So that a folder renamed after it is whole also when the power fails."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. What is half written has another name."""
    return sorted(folder.glob("[0-9]" * 12))


def read_record(path: Path) -> dict:
    """What the trainer wrote with a checkpoint. ValueError if it is partial or not ours."""
    try:
        record = json.loads((path / RUN_FILE).read_text())
        wanted = record["world_size"]
        _ = record["settings"], record["log"], record["evals"], record["samples"], record["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no checkpoint of train_t2i.py (no readable {RUN_FILE}): give another"
            " --resume, or drop it"
        ) from error
    shards = len(list(path.glob("*zero_pp_rank_*_optim_states.pt")))
    if shards != wanted:
        raise ValueError(
            f"{path} is partial: it holds {shards} of {wanted} optimizer shards; delete it, and"
            " --resume auto takes the one before"
        )
    if not list(path.glob("mp_rank_*")) or not list(path.glob("ema_*/model.safetensors")):
        raise ValueError(
            f"{path} is partial: its weights (mp_rank_*, ema_*) are missing; delete it, and"
            " --resume auto takes the one before"
        )
    return record


def to_universal(path: Path, host_group):
    """Re-cut a checkpoint for another number of ranks, as DeepSpeed's universal checkpoint."""
    target = path.parent / UNIVERSAL
    failed = torch.zeros(1)
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", path, "--output_folder", target / path.name]
        done = subprocess.run(
            [*map(str, command), "--inject_missing_state"], capture_output=True, text=True
        )
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            failed += 1
    dist.broadcast(failed, 0, group=host_group)
    if failed:
        raise OSError(
            f"{path} could not be made universal; resume on the number of ranks that wrote it"
        )


def load(engine, path: Path, universal: bool):
    """Weights, moments and schedule from a checkpoint, or from the universal one made of it."""
    where = path.parent / UNIVERSAL if universal else path.parent
    loaded, _ = engine.load_checkpoint(str(where), tag=path.name)
    if loaded is None:
        raise ValueError(f"{path} could not be loaded by DeepSpeed: --resume an earlier one")
    for parameter, state in engine.optimizer.optimizer.state.items():
        state["step"] = state["step"].to(parameter.device)  # universal loads it onto the CPU
    if universal:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(where)
