"""CHAPTER 2's OPTIONS: recipes, the command line, and what must fit together.

recipe     what a machine can do in a while, one for each preset
resolve    fills in what was not given: from the run to resume, the caches, --init, the recipe
"""

import argparse
from math import inf
from pathlib import Path

import rf
import shapes
import zero
from cache import Stage, load_caches
from evaluate_t2i import world_of
from mmdit import RESIDUALS
from pairs import Pairs
from sample_t2i import find_weights, run_settings

# What a machine can do in a while; the network is mmdit's preset of the same name.
COMMON = {
    "text_encoder": "hash", "text_tokens": shapes.MAX_WORDS, "vae": "pixels", "seed": 0, "lr": 4e-3,
    "weight_decay": 0.0, "shift": 2.0, "cfg": 3.0, "micro_batch": None, "save_minutes": None,
    "target_eval_loss": None, "max_bad_steps": 20, "keep": 3, "eval_prompts": 50, "data": [],
    "data_weights": [], "window": 4, "time": "logit_normal", "loss": "mse", "segments": 1,
    "sample_steps": 20, "pairs": None,
}  # fmt: skip
OLDER = {"time": "logit_normal", "loss": "mse", "segments": 1, "pairs_id": None}  # had no options
# With pairs: RF++'s time, and no guidance, which is in the pairs already.
PAIRS_DEFAULTS = {"time": "u_shaped", "cfg": 1.0}
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

# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

SETTINGS = (  # what a resumed run must share with the first
    "preset", "residual", "size", "shapes", "colors", "places", "text_encoder", "text_tokens",
    "vae", "data_id", "data_weights", "window", "seed", "batch_size", "samples", "lr",
    "weight_decay", "warmup_samples", "cooldown_samples", "shift", "precision", "time", "loss",
    "segments", "pairs_id",
)  # fmt: skip
FROM_DATA = ("size", "text_encoder", "text_tokens", "vae")  # what a cache has settled
REMEMBERED = (
    *SETTINGS, "data", "text_format", "cfg", "eval_prompts", "eval_every_samples", "micro_batch",
    "sample_steps", "pairs",
)  # fmt: skip


def settings(args: argparse.Namespace) -> dict:
    return {key: getattr(args, key) for key in REMEMBERED}


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Options default to None here; resolve() fills in the resumed run's, or the recipe's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(data_id=[], text_format=None, pairs_id=None)

    def add(group, name, help_text, **kwargs):
        key = name.replace("-", "_")
        if key in RECIPES["tiny"]:
            each = ", ".join(f"{name} {recipe[key]}" for name, recipe in RECIPES.items())
            help_text += f" ({each})"
        elif COMMON.get(key) is not None:
            help_text += f" (default: {COMMON[key]})"
        group.add_argument(f"--{name}", help=help_text, **kwargs)

    data = parser.add_argument_group(
        "data: the world of shapes.py, or caches of data_t2i.py prepare"
    )
    add(data, "data", "folders or URLs of caches; without them shapes", nargs="+", metavar="CACHE")
    add(data, "data-weights", "shares of the caches (default: alike)", type=float, nargs="+")
    add(data, "window", "shards whose rows are shuffled together", type=int)
    add(
        data,
        "stage",
        "folder on a fast local disk: shards are copied there ahead of use",
        type=Path,
    )
    add(data, "stage-limit", "GB that it may hold (default: 100)", type=float, default=100)
    add(data, "size", "pixels a side", type=int)
    add(data, "shapes", "how many of the six shapes", type=int)
    add(data, "colors", "how many of the ten colours", type=int)
    add(data, "places", "points a side at which things may stand; at most --size", type=int)
    add(data, "text-encoder", "hash, or name or folder of a T5 / UMT5")
    add(data, "text-tokens", "tokens of a caption", type=int)
    add(data, "vae", "pixels, or name or folder of an AutoencoderKL")
    add(data, "workers", "loader processes a rank (default: 0 on a CPU, else 4)", type=int)

    model = parser.add_argument_group("network")
    add(model, "init", "a run whose weights to start from, also at another --size", type=Path)
    add(model, "preset", f"{', '.join(RECIPES)} (default: tiny)")
    add(model, "residual", "prenorm, or auraflow: can be exported (default: the preset's)")
    add(model, "compile", "compile the blocks: auto (CUDA with Triton), on or off", default="auto")
    add(model, "precision", "auto, bf16 or fp32 (auto: bf16 where it is fast)", default="auto")

    training = parser.add_argument_group("training")
    add(training, "samples", "samples to train on in all", type=int)
    add(training, "batch-size", "samples a step, of all ranks together", type=int)
    add(training, "micro-batch", "samples a pass of one rank (see --most-at-once)", type=int)
    add(training, "most-at-once", "otherwise the largest that fits, up to this", type=int)
    add(training, "lr", "learning rate at muP's base width; holds over width", type=float)
    add(training, "warmup-samples", "until the full rate", type=int)
    add(training, "cooldown-samples", "at the end, a line down to 0", type=int)
    add(training, "weight-decay", "AdamW's, at the base width", type=float)
    add(training, "shift", "above 1: more time near the noise (pairs: their grid)", type=float)
    add(training, "time", f"where to train: {', '.join(rf.TIME_DISTRIBUTIONS)}")
    add(training, "loss", f"one of {', '.join(rf.LOSSES)}")
    add(training, "seed", "of weights, order, noise and time", type=int)
    add(training, "max-bad-steps", "stop after so many steps in a row not finite", type=int)

    reflow = parser.add_argument_group("reflow: straighter paths, fewer steps (pairs.py)")
    add(reflow, "pairs", "folder of pairs to train on; then --time u_shaped, --cfg 1")
    add(
        reflow,
        "segments",
        "straight pieces of a path; with --time start, steps of the result",
        type=int,
    )

    add_run_options(parser, add)
    return parser


