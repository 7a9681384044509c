"""CHAPTER 1: train a rectified flow on digits, on one device, in minutes.

    python train_mnist.py                          MNIST, or glyphs where it cannot be downloaded
    python train_mnist.py --dataset cifar10        colour
    python train_mnist.py --dataset folder --data-dir my_images --size 32
    python train_mnist.py --pairs P --init RUN --out RUN2    straighten a run (pairs.py makes P)
    python train_mnist.py --resume                 continue where the last run stopped
    python train_mnist.py --dry-run                the whole path in one step

What comes out, in --out: samples.png (a column a class), samples.gif (from noise to digit),
loss.png, log.csv, model.safetensors + config.json (the averaged weights), checkpoint.pt.
Read the loop in train(): everything else in this file serves it.
"""

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cpu
import rf
from data_mnist import SOURCES, Batches, ImageSet, OneHotText, fingerprint, load_images
from mmdit import PRESETS, MMDiT, MMDiTConfig, load_model, save_model
from pairs import PairBatches, Pairs
from pictures_mnist import draw_pictures

FILES = (  # what a run leaves in its folder
    "checkpoint.pt", "log.csv", "config.json", "model.safetensors", "samples.png", "samples.gif",
    "loss.png",
)  # fmt: skip
LOG_EVERY = 20  # steps in a row of log.csv
LOG_COLUMNS = ("step", "loss", "grad_norm", "lr")
BETAS, EPS = (0.9, 0.99), 1e-15  # Adam; eps tiny because gradients shrink with the width (muP)
CLIP = 1.0  # global gradient norm
CAPTION_DROPOUT = 0.1  # share of samples that learn the unconditional velocity, for guidance

# What a device can do in a few minutes. On two CPU cores a token is the currency.
DEFAULTS = {
    "cpu": {"preset": "digits", "batch_size": 64, "steps": 7500},
    "gpu": {"preset": "digits-wide", "batch_size": 256, "steps": 20000},
}


def train(args: argparse.Namespace, dataset: ImageSet, device: torch.device, out: Path) -> "Run":
    """The loop. Stops early, cleanly, on Ctrl-C or SIGTERM; raises FloatingPointError on NaN."""
    run = Run(args, dataset, device)
    if args.resume:
        run.load(out / "checkpoint.pt")
    run.log.open(out / "log.csv")
    batches = batches_of(args, dataset, device)
    stop = StopSignal()
    bar = tqdm(total=args.steps, initial=run.step, unit="step", desc="training", smoothing=0.05)
    with bar, stop:
        while run.step < args.steps and not stop.requested:
            batch = batches[run.step]
            train_step(run, batch, learning_rate(args, run.step))
            run.step += 1
            run.ema.update(run.step)
            if run.step % LOG_EVERY == 0:
                run.log.send(run.step)
                show(bar, run, args.batch_size)
            if run.step % args.checkpoint_every == 0 and run.step < args.steps:
                run.save(out / "checkpoint.pt")
            bar.update()
    run.save(out / "checkpoint.pt")
    if stop.requested:
        print(f"stopped at step {run.step} of {args.steps}; add --resume to continue")
    return run


def train_step(run: "Run", batch, lr_scale: float):
    """One step of AdamW on E‖v(x_t, t) − (noise − data)‖². Reads nothing back from the device."""
    data, t, noise, args = batch.data, batch.t, batch.noise, run.args
    random = {"generator": batch.generator, "device": data.device}
    if noise is None:  # any noise with any data; pairs (reflow) bring their own, and a time
        t = rf.sample_time(
            len(data), distribution=args.time, shift=args.shift, stratified=True, **random
        )
        noise = torch.randn(data.shape, **random)
    text = run.text(batch.labels)
    loss = rf.rf_loss(run.model, data, text, t=t, noise=noise, loss=args.loss).mean()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    for group, base_lr in zip(run.optimizer.param_groups, run.base_lrs, strict=True):
        group["lr"] = base_lr * lr_scale
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.log.write(run.step, loss.detach(), grad_norm)


