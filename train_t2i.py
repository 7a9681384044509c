"""CHAPTER 2: text-to-image under DeepSpeed ZeRO-2.

    deepspeed train_t2i.py                          every GPU of this machine
    deepspeed --num_accelerators 2 train_t2i.py     two CPU processes
    torchrun --nproc_per_node 8 train_t2i.py        the same without DeepSpeed's launcher
    python train_t2i.py                             one process
    deepspeed train_t2i.py --resume auto            continue the run in --out, if there is one

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
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
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
from data_t2i import Samples, encode, image_encoder, loader, text_encoder
from mmdit import PRESETS, RESIDUALS, MMDiT, MMDiTConfig
from sample_t2i import captioned_grid, draw, fixed_noise, obeyed, scores, shapes_prompts

BETAS, EPS = (0.9, 0.99), 1e-15  # Adam; eps tiny because gradients shrink with the width (muP)
EMA_WIDTHS = (0.05, 0.10)  # two profiles: any width between can be made afterwards (rf.combine)
CAPTION_DROPOUT = 0.1  # share of samples that learn the unconditional velocity, for guidance
VALIDATION_SAMPLES = 512  # 64 at each of eight times
SAMPLER_STEPS = 20  # of the scored pictures
EVAL_BATCH = 128  # images at a time while evaluating

# What a machine can do in a while; the network is mmdit's preset of the same name.
COMMON = {
    "text_encoder": "hash", "text_tokens": shapes.MAX_WORDS, "vae": "pixels", "seed": 0, "lr": 4e-3,
    "weight_decay": 0.0, "shift": 2.0, "cfg": 3.0, "micro_batch": None, "save_minutes": None,
    "target_eval_loss": None, "max_bad_steps": 20, "keep": 3, "eval_prompts": 50,
}  # fmt: skip
RECIPES = {
    # two CPU cores, 25 minutes: a small world, 25 image tokens
    "tiny": {
        "size": 20, "shapes": 4, "colors": 6, "places": 10, "batch_size": 64, "samples": 832_000,
        "warmup_samples": 6_400, "cooldown_samples": 832_000, "eval_every_samples": 83_200,
        "save_every_samples": 83_200, "most_at_once": 64,
    },
    # GPUs: the whole world. Chosen by reasoning, not run yet.
    "small": {
        "size": 32, "shapes": 6, "colors": 10, "places": 32, "batch_size": 256,
        "samples": 2_560_000, "warmup_samples": 25_600, "cooldown_samples": 1_280_000,
        "eval_every_samples": 256_000, "save_every_samples": 256_000, "most_at_once": 256,
    },
    "0.2b": {
        "size": 64, "shapes": 6, "colors": 10, "places": 64, "batch_size": 512,
        "samples": 10_240_000, "warmup_samples": 102_400, "cooldown_samples": 2_048_000,
        "eval_every_samples": 512_000, "save_every_samples": 512_000, "most_at_once": 64,
    },
    "1b": {
        "size": 64, "shapes": 6, "colors": 10, "places": 64, "batch_size": 1024,
        "samples": 51_200_000, "warmup_samples": 512_000, "cooldown_samples": 10_240_000,
        "eval_every_samples": 2_048_000, "save_every_samples": 1_024_000, "most_at_once": 32,
    },
    "auraflow-6.8b": {
        "size": 64, "shapes": 6, "colors": 10, "places": 64, "batch_size": 2048,
        "samples": 102_400_000, "warmup_samples": 2_048_000, "cooldown_samples": 20_480_000,
        "eval_every_samples": 4_096_000, "save_every_samples": 1_024_000, "most_at_once": 8,
    },
}  # fmt: skip
RECIPES["tiny-wide"] = RECIPES["tiny"]  # 256 wide: a second width for the same --lr (muP)


def train(run: "Run"):
    """The loop: every rank runs it, each on its share of every step's samples."""
    args, engine = run.args, run.engine
    batches = run.batches()
    while run.seen < args.samples and not run.stopped:
        for _ in range(engine.gradient_accumulation_steps()):
            data, text, t, noise = encode(next(batches), run.image, run.text, engine.device)
            loss = rf.rf_loss(engine, data, text, t=t, noise=noise).mean()
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