def add_run_options(parser: argparse.ArgumentParser, add):
    """What is asked of a run and where it goes, not what it learns."""
    evaluation = parser.add_argument_group("evaluation")
    add(evaluation, "eval-every-samples", "samples between evaluations", type=int)
    add(evaluation, "eval-prompts", "scored prompts of each of the six tags", type=int)
    add(evaluation, "cfg", "guidance of the scored pictures", type=float)
    add(evaluation, "sample-steps", "solver steps of these pictures", type=int)
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
    plan = parser.add_argument_group("plan: what a run would need and cost; nothing is trained")
    add(plan, "plan", "print it, and end", action="store_true")
    add(plan, "gpus", "how many (default: 8)", type=int, default=8)
    add(plan, "mfu", "share of the peak that is reached (default: 0.5)", type=float, default=0.5)
    add(plan, "peak-tflops", "of one GPU (default: 989, H100 bf16)", type=float, default=989.0)
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's


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
    saved = OLDER | record["settings"] if record else {}
    older = take_from_pairs(args, saved)
    older |= {} if record or not args.init else take_from_init(args)
    preset = args.preset or saved.get("preset") or older.get("preset", "tiny")
    if preset not in RECIPES:
        raise ValueError(f"--preset {preset!r} must be one of {', '.join(RECIPES)}")
    defaults = COMMON | RECIPES[preset] | {"residual": None, "preset": preset, "precision": native}
    take_from_data(args, saved)
    for key, default in (defaults | older).items():
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
                "micro_batch", "threads", "window", "segments", "sample_steps"):  # fmt: skip
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    for key, names in {
        "compile": ("auto", "on", "off"), "precision": ("auto", "bf16", "fp32"),
        "residual": (None, *RESIDUALS), "time": rf.TIME_DISTRIBUTIONS, "loss": rf.LOSSES,
    }.items():  # fmt: skip
        if getattr(args, key) not in names:
            names = ", ".join(str(name) for name in names if name)
            raise ValueError(f"--{key} {getattr(args, key)!r} must be one of {names}")
    rf.shift_time(0.5, args.shift)
    if any(not 0 < weight < inf for weight in args.data_weights):
        raise ValueError(f"--data-weights {args.data_weights} must be above 0")
    if args.data_weights and len(args.data_weights) != len(args.data):
        raise ValueError(
            f"--data-weights has {len(args.data_weights)} numbers, must have one for each of the"
            f" {len(args.data)} --data"
        )
    if args.pairs:
        check_pairs(args)
    elif args.segments > 1:
        raise ValueError(f"--segments {args.segments} is for training on --pairs: give them")
    if not args.data and args.shapes:
        world_of(args)