def batches_of(args: argparse.Namespace, dataset: ImageSet, device: torch.device) -> Batches:
    """Images with dropped labels, or pairs, whose guidance is folded in already."""
    if args.pairs is None:
        flip = args.dataset == "cifar10"
        return Batches(
            dataset, args.batch_size, seed=args.seed, flip=flip, dropout=CAPTION_DROPOUT,
            device=device,
        )  # fmt: skip
    pairs = Pairs(args.pairs)
    if tuple(pairs.about["shape"]) != dataset.images.shape[1:]:
        theirs, ours = (list(x) for x in (pairs.about["shape"], dataset.images.shape[1:]))
        raise ValueError(f"--pairs {args.pairs} are of images {theirs}, the data set's are {ours}")
    return PairBatches(
        pairs, len(dataset.classes), args.batch_size, seed=args.seed,
        distribution=args.time, shift=args.shift, segments=args.segments,
        anneal=round(args.anneal * args.steps), device=device,
    )  # fmt: skip


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The share of the base rate at a step (from 0): linear warm-up, then a line down to zero."""
    return min((step + 1) / args.warmup_steps, 1) * (1 - step / args.steps)


# ------------------------------------------------------------------------------------------------
# The run: everything that changes while training, and its checkpoint
# ------------------------------------------------------------------------------------------------


class Run:
    """Model, optimizer, average, step and log. save/load keep all of it, bit for bit."""

    def __init__(self, args: argparse.Namespace, dataset: ImageSet, device: torch.device):
        self.args, self.device, self.step = args, device, 0
        self.classes, self.source = dataset.classes, dataset.source
        self.images = fingerprint(dataset)
        self.text = OneHotText(len(dataset.classes), device)
        torch.manual_seed(args.seed)  # the initial weights; no step draws from global state
        self.model = MMDiT(model_config(args, dataset)).to(device)
        if args.init is not None and not args.resume:
            continue_from(self.model, args.init)
        if args.compile:
            self.model.compile_blocks()
        groups = self.model.param_groups(args.lr, args.weight_decay)
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = rf.PowerEMA(list(self.model.parameters()), args.ema)
        self.log = Log(args, device)

    def settings(self) -> dict:
        """Every option as it was resolved, and which images they were."""
        options = {key: getattr(self.args, key) for key in (*COMMON, *DEFAULTS["cpu"])}
        options |= {"dataset": self.source, "data_dir": str(self.args.data_dir)}
        options |= {key: options[key] and str(options[key]) for key in ("pairs", "init")}
        return options | {"images": self.images}

    def ema_model(self) -> MMDiT:
        model = MMDiT(self.model.config).to(self.device).eval()
        self.ema.copy_to(list(model.parameters()))
        return model

    def save(self, path: Path):
        """Write the checkpoint whole or not at all; only finite steps ever get into one."""
        self.log.drain(self.step)
        state = {
            "settings": self.settings(),
            "model_config": asdict(self.model.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "log": {"rows": self.log.rows, "buffer": self.log.buffer},
        }
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load(self, path: Path):
        state = load_checkpoint(path, self.device)
        if state["settings"]["images"] != self.images:
            raise ValueError(f"{path} was trained on other images: give its --data-dir to resume")
        if state["model_config"] != asdict(self.model.config):
            theirs, ours = state["model_config"], asdict(self.model.config)
            differing = ", ".join(
                f"{key} {theirs.get(key)} there, {value} here"
                for key, value in ours.items()
                if theirs.get(key) != value
            )
            raise ValueError(f"{path} is of another network ({differing}): choose another --out")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.log.rows = [tuple(row) for row in state["log"]["rows"]]
        self.log.buffer.copy_(state["log"]["buffer"])


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no run to --resume, drop it")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        _ = state["settings"]["images"], state["model_config"]["dim"], state["log"]["rows"]
        return state
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        raise ValueError(
            f"{path} is no checkpoint of this script ({type(error).__name__}): choose another --out"
        ) from error


def model_config(args: argparse.Namespace, dataset: ImageSet) -> MMDiTConfig:
    """The preset, fitted to the data: channels, classes, size, and the largest patch up to the
    preset's that divides it."""
    config = PRESETS[args.preset]
    _, channels, height, width = dataset.images.shape
    fitting = [p for p in range(1, config.patch_size + 1) if height % p == 0 == width % p]
    patch = fitting[-1] if args.patch_size is None else args.patch_size
    if args.patch_size is None and patch < min(3, config.patch_size):
        raise ValueError(
            f"no patch from 3 to {config.patch_size} divides the image size {height}x{width}: take"
            " another --size, or give --patch-size"
        )
    if height % patch or width % patch:
        raise ValueError(f"--patch-size {patch} must divide the image size {height}x{width}")
    return replace(
        config, in_channels=channels, patch_size=patch, max_grid=max(height, width) // patch,
        text_dim=len(dataset.classes) + 1, residual=args.residual,
    )  # fmt: skip