def world_of(args: argparse.Namespace) -> shapes.World:
    return shapes.World(args.size, args.shapes, args.colors, args.places).checked()


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

    def __init__(self, args: argparse.Namespace, ds_config: dict, host_group):
        import deepspeed

        self.args, self.host_group, self.out = args, host_group, args.out
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step, self.seen, self.saved_at, self.evaluated_at = 0, 0, None, None
        self.bad_in_row, self.stopped, self.eval_rows = 0, False, []
        device = zero.local_device()
        self.text = text_encoder(args.text_encoder, args.text_tokens, device)
        self.image = image_encoder(args.vae, device)
        self.world = world_of(args)
        self.config = model_config(args, self.text, self.image)
        torch.manual_seed(args.seed)  # the initial weights; no step draws from global state
        model = MMDiT(self.config).to(device)
        side = args.size // self.image.factor
        self.flops = model.flops_per_image(side, side, args.text_tokens)
        self.latent = (self.image.channels, side, side)
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
        self.log = report.Log(args.out, self.engine)
        self.wishes = zero.Wishes(args.save_minutes, host_group)
        self.peak = report.device_peak(device)
        self.bar = tqdm(
            total=args.samples, unit="image", unit_scale=True, desc="training", smoothing=0.05,
            disable=self.rank > 0,
        )  # fmt: skip

    def samples(self, held_out: bool) -> Samples:
        """The row of samples, of training or (no caption dropped) of validation."""
        source = shapes.Shapes(self.world, self.args.seed, held=held_out)
        return Samples(
            source, self.text, self.image, seed=self.args.seed, shift=self.args.shift,
            dropout=0.0 if held_out else CAPTION_DROPOUT,
        )  # fmt: skip

    def batches(self):
        return loader(
            self.samples(held_out=False), seen=self.seen, rank=self.rank,
            micro_batch=self.engine.train_micro_batch_size_per_gpu(), world_size=self.world_size,
            workers=self.args.workers, pin_memory=self.engine.device.type == "cuda",
        )  # fmt: skip

    def end_step(self):
        """Count, log, show. Raises FloatingPointError after too many steps that were skipped."""
        args = self.args
        skipped = self.engine.optimizer.overflow  # DeepSpeed found the gradient not finite
        self.bad_in_row = self.bad_in_row + 1 if skipped else 0
        lr = args.lr * learning_rate(args, self.schedule.last_epoch - (not skipped))
        loss = self.log.losses[self.log.step % report.LOG_EVERY].clone()
        self.log.end_step(self.seen, lr)
        if self.bad_in_row >= args.max_bad_steps:
            finite = self._of_all_ranks(bool(loss.isfinite()))
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

    def _of_all_ranks(self, value) -> list:
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    # --- evaluation ------------------------------------------------------------------------------

    def evaluate(self):
        """Validation loss, the six scores and the grid, by the averaged weights, on all ranks."""
        if self.evaluated_at == self.seen:
            return
        self.evaluated_at = self.seen
        weights = self.shards.whole(self.emas[f"{EMA_WIDTHS[0]:.2f}"].averages, self.dtype)

        @torch.no_grad()
        def model(x, t, text):
            return functional_call(self.engine.module, weights, (x, t, text))

        by_time = self.validation_loss(model)
        loss = sum(by_time) / len(by_time)
        row = (self.seen, loss, *by_time, *self.score(model).values())
        self.eval_rows.append(row)
        if self.rank == 0:
            report.append_rows(self.out / "eval.csv", [row])
            report.plot_curves(self.log.rows, self.eval_rows, self.out / "curves.png")
            values = zip(report.EVAL_COLUMNS[1:], row[1:], strict=True)
            report.write_to_monitor(self.engine, {f"Eval/{k}": v for k, v in values}, self.seen)
            self.bar.write(f"{self.seen} samples: validation loss {loss:.4f}, score {row[-1]:.3f}")
        self.bar.unpause()  # the pause is not the training's
        target = self.args.target_eval_loss
        if target is not None and loss <= target:
            self.stopped = True

    @property
    def dtype(self) -> torch.dtype:
        return next(self.engine.module.parameters()).dtype

    def validation_loss(self, model: rf.Model) -> list[float]:
        """Velocity MSE of VALIDATION_SAMPLES held-out samples at t = 0, 1/8, …, 7/8 (rf.py)."""
        mine = list(range(self.rank, VALIDATION_SAMPLES, self.world_size))
        table, samples = torch.zeros(2, 8), self.samples(held_out=True)  # sums, counts
        for part in (mine[i : i + EVAL_BATCH] for i in range(0, len(mine), EVAL_BATCH)):
            batch = samples.__getitems__(part)
            data, text, _, noise = encode(batch, self.image, self.text, self.engine.device)
            index = torch.tensor(part, device=data.device) % 8
            means, _ = rf.validation_loss(model, data, text, index, noise)
            counts = torch.bincount(index, minlength=8)
            table += torch.stack([means.nan_to_num() * counts, counts]).cpu()
        dist.all_reduce(table, group=self.host_group)
        return (table[0] / table[1]).tolist()

    def score(self, model: rf.Model) -> dict[str, float]:
        """The six scores and their mean; rank 0 draws four prompts of each tag."""
        args, prompts = self.args, shapes_prompts(self.world, self.args.eval_prompts)
        noise = fixed_noise(len(prompts), self.latent, args.seed)
        mine = list(range(self.rank, len(prompts), self.world_size))
        pictures = []
        if mine:
            pictures = draw(
                model, [prompts[i][1] for i in mine], noise[mine], text=self.text,
                image=self.image, device=self.engine.device, batch=EVAL_BATCH, cfg=args.cfg,
                steps=SAMPLER_STEPS, shift=args.shift,
            )  # fmt: skip
        obeys = obeyed(pictures, [prompts[i] for i in mine])
        rows = min(4, args.eval_prompts)
        shown = [t * args.eval_prompts + i for i in range(rows) for t in range(len(shapes.TAGS))]
        found = {}
        for part in self._of_all_ranks(
            {
                i: (o, p.clone() if i in shown else None)
                for i, o, p in zip(mine, obeys, pictures, strict=True)
            }
        ):
            found |= part
        if self.rank == 0:
            grid, captions = [found[i][1] for i in shown], [prompts[i][1] for i in shown]
            captioned_grid(torch.stack(grid), captions, self.out / "samples.png")
            report.save_strip(torch.stack(grid[:12]), self.out / "strips" / f"{self.seen:012d}.png")
            report.plot_progress(self.out / "strips", captions, self.out / "progress.png")
        return scores(prompts, [found[i][0] for i in range(len(prompts))])

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
            report.write_rows(self.out / "eval.csv", report.EVAL_COLUMNS, self.eval_rows)
        self.log.open()