def take_from_data(args: argparse.Namespace, saved: dict):
    """Size and encoders are those of the caches. ValueError if anything else is asked for."""
    args.data = args.data or saved.get("data") or []
    if not args.data:
        return
    if args.stage is not None:
        args.stage = args.stage / Stage.OWN
    caches = load_caches(args.data, args.stage)
    facts = {key: caches[0].manifest[key] for key in FROM_DATA}
    for key, value in facts.items():
        if getattr(args, key) not in (None, value):
            raise ValueError(
                f"--{key.replace('_', '-')} {getattr(args, key)} does not fit --data"
                f" {args.data[0]}, prepared with {value}: drop it, or prepare the data with it"
            )
    facts["data_id"] = [cache.id for cache in caches]
    facts["text_format"] = caches[0].manifest["text_format"]
    for key, value in facts.items():
        if saved.get(key, value) != value:
            raise ValueError(
                f"--data {' '.join(args.data)} has {key} {value}, the run to resume was trained"
                f" with {saved[key]}: give its data, or start another run with --out"
            )
        setattr(args, key, value)


def take_from_pairs(args: argparse.Namespace, saved: dict) -> dict:
    """Encoders, world and shift of the run that made the pairs; what they change besides."""
    args.pairs = args.pairs or saved.get("pairs")
    if not args.pairs:
        return {}
    if args.data or saved.get("data"):
        raise ValueError("--pairs and --data exclude each other: pairs bring their captions along")
    pairs = Pairs(args.pairs)
    args.pairs_id, about = pairs.id, pairs.about
    if saved and saved["pairs_id"] != pairs.id:
        raise ValueError(f"--pairs {args.pairs} is not what the run in {args.out} is trained on")
    if about["words"] != "captions":
        raise ValueError(f"--pairs {args.pairs} has labels: train_mnist.py takes them")
    segments = args.segments or saved.get("segments") or 1
    steps = {"sample_steps": segments} if segments > 1 or args.time == "start" else {}
    keys = ("preset", "residual", "shift", "shapes", "colors", "places", *FROM_DATA)
    scored = about["prompts"] is None  # shapes' own captions
    run = {key: about["run"].get(key) for key in keys}
    for key in FROM_DATA:
        if getattr(args, key) not in (None, run[key]):
            raise ValueError(
                f"--{key.replace('_', '-')} {getattr(args, key)} does not fit --pairs"
                f" {args.pairs}, made with {run[key]}: drop it"
            )
    return run | PAIRS_DEFAULTS | steps | ({} if scored else {"shapes": 0})


def check_pairs(args: argparse.Namespace):
    """Pairs were made for one grid of times, and so many segments."""
    about = Pairs(args.pairs).about
    if about["segments"] % args.segments:
        raise ValueError(f"--segments {args.segments} must divide --pairs' {about['segments']}")
    if args.shift != about["shift"]:
        raise ValueError(f"--shift {args.shift} must be that of --pairs, {about['shift']}")


def take_from_init(args: argparse.Namespace) -> dict:
    """The older run's network and encoders, and its time shift made fit for the new size.

    A picture with m pixels needs the shift √(m/n) times that of n pixels (SD3, 2403.03206, eq. 23).
    """
    run = run_settings(find_weights(args.init))
    found = {key: run[key] for key in ("preset", "residual", "cfg", *FROM_DATA) if key in run}
    size = load_caches(args.data, args.stage)[0].manifest["size"] if args.data else args.size
    if args.pairs:  # they settle the encoders, the size, shift and guidance
        return {key: found[key] for key in ("preset", "residual") if key in found}
    return found | {"shift": run["shift"] * (size or run["size"]) / run["size"]}
