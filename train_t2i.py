"""CHAPTER 2: text-to-image under DeepSpeed ZeRO-2.

    deepspeed train_t2i.py                          every GPU of this machine
    deepspeed --num_accelerators 2 train_t2i.py     two CPU processes
    torchrun --nproc_per_node 8 train_t2i.py        the same without DeepSpeed's launcher
    python train_t2i.py                             one process
    deepspeed train_t2i.py --resume auto            continue the run in --out, if there is one
    deepspeed train_t2i.py --data data/my           images of your own (data_t2i.py prepare)
    deepspeed train_t2i.py --pairs P --init RUN --out RUN2     straighten a run (pairs.py makes P)
    deepspeed train_t2i.py --data data/my512 --init runs/my256 --out runs/my512

ZeRO-2 keeps the weights whole on every rank and splits gradients, fp32 master weights and Adam's
moments; the averages of the weights are split likewise (zero.py). ds_config.json holds all that
DeepSpeed is told. Read the loop in train(): everything else serves it.

What comes out, in --out: checkpoints/ (each with exported weights), samples.png (a grid with its
prompts), progress.png (a row an evaluation), curves.png, log.csv, eval.csv. A sample is one image
with its caption; lengths and intervals are counted in samples, so that they mean the same at any
batch size.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from math import ceil, isnan, nan
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.func import functional_call
from tqdm import tqdm

import report_t2i as report
import rf
import shapes
import zero
from cache import Cache, Stage, fetch, load_caches
from data_t2i import KnownText, PairSamples, Prepared, Samples, Shuffled, encode, loader
from encoders import image_encoder, text_encoder
from evaluate_t2i import (
    CacheExam,
    CaptionPairsExam,
    Examiner,
    ShapesExam,
    ShapesPairsExam,
    gather,
    world_of,
)  # fmt: skip
from mmdit import PRESETS, MMDiT, MMDiTConfig
from options_t2i import build_parser, find_checkpoint, resolve, settings
from pairs import Pairs
from plan_t2i import describe
from sample_t2i import load_run

BETAS, EPS = (0.9, 0.99), 1e-15  # Adam; eps tiny because gradients shrink with the width (muP)
EMA_WIDTHS = (0.05, 0.10)  # two profiles: any width between can be made afterwards (rf.combine)
CAPTION_DROPOUT = 0.1  # share of samples that learn the unconditional velocity, for guidance


def train(run: "Run"):
    """The loop: every rank runs it, each on its share of every step's samples."""
    args, engine = run.args, run.engine
    batches = run.batches()
    while run.seen < args.samples and not run.stopped:
        for _ in range(engine.gradient_accumulation_steps()):
            data, text, t, noise = encode(next(batches), run.image, run.text, engine.device)
            loss = rf.rf_loss(engine, data, text, t=t, noise=noise, loss=args.loss).mean()
            engine.backward(loss)
            engine.step()  # the last micro-batch of a step moves the weights
            run.log.add(loss.detach())
        run.step += 1
        run.seen += args.batch_size
        for ema in run.emas.values():
            ema.update(run.step)
        run.end_step()
        asked = run.asked_to_save()  # sets run.stopped where somebody asked to stop
        if run.passed("eval_every_samples") and not run.stopped:
            run.evaluate()
        if run.passed("save_every_samples") or asked:
            run.save()
    if not run.stopped:  # a signal leaves no time for more than a checkpoint
        run.evaluate()
    run.save()


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Share of the base rate at a step (from 0): warm-up, constant, a line down to 0."""
    steps = -(-args.samples // args.batch_size)
    warmup = max(1, args.warmup_samples / args.batch_size)
    cooldown = max(1, args.cooldown_samples / args.batch_size)
    return min(1, (step + 1) / warmup, (steps - step) / cooldown)


# ------------------------------------------------------------------------------------------------
# The run: engine, averages, log and position
# ------------------------------------------------------------------------------------------------


class Run:
    """All that changes while training. save and load keep it, bit for bit in fp32."""

    def __init__(self, args: argparse.Namespace, ds_config: dict, host_group, resumed: bool):
        import deepspeed

        self.args, self.host_group, self.out = args, host_group, args.out
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step, self.seen, self.saved_at, self.evaluated_at = 0, 0, None, None
        self.bad_in_row, self.stopped, self.eval_rows = 0, False, []
        device = zero.local_device()
        self.image = image_encoder(args.vae, device)
        self.open_data(device)
        factor = self.image.factor
        sides = [tuple(side // factor for side in bucket) for bucket, _ in self.buckets]
        self.config = model_config(args, self.text, self.image, sides)  # also of validation rows
        torch.manual_seed(args.seed)  # the initial weights; no step draws from global state
        model = MMDiT(self.config)
        if args.init and not resumed:
            continue_from(model, args.init, args.size)
        model.to(device)
        self.flops = sum(
            share * model.flops_per_image(h, w, args.text_tokens)
            for (h, w), (_, share) in zip(sides, self.buckets, strict=True)
        )
        if args.compile:
            model.compile_blocks()  # before DeepSpeed wraps the model: the keys stay as they are
        groups = model.param_groups(args.lr, args.weight_decay)
        fused = device.type in ("cpu", "cuda")
        adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(adamw, partial(learning_rate, args))
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=adamw, lr_scheduler=self.schedule, config=ds_config,
            dist_init_required=False,
        )  # fmt: skip
        self.shards = zero.Shards(self.engine, host_group)
        self.emas = {f"{width:.2f}": rf.PowerEMA(self.shards.mine, width) for width in EMA_WIDTHS}
        self.examiner = Examiner(self.exam, args, self.text, self.image, device, host_group)
        self.eval_columns = report.eval_columns(self.exam.scored)
        self.log = report.Log(args.out, self.engine)
        self.wishes = zero.Wishes(args.save_minutes, host_group)
        self.peak = report.device_peak(device)
        self.bar = tqdm(
            total=args.samples, unit="image", unit_scale=True, desc="training", smoothing=0.05,
            disable=self.rank > 0,
        )  # fmt: skip

    def open_data(self, device: torch.device):
        """What the run learns from and is asked: shapes drawn on the fly, or prepared caches."""
        args, self.stage, self.pairs = self.args, None, None
        if args.pairs:
            self.text = text_encoder(args.text_encoder, args.text_tokens, device)
            self.pairs = Pairs(args.pairs)
            exam = ShapesPairsExam if args.shapes else CaptionPairsExam
            self.exam = exam(args, self.text, self.image, self.pairs)
            sides = self.pairs.about["shape"][1:]
            self.buckets = [(tuple(side * self.image.factor for side in sides), 1.0)]
            return
        if not args.data:
            self.text = text_encoder(args.text_encoder, args.text_tokens, device)
            self.source = Shuffled(shapes.Shapes(world_of(args), args.seed), args.seed)
            self.exam = ShapesExam(args, self.text, self.image)
            self.buckets = [((args.size, args.size), 1.0)]  # (height, width) in pixels, share
            return
        caches = load_caches(args.data, args.stage)
        self.text = KnownText(caches[0])
        self.source = Prepared(
            caches, args.batch_size, seed=args.seed, weights=args.data_weights, window=args.window
        )
        streams = zip(self.source.streams, self.source.shares, strict=True)
        self.buckets = [(shards[0].bucket, share) for (_, shards), share in streams]
        held = {s.bucket for c in caches for s in c.shards} - {bucket for bucket, _ in self.buckets}
        self.buckets += [(bucket, 0.0) for bucket in sorted(held)]
        if args.stage is not None:
            self.prepare_stage(caches)
        self.exam = CacheExam(args, self.text, self.image, caches)

    def prepare_stage(self, caches: list[Cache]):
        """On each node: what was left there goes, validation rows are fetched and stay."""
        args, held = self.args, [(c, s) for c in caches for s in c.shards if s.split != "train"]
        kept = sum(shard.bytes for _, shard in held)
        limit, least = int(args.stage_limit * 1e9), self.source.stage_bytes() + kept
        if limit < least:
            raise ValueError(
                f"--stage-limit {args.stage_limit:g} GB must be at least"
                f" {ceil(least / 1e3) / 1e6:g} GB for the windows in use: raise it, or lower"
                f" --window {args.window}"
            )
        if int(os.environ["LOCAL_RANK"]) == 0:
            self.stage_lock = Stage.claim(args.stage)
            for cache, shard in held:
                fetch(cache, shard, cache.path(shard))
            self.stage = Stage(args.stage, limit - kept, self.source)
        dist.barrier(group=self.host_group)

    def batches(self):
        args = self.args
        if self.pairs is not None:
            samples = PairSamples(
                self.pairs, self.text, seed=args.seed, segments=args.segments,
                distribution=args.time,
            )  # fmt: skip
        else:
            samples = Samples(
                self.source, self.text, self.image, seed=args.seed, shift=args.shift,
                dropout=CAPTION_DROPOUT, distribution=args.time,
            )  # fmt: skip
        batches = loader(
            samples, seen=self.seen, rank=self.rank,
            micro_batch=self.engine.train_micro_batch_size_per_gpu(), world_size=self.world_size,
            workers=args.workers, pin_memory=self.engine.device.type == "cuda",
        )  # fmt: skip
        if self.stage is not None:  # a thread: started when the workers have been forked
            self.stage.begin(self.seen)
        return batches

    def end_step(self):
        """Count, log, show. Raises FloatingPointError after too many steps that were skipped."""
        args = self.args
        skipped = self.engine.optimizer.overflow  # DeepSpeed found the gradient not finite
        self.bad_in_row = self.bad_in_row + 1 if skipped else 0
        if self.stage is not None:
            self.stage.advance(self.seen)
        lr = args.lr * learning_rate(args, self.schedule.last_epoch - (not skipped))
        loss = self.log.losses[self.log.step % report.LOG_EVERY].clone()
        self.log.end_step(self.seen, lr)
        if self.bad_in_row >= args.max_bad_steps:
            finite = gather(bool(loss.isfinite()), self.host_group)
            ranks = [rank for rank, fine in enumerate(finite) if not fine]
            where = f"on rank {', '.join(map(str, ranks))}" if ranks else "in the gradient alone"
            saved = zero.checkpoints(self.out / "checkpoints")
            left = f"{saved[-1]} is from before" if saved else "nothing was saved before it"
            raise FloatingPointError(
                f"{self.bad_in_row} steps in a row were not finite, the last one step {self.step}"
                f" ({where}, lr {lr:.3g}); {left}; start again with a lower --lr"
            )
        if self.step % report.LOG_EVERY == 0:
            report.show(self.bar, self.log, self.flops, self.peak)
        self.bar.update(args.batch_size)

    def passed(self, interval: str) -> bool:
        """Whether the last step crossed a multiple of this interval."""
        every = getattr(self.args, interval)
        return self.seen // every > (self.seen - self.args.batch_size) // every

    def asked_to_save(self) -> bool:
        wish = self.wishes.exchange(clock=self.rank == 0)
        self.stopped |= wish == zero.Wishes.STOP
        return wish == zero.Wishes.SAVE

    # --- evaluation ------------------------------------------------------------------------------

    def evaluate(self):
        """The validation loss, the scores and the pictures of the averaged weights."""
        if self.evaluated_at == self.seen:
            return
        self.evaluated_at = self.seen
        weights = self.shards.whole(self.emas[f"{EMA_WIDTHS[0]:.2f}"].averages, self.dtype)

        @torch.no_grad()
        def model(x, t, text):
            return functional_call(self.engine.module, weights, (x, t, text))

        by_time, scores = self.examiner(model, self.seen)
        asked = [loss for loss in by_time if not isnan(loss)]  # few rows may miss a time
        loss = sum(asked) / len(asked) if asked else nan
        row = (self.seen, loss, *by_time, *scores.values())
        self.eval_rows.append(row)
        if self.rank == 0:
            report.append_rows(self.out / "eval.csv", [row])
            report.plot_curves(self.log.rows, self.eval_rows, self.out / "curves.png")
            values = zip(self.eval_columns[1:], row[1:], strict=True)
            report.write_to_monitor(self.engine, {f"Eval/{k}": v for k, v in values}, self.seen)
            score = f", score {row[-1]:.3f}" if scores else ""
            self.bar.write(f"{self.seen} samples: validation loss {loss:.4f}{score}")
        self.bar.unpause()  # the pause is not the training's
        target = self.args.target_eval_loss
        if target is not None and loss <= target:
            self.stopped = True

    @property
    def dtype(self) -> torch.dtype:
        return next(self.engine.module.parameters()).dtype

    # --- files -----------------------------------------------------------------------------------

    def save(self):
        if self.saved_at == self.seen:
            return
        self.saved_at = self.seen
        record = {
            "samples": self.seen, "step": self.step, "world_size": self.world_size,
            "settings": settings(self.args), "log": self.log.state(), "evals": self.eval_rows,
        }  # fmt: skip
        sections = {"run": settings(self.args) | {"samples_seen": self.seen}}
        averages = {
            f"ema_{width}": (ema.averages, self.config, sections | {"ema": width})
            for width, ema in self.emas.items()
        }
        zero.save(
            self.engine, self.shards, self.out / "checkpoints", record, averages, self.args.keep
        )
        self.wishes.saved()
        self.bar.unpause()

    def load(self, path: Path, record: dict):
        zero.load(self.engine, path, universal=record["world_size"] != self.world_size)
        for width, ema in self.emas.items():
            with safe_open(path / f"ema_{width}" / "model.safetensors", "pt") as file:
                averages = self.shards.cut(file.get_tensor)
            for average, saved in zip(ema.averages, averages, strict=True):
                average.copy_(saved)
        self.step, self.seen = record["step"], record["samples"]
        self.saved_at = self.seen
        self.eval_rows = [tuple(row) for row in record["evals"]]
        if self.eval_rows and self.eval_rows[-1][0] == self.seen:
            self.evaluated_at = self.seen
        self.log.load_state(record["log"])
        self.bar.initial = self.bar.n = self.bar.last_print_n = self.seen  # not this run's doing
        self.bar.start_t = self.bar.last_print_t = time.time()

    def open(self):
        """Begin the files of the run, or cut them to what the checkpoint knew."""
        if self.rank == 0:
            if self.args.overwrite:
                for name in ("checkpoints", "strips"):
                    shutil.rmtree(self.out / name, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
            report.write_rows(self.out / "eval.csv", self.eval_columns, self.eval_rows)
        self.log.open()


def model_config(
    args: argparse.Namespace, text, image, sides: Sequence[tuple[int, int]]
) -> MMDiTConfig:
    """The preset's network, fitted to the encoders and to the (h, w) that it will see."""
    preset = PRESETS[args.preset]
    for h, w in sides:
        if h % preset.patch_size or w % preset.patch_size:
            unit = image.factor * preset.patch_size
            size = f"{h * image.factor}x{w * image.factor}"
            size = f"bucket {size} of --data {args.data[0]}" if args.data else f"--size {args.size}"
            raise ValueError(
                f"{size} must be a multiple of {unit} (the encoder's factor {image.factor} x the"
                f" preset's patch {preset.patch_size})"
            )
    config = replace(
        preset, in_channels=image.channels, text_dim=text.dim,
        max_grid=max(max(side) for side in sides) // preset.patch_size,
        residual=args.residual or preset.residual,
    )  # fmt: skip
    # AuraFlow's residual asks for AuraFlow's network, so that it can be exported (auraflow.py).
    aura = {"n_registers": 8, "mlp_multiple_of": 256}
    return replace(config, **aura) if config.residual == "auraflow" else config