def model_config(args: argparse.Namespace, text, image) -> MMDiTConfig:
    """The preset's network, fitted to the encoders and the size of the images."""
    preset = PRESETS[args.preset]
    side, rest = divmod(args.size, image.factor * preset.patch_size)
    if rest:
        raise ValueError(
            f"--size {args.size} must be a multiple of {image.factor * preset.patch_size} (the"
            f" encoder's factor {image.factor} x the preset's patch {preset.patch_size})"
        )
    config = replace(
        preset, in_channels=image.channels, text_dim=text.dim, max_grid=side,
        residual=args.residual or preset.residual,
    )  # fmt: skip
    # AuraFlow's residual asks for AuraFlow's network, so that it can be exported (auraflow.py).
    aura = {"n_registers": 8, "mlp_multiple_of": 256}
    return replace(config, **aura) if config.residual == "auraflow" else config


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

SETTINGS = (  # what a resumed run must share with the first
    "preset", "residual", "size", "shapes", "colors", "places", "text_encoder", "text_tokens",
    "vae", "seed", "batch_size", "samples", "lr", "weight_decay", "warmup_samples",
    "cooldown_samples", "shift", "precision",
)  # fmt: skip
REMEMBERED = (*SETTINGS, "cfg", "eval_prompts", "eval_every_samples", "micro_batch")