def continue_from(model: MMDiT, folder: Path):
    """Start from a run's averaged weights. ValueError if they are of another network."""
    older = load_model(folder)
    if older.config != model.config:
        theirs, ours = asdict(older.config), asdict(model.config)
        differs = ", ".join(f"{k} {theirs[k]} there, {v} here" for k, v in ours.items()
                            if theirs[k] != v)  # fmt: skip
        raise ValueError(f"--init {folder} holds another network ({differs}): drop it, or adapt")
    model.load_state_dict(older.state_dict())


class Log:
    """Loss and gradient norm stay on the device for LOG_EVERY steps, travel to the host while
    training goes on, and are read one interval later: no step waits for a CUDA device."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        self.rows: list[tuple] = []
        self.buffer = torch.zeros(2, LOG_EVERY, device=device)  # loss, grad_norm of each step
        self.in_flight = None  # (step at the interval's end, host copy, event)
        self.path = None

    def open(self, path: Path):
        self.path = path
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([LOG_COLUMNS, *self.rows])

    def write(self, step: int, loss: Tensor, grad_norm: Tensor):
        self.buffer[0, step % LOG_EVERY].copy_(loss)
        self.buffer[1, step % LOG_EVERY].copy_(grad_norm)

    def send(self, step: int):
        """Start the interval that ends at `step` on its way; read the one sent before it."""
        self.receive()
        cuda = self.buffer.is_cuda
        host = torch.empty(self.buffer.shape, pin_memory=cuda)
        host.copy_(self.buffer, non_blocking=cuda)
        event = torch.cuda.Event() if cuda else None
        if cuda:
            event.record()
        self.in_flight = (step, host, event)

    def receive(self):
        if self.in_flight is None:
            return
        step, host, event = self.in_flight
        self.in_flight = None
        if event is not None:
            event.synchronize()  # of the copy an interval ago, not of the present
        self._check(host, step - LOG_EVERY)
        loss, grad_norm = host.mean(1).tolist()
        row = (step, loss, grad_norm, self.args.lr * learning_rate(self.args, step - 1))
        self.rows.append(row)
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(row)

    def drain(self, step: int):
        """Read all there is, now; after it every step up to `step` is known to be finite."""
        self.receive()
        self._check(self.buffer[:, : step % LOG_EVERY].cpu(), step - step % LOG_EVERY)

    def _check(self, values: Tensor, steps_before: int):
        bad = (~values.isfinite()).any(0).nonzero()
        if len(bad):
            step = steps_before + int(bad[0]) + 1
            lr = self.args.lr * learning_rate(self.args, step - 1)
            checkpoint = self.path.with_name("checkpoint.pt")
            left = f"{checkpoint} is from before" if checkpoint.exists() else "nothing was saved"
            raise FloatingPointError(
                f"loss or gradient is not finite at step {step} (lr {lr:.3g}); {left}; start again"
                " with --overwrite and a lower --lr"
            )


class StopSignal:
    """Ctrl-C or SIGTERM asks the loop to end after its step; a second Ctrl-C interrupts at once."""

    requested = False

    def __enter__(self):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        self.previous = handlers

        def request(number, frame):
            self.requested = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in handlers:
            signal.signal(number, request)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def show(bar: tqdm, run: Run, batch_size: int):
    if run.log.rows:
        rate = bar.format_dict["rate"] or 0
        bar.set_postfix_str(f"loss {run.log.rows[-1][1]:.4f}, {rate * batch_size:.0f} images/s")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

COMMON = {
    "dataset": "auto", "data_dir": Path("data"), "size": 32, "seed": 0, "patch_size": None,
    "residual": "prenorm", "lr": 6e-3, "warmup_steps": 100, "weight_decay": 0.0, "ema": 0.05,
    "shift": 1.0, "checkpoint_every": 1000, "cfg": 1.6, "solver": "euler", "sample_steps": 24,
    "time": "logit_normal", "loss": "mse", "pairs": None, "pairs_id": None, "init": None,
    "segments": 1, "anneal": 0.0,
}  # fmt: skip
# With pairs: RF++'s time, and no guidance, which is in the pairs already.
PAIRS_DEFAULTS = {"time": "u_shaped", "cfg": 1.0}
OLDER = {"time": "logit_normal", "loss": "mse", "segments": 1, "anneal": 0.0, "pairs_id": None}
FROM_INIT = ("dataset", "data_dir", "size", "preset", "patch_size", "residual", "shift")
SETTINGS = (  # what a resumed run must share with the first
    "dataset", "size", "seed", "preset", "patch_size", "residual", "batch_size", "steps", "lr",
    "warmup_steps", "weight_decay", "ema", "shift", "time", "loss", "pairs_id", "segments",
    "anneal",
)  # fmt: skip


Flag = argparse.BooleanOptionalAction


def build_parser() -> argparse.ArgumentParser:
    """Every option defaults to None here; resolve() fills in the device's or the resumed run's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(pairs_id=None)

    def add(group, name, help_text, **kwargs):
        key = name.replace("-", "_")
        if key in COMMON and COMMON[key] is not None:
            help_text += f" (default: {COMMON[key]})"
        elif key in DEFAULTS["cpu"]:
            help_text += (
                f" (default: {DEFAULTS['cpu'][key]} on a CPU, {DEFAULTS['gpu'][key]} on a GPU)"
            )
        group.add_argument(f"--{name}", help=help_text, **kwargs)

    data = parser.add_argument_group("data")
    add(data, "dataset", f"one of {', '.join(SOURCES)}")
    add(data, "data-dir", "folder of the data, or where to download it", type=Path)
    add(data, "size", "side in pixels of folder and parquet images", type=int)

    model = parser.add_argument_group("network")
    add(model, "preset", f"shape: {', '.join(PRESETS)}")
    add(
        model,
        "patch-size",
        "pixels a side of a token (default: the preset's, or the next below that fits)",
        type=int,
    )
    add(model, "residual", "prenorm or auraflow")

    training = parser.add_argument_group("training")
    add(training, "steps", "optimizer steps", type=int)
    add(training, "batch-size", "images a step", type=int)
    add(training, "lr", "learning rate at muP's base width; holds over width", type=float)
    add(training, "warmup-steps", "steps until the full rate; then a line down to 0", type=int)
    add(training, "weight-decay", "AdamW's, at the base width", type=float)
    add(training, "ema", "width of the weights' average, as a share of the run", type=float)
    add(training, "shift", "above 1: more time near the noise (pairs: their grid)", type=float)
    add(training, "time", f"where to train: {', '.join(rf.TIME_DISTRIBUTIONS)}")
    add(training, "loss", f"one of {', '.join(rf.LOSSES)}")
    add(training, "seed", "of weights, order, noise and time", type=int)
    add(training, "compile", "compile the blocks (default: with CUDA and Triton)", action=Flag)
    add(training, "device", "auto, cpu, mps or cuda (default: auto)", default="auto")

    reflow = parser.add_argument_group("reflow: straighter paths, fewer steps (pairs.py)")
    add(reflow, "pairs", "folder of pairs to train on; then --time u_shaped, --cfg 1", type=Path)
    add(reflow, "init", "start from this run's weights, with its data and network", type=Path)
    add(reflow, "segments", "straight pieces of a path; with --time start, steps of the result",
        type=int)  # fmt: skip
    add(reflow, "anneal", "share of the run in which pairs take over from any noise", type=float)

    sampling = parser.add_argument_group("pictures")
    add(sampling, "cfg", "guidance: 1 none, above 1 closer to the class", type=float)
    add(sampling, "solver", f"one of {', '.join(rf.SOLVERS)}")
    add(sampling, "sample-steps", "solver steps from noise to image", type=int)

    run = parser.add_argument_group("run")
    folder = Path("runs/mnist")
    add(run, "out", f"folder for all that comes out (default: {folder})", type=Path, default=folder)
    add(run, "resume", "continue the run in --out exactly", action="store_true")
    add(run, "overwrite", "replace the run in --out", action="store_true")
    add(run, "checkpoint-every", "steps between checkpoints", type=int)
    add(run, "dry-run", "one step of everything, in a temporary folder", action="store_true")
    return parser