def continue_from(model: MMDiT, run: Path, size: int):
    """Start from a run's averaged weights, at another size of the picture (in pixels).

    The position table is stretched bilinearly about its centre, as minRF's extend_pe does: the same
    place in the picture keeps its vector. ValueError if the networks differ in anything else.
    """
    older, settings = load_run(run, "cpu")
    theirs, mine = (asdict(replace(m.config, max_grid=1)) for m in (older, model))
    if theirs != mine:
        differs = ", ".join(
            f"{k} {theirs[k]} (here {mine[k]})" for k in mine if theirs[k] != mine[k]
        )
        raise ValueError(f"--init {run} holds another network: {differs}")
    state = older.state_dict()
    old, new = older.config.max_grid, model.config.max_grid
    scale = size / settings["size"]
    at = (torch.arange(new) + 0.5 - new // 2) / scale + old // 2 - 0.5  # where each row lay
    weights = (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)  # (new, old) hats
    weights[at < 0, 0], weights[at > old - 1, -1] = 1, 1
    table = state["positions"].view(old, old, -1)
    stretched = torch.einsum("ia, jb, abd -> ijd", weights, weights, table)
    state["positions"] = stretched.reshape(new * new, -1)
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# Start and end
# ------------------------------------------------------------------------------------------------


def build_run(args: argparse.Namespace) -> Run:
    """Join the ranks, resolve the options, build, resume. ValueError for what cannot work."""
    if find_spec("deepspeed") is None:
        raise ValueError("deepspeed is not installed: pip install -r requirements.txt")
    host_group = zero.start_processes(args.threads)
    world_size, device = dist.get_world_size(), zero.local_device()
    path = find_checkpoint(args)
    record = zero.read_record(path) if path else None
    resolve(args, record, native="bf16" if zero.native_bf16(device) else "fp32")
    cuda = device.type == "cuda" and find_spec("triton") is not None
    args.compile = cuda if args.compile == "auto" else args.compile == "on"
    args.workers = (0 if device.type == "cpu" else 4) if args.workers is None else args.workers
    universal = record is not None and record["world_size"] != world_size
    ds_config = zero.read_ds_config(args, world_size, universal)
    if universal:
        zero.to_universal(path, host_group)
    run = Run(args, ds_config, host_group, resumed=record is not None)
    if record:
        run.load(path, record)
    run.open()
    return run


def launch(args: argparse.Namespace):
    run = build_run(args)
    try:
        train(run)
    finally:
        if run.stage is not None:
            run.stage.close()
    if run.rank == 0:
        run.bar.close()
        state = "stopped" if run.seen < args.samples else "finished"
        again = "; add --resume auto to continue" if run.seen < args.samples else ""
        print(f"{state} at {run.seen} of {args.samples} samples; all is in {args.out}{again}")


def main(argv: list[str] | None = None):
    args = build_parser(__doc__).parse_args(argv)
    rank, local_rank = (os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK"))
    try:
        if args.plan:
            print(describe(args))
            return
        launch(args)
    except (ValueError, OSError, FloatingPointError) as error:
        # What is wrong with the arguments is wrong on every rank: one of each machine says so.
        if local_rank == "0" or isinstance(error, OSError):
            where = f" (rank {rank})" if rank != "0" else ""
            said = str(error).strip().splitlines()[-1:]  # a loader's worker adds its traceback
            print(f"train_t2i.py: {''.join(said)}{where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("train_t2i.py: interrupted; the last checkpoint is whole")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