def settings(args: argparse.Namespace) -> dict:
    return {key: getattr(args, key) for key in REMEMBERED}


def build_parser() -> argparse.ArgumentParser:
    """Options default to None here; resolve() fills in the resumed run's, or the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(group, name, help_text, **kwargs):
        key = name.replace("-", "_")
        if key in RECIPES["tiny"]:
            each = ", ".join(f"{name} {recipe[key]}" for name, recipe in RECIPES.items())
            help_text += f" ({each})"
        elif COMMON.get(key) is not None:
            help_text += f" (default: {COMMON[key]})"
        group.add_argument(f"--{name}", help=help_text, **kwargs)

    data = parser.add_argument_group("data: the world of shapes.py")
    add(data, "size", "pixels a side", type=int)
    add(data, "shapes", "how many of the six shapes", type=int)
    add(data, "colors", "how many of the ten colours", type=int)
    add(data, "places", "points a side at which things may stand; at most --size", type=int)
    add(data, "text-encoder", "hash, or name or folder of a T5 / UMT5")
    add(data, "text-tokens", "tokens of a caption", type=int)
    add(data, "vae", "pixels, or name or folder of an AutoencoderKL")
    add(data, "workers", "loader processes a rank (default: 0 on a CPU, else 4)", type=int)

    model = parser.add_argument_group("network")
    add(model, "preset", f"{', '.join(RECIPES)} (default: tiny)")
    add(model, "residual", "prenorm, or auraflow: can be exported (default: the preset's)")
    add(model, "compile", "compile the blocks: auto (CUDA with Triton), on or off", default="auto")
    add(model, "precision", "auto, bf16 or fp32 (auto: bf16 where it is fast)", default="auto")

    training = parser.add_argument_group("training")
    add(training, "samples", "samples to train on in all", type=int)
    add(training, "batch-size", "samples a step, of all ranks together", type=int)
    add(
        training,
        "micro-batch",
        "samples a pass of one rank (default: see --most-at-once)",
        type=int,
    )
    add(training, "most-at-once", "otherwise the largest that fits, up to this", type=int)
    add(training, "lr", "learning rate at muP's base width; holds over width", type=float)
    add(training, "warmup-samples", "until the full rate", type=int)
    add(training, "cooldown-samples", "at the end, a line down to 0", type=int)
    add(training, "weight-decay", "AdamW's, at the base width", type=float)
    add(training, "shift", "more time near the noise if above 1", type=float)
    add(training, "seed", "of weights, order, noise and time", type=int)
    add(training, "max-bad-steps", "stop after so many steps in a row not finite", type=int)

    evaluation = parser.add_argument_group("evaluation")
    add(evaluation, "eval-every-samples", "samples between evaluations", type=int)
    add(evaluation, "eval-prompts", "scored prompts of each of the six tags", type=int)
    add(evaluation, "cfg", "guidance of the scored pictures", type=float)
    add(evaluation, "target-eval-loss", "stop when the validation loss is reached", type=float)

    run = parser.add_argument_group("run")
    folder = Path("runs/shapes")
    add(run, "out", f"folder for all that comes out (default: {folder})", type=Path, default=folder)
    add(run, "resume", "auto (if there is a run in --out), or a checkpoint folder")
    add(run, "overwrite", "replace the run in --out", action="store_true")
    add(run, "save-every-samples", "samples between checkpoints", type=int)
    add(run, "save-minutes", "also save when so many minutes have passed", type=float)
    add(run, "keep", "checkpoints kept", type=int)
    config = Path(__file__).with_name("ds_config.json")
    add(run, "ds-config", "DeepSpeed's configuration (ds_config.json)", type=Path, default=config)
    add(run, "threads", "CPU threads a rank (default: cores / ranks)", type=int)
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    return parser


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume means; None to start anew. ValueError if the folder is taken."""
    present = zero.checkpoints(args.out / "checkpoints")
    if args.resume == "auto" and not args.overwrite:
        return present[-1] if present else None
    if args.resume is not None and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if args.resume is not None:
        path = Path(args.resume)
        if path.parent.resolve() != (args.out / "checkpoints").resolve():
            raise ValueError(
                f"--resume {path} does not lie in {args.out / 'checkpoints'}: give its run as --out"
            )
        if present and path.name != present[-1].name:
            raise ValueError(
                f"--resume {path} is not the last checkpoint: move {present[-1]} away to go back"
            )
        return path
    if present and not args.overwrite:
        raise ValueError(
            f"--out {args.out} already holds a run: continue it with --resume auto, replace it with"
            " --overwrite, or choose another --out"
        )
    return None