def resolve(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """Fill in what was not given, and reject what cannot work before anything is loaded."""
    defaults = COMMON | DEFAULTS["cpu" if device.type == "cpu" else "gpu"]
    saved = {}
    if args.resume:
        saved = load_checkpoint(args.out / "checkpoint.pt")["settings"]
        if args.dry_run or args.overwrite:
            raise ValueError("--resume goes with neither --dry-run nor --overwrite")
    elif any((args.out / f).exists() for f in FILES) and not (args.overwrite or args.dry_run):
        raise ValueError(
            f"--out {args.out} already holds a run: continue it with --resume, replace it with"
            " --overwrite, or choose another --out"
        )
    saved = saved and OLDER | saved
    defaults |= take_from_pairs(args, saved)
    if args.init is not None:
        if args.resume or args.init.resolve() == args.out.resolve():
            raise ValueError("--init starts another run: drop --resume, and give it an --out")
        defaults |= older_run(args.init)
    for key, default in defaults.items():
        given = getattr(args, key)
        if given in (None, "auto"):
            setattr(args, key, saved.get(key, default))
        elif key in saved and key in SETTINGS and given != saved[key]:
            raise ValueError(
                f"--{key.replace('_', '-')} {given} differs from the run in {args.out}, which has"
                f" {saved[key]}: drop it to resume, or start another run with --out"
            )
    if args.compile is None:
        args.compile = device.type == "cuda" and find_spec("triton") is not None
    args.data_dir = Path(args.data_dir)
    check_pairs(args)
    for key, names in {
        "preset": PRESETS, "solver": rf.SOLVERS, "dataset": SOURCES, "loss": rf.LOSSES,
        "time": rf.TIME_DISTRIBUTIONS,
    }.items():  # fmt: skip
        if getattr(args, key) not in names:
            raise ValueError(f"--{key} {getattr(args, key)!r} must be one of {', '.join(names)}")
    counts = ("steps", "batch_size", "warmup_steps", "sample_steps", "checkpoint_every", "size")
    for key in (*counts, "patch_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must not be negative")
    rf.shift_time(0.5, args.shift)  # these three raise for a value that cannot be
    rf.gamma_from_sigma_rel(args.ema)
    replace(PRESETS[args.preset], residual=args.residual)
    return args


def older_run(folder: Path) -> dict:
    """What a run from --init takes over: the data and the network."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--init {folder} holds no config.json: give a finished run")
    run = json.loads(path.read_text()).get("run", {})
    return {key: run[key] for key in FROM_INIT if key in run}


def take_from_pairs(args: argparse.Namespace, saved: dict) -> dict:
    """Data and network of the run that made the pairs; what they change besides."""
    args.pairs = args.pairs or saved.get("pairs")
    pairs = Pairs(args.pairs) if args.pairs else None
    args.pairs_id = pairs.id if pairs else None
    if saved and saved["pairs_id"] != args.pairs_id:
        raise ValueError(f"--pairs {args.pairs} is not what the run in {args.out} is trained on")
    if pairs is None:
        return {}
    if pairs.about["words"] != "labels":
        raise ValueError(f"--pairs {args.pairs} has captions: train_t2i.py takes them")
    run = {key: pairs.about["run"][key] for key in FROM_INIT if key in pairs.about["run"]}
    segments = args.segments or 1
    steps = {"sample_steps": segments} if segments > 1 or args.time == "start" else {}
    return run | PAIRS_DEFAULTS | steps


def check_pairs(args: argparse.Namespace):
    """Pairs were made for one grid of times, and so many segments."""
    if args.pairs is None:
        if args.segments != 1 or args.anneal:
            raise ValueError("--segments and --anneal are for training on --pairs: give them")
        return
    about = Pairs(args.pairs).about
    if args.segments < 1 or about["segments"] % args.segments:
        raise ValueError(f"--segments {args.segments} must divide --pairs' {about['segments']}")
    if args.shift != about["shift"]:
        raise ValueError(f"--shift {args.shift} must be that of --pairs, {about['shift']}")
    if not 0 <= args.anneal <= 1 or (args.anneal and args.segments > 1):
        raise ValueError(f"--anneal {args.anneal} must lie in [0, 1], and be 0 with --segments")


def choose_device(name: str) -> torch.device:
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    if not there.get(name):
        have = ", ".join(n for n, yes in there.items() if yes)
        raise ValueError(f"--device {name!r} is not here; this machine has: {have}")
    return torch.device(name)


def launch(args: argparse.Namespace) -> Run:
    """Data, training, exported weights, pictures."""
    started, device = time.time(), choose_device(args.device)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: fp32 range, shorter products
    cpu.tune()
    args = resolve(args, device)
    if args.dry_run:
        args.steps, args.sample_steps = 1, 1
    training, held_out = load_images(args.dataset, args.data_dir, size=args.size, seed=args.seed)
    with tempfile.TemporaryDirectory() if args.dry_run else nullcontext(args.out) as folder:
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            for name in FILES:
                (out / name).unlink(missing_ok=True)
        run = train(args, training, device, out)
        save_model(out, run.ema_model(), run=run.settings(), classes=run.classes)
        draw_pictures(run, held_out, out)
    where = "dry run passed; a run would leave" if args.dry_run else "wrote"
    print(f"{where} {', '.join(FILES)} in {args.out} ({time.time() - started:.0f} s)")
    return run


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        launch(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_mnist.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_mnist.py: interrupted; what its folder holds is whole")


if __name__ == "__main__":
    main()