def resolve(args: argparse.Namespace, record: dict | None, native: str = "fp32"):
    """Fill in what was not given, and reject what cannot work before anything is built.

    native: what --precision auto means here.
    """
    saved = record["settings"] if record else {}
    preset = args.preset or saved.get("preset", "tiny")
    if preset not in RECIPES:
        raise ValueError(f"--preset {preset!r} must be one of {', '.join(RECIPES)}")
    fixed = {"residual": None, "preset": preset, "precision": native}
    for key, default in {**COMMON, **RECIPES[preset], **fixed}.items():
        given = getattr(args, key)
        if given in (None, "auto"):
            setattr(args, key, saved.get(key, default))
        elif key in SETTINGS and key in saved and given != saved[key]:
            raise ValueError(
                f"--{key.replace('_', '-')} {given} differs from the run to resume, which has"
                f" {saved[key]}: drop it, or start another run with --out"
            )
    for key in ("samples", "batch_size", "size", "text_tokens", "eval_every_samples",
                "save_every_samples", "keep", "max_bad_steps", "eval_prompts", "most_at_once",
                "micro_batch", "threads"):  # fmt: skip
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    for key, names in {
        "compile": ("auto", "on", "off"), "precision": ("auto", "bf16", "fp32"),
        "residual": (None, *RESIDUALS),
    }.items():  # fmt: skip
        if getattr(args, key) not in names:
            names = ", ".join(str(name) for name in names if name)
            raise ValueError(f"--{key} {getattr(args, key)!r} must be one of {names}")
    rf.shift_time(0.5, args.shift)
    world_of(args)


def prepare(args: argparse.Namespace) -> Run:
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
    run = Run(args, ds_config, host_group)
    if record:
        run.load(path, record)
    run.open()
    return run


def launch(args: argparse.Namespace):
    run = prepare(args)
    train(run)
    if run.rank == 0:
        run.bar.close()
        state = "stopped" if run.seen < args.samples else "finished"
        again = "; add --resume auto to continue" if run.seen < args.samples else ""
        print(f"{state} at {run.seen} of {args.samples} samples; all is in {args.out}{again}")


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    rank, local_rank = (os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK"))
    try:
        launch(args)
    except (ValueError, OSError, FloatingPointError) as error:
        # What is wrong with the arguments is wrong on every rank: one of each machine says so.
        if local_rank == "0" or isinstance(error, OSError):
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"train_t2i.py: {error}{where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("train_t2i.py: interrupted; the last checkpoint is whole")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
