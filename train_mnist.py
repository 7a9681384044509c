"""CHAPTER 1: train a rectified flow on digits, on one device, in minutes.

    python train_mnist.py                          MNIST, or glyphs where it cannot be downloaded
    python train_mnist.py --data cifar10           colour
    python train_mnist.py --data data/my           images of your own (tools/prepare.py)
    python train_mnist.py --data PAIRS --init RUN --out RUN2    reflow (tools/pairs.py)
    python train_mnist.py --resume                 continue where the last run stopped
    python train_mnist.py --resume --steps 10000   continue, and make the run longer
    python train_mnist.py --dry-run                one step, then everything else

What comes out, in --out: samples.png (a column for each class, or captions), samples.gif (from
noise to digit), curves.png, log.csv, eval.csv, model.safetensors + config.json (the averaged
weights), checkpoint.pt.

Start reading at train_step(): it is rectified flow in ten statements. train() repeats it, main()
gets everything ready. Chapter 2 (train_t2i.py) has the same step and adds several ranks, bf16, a
loader, and evaluations while it trains.

    1 settings      one line for each option
    2 one step      batch → line → loss → AdamW
    3 the loop      until the last step or a signal
    4 save, resume  checkpoint.pt
    5 start, end    what main() prepares, and what a finished run draws
"""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

import rf
from common import pictures
from common.evaluate import COLUMNS, ROWS, Ranks, asked, draw_asked, eval_row, validation
from common.log import Log, LogRow, append_row, device_peak, progress_bar, show, write_rows
from common.muon import use_muon
from common.pipeline import Pipeline, drop_export, run_facts, settle_run
from common.settings import Checked, Count, changes, fitting, option, parse
from common.start import (
    NOTHING,
    STOP,
    Signals,
    begin,
    choose_device,
    claim,
    intact,
    line_of,
    listing,
    move_away,
    owned,
    program,
    real,
    write_whole,
)
from inputs.rows import Batch, Rows
from inputs.sources import DataOptions
from mmdit import PRESETS, RESIDUALS, MMDiT, fitted

# What a run leaves in its folder. If one of these exists, the folder holds a run.
FILES = (
    "checkpoint.pt",
    "log.csv",
    "eval.csv",
    "config.json",
    "model.safetensors",
    "samples.png",
    "samples.gif",
    "curves.png",
)
LOG_EVERY = 20  # steps in one row of log.csv
# β₂ = 0.99 averages squared gradients over 100 steps; Adam's usual 0.999 is too slow for short
# runs. eps is added to the root of the mean square of the gradient. Gradients shrink with the
# width: the usual 1e-8 would slow down wide networks only, and the rate would not transfer (muP).
BETAS, EPS = (0.9, 0.99), 1e-15
CLIP = 1.0  # largest global gradient norm: limits the effect of one unusual batch

# ------------------------------------------------------------------------------------------------
# 1 Settings
# ------------------------------------------------------------------------------------------------

# What a device can do in a few minutes. A CPU takes a narrow network and small batches; a GPU would
# be mostly idle with them. 5,000 steps of 64 images show each digit of MNIST five times.
RECIPES = {
    "cpu": {"preset": "digits", "batch_size": 64, "steps": 5000},
    "gpu": {"preset": "digits-wide", "batch_size": 256, "steps": 20000},
}


@dataclass(frozen=True)
class Settings(DataOptions):
    """All options: common/settings.py makes the command line, --help and the checks from them.

    fixed: a resumed run must have the same value. What is not fixed may change from the checkpoint
    on (--resume --steps 10000 --lr 0.003), and log.csv says so. local: belongs to this call and is
    not saved. DataOptions (inputs/sources.py) adds the options of the data.
    """

    DATA = "auto"  # the data if --data is not given
    data: list[str] = option(
        ["auto"],
        "auto (mnist, or glyphs), mnist, glyphs, cifar10, shapes, or folders of tools.prepare"
        " and tools.pairs",
        group="data",
    )
    # The network. The preset gives width and depth; the data gives channels, grid and classes.
    preset: str = option("digits", ", ".join(PRESETS), choices=PRESETS, fixed=True, group="network")
    # A patch is a token. Small patches can draw finer detail, but there are more of them, and the
    # cost of a step grows with the number of tokens (attention: with its square).
    patch_size: int | None = option(
        None, "side of a patch in pixels (the largest that fits the images)", least=1, fixed=True
    )
    residual: str | None = option(
        None, "form of a block: prenorm or auraflow (the preset's)", choices=RESIDUALS, fixed=True
    )
    init: Path | None = option(
        None, "start from run INIT: weights, network, encoders, size, guidance, shift", local=True
    )

    # Training. lr holds at every width (muP): it need not change between presets that differ only
    # in width. rf.py explains time, shift and loss; segments and anneal are for pairs
    # (tools/pairs.py).
    steps: int = option(5000, "optimizer steps", least=1, group="training")
    # fixed: the images of a step are found by its number and this one.
    batch_size: int = option(64, "images a step", least=1, most=2**20, fixed=True)
    lr: float = option(6e-3, "learning rate at the base width; holds over width", least=0)
    muon_lr: float = option(
        0.04, "Muon's rate for the matrices in blocks; 0: AdamW moves them", least=0
    )
    warmup_steps: int = option(100, "in which the rate rises", least=1)
    # Weight decay pulls weights towards zero at each step. In a run of minutes no image is seen
    # often enough to be learned by heart, so nothing is gained by it.
    weight_decay: float = option(0.0, "AdamW's and Muon's, at the base width", least=0)
    # The pictures are drawn with an average of the weights. At 0.05 nine tenths of it lie in the
    # last eighth of the run. A wider one would hold weights of the time when the network knew less.
    # fixed: it is computed from the first step on.
    ema: float = option(
        0.05,
        "width of the weights' average, a share of the run",
        least=0.001,
        most=0.28,
        fixed=True,
    )
    shift: float = option(1.0, "above 1: more training times near the noise", least=0.01, most=100)
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
    compile: bool | None = option(None, "compile the blocks (with CUDA and Triton)", local=True)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", local=True)

    # Pictures at the end. None of these changes the training, so a finished run may be resumed with
    # other values to draw again: `--resume --cfg 4`.
    # More guidance is read more surely and varies less. Most variety is lost near the noise, where
    # the form of a digit is decided: so there is none above cfg_below (rf.integrate).
    cfg: float = option(
        1.7, "guidance: above 1 closer to the caption", least=-100, most=100, group="pictures"
    )
    cfg_below: float = option(0.8, "guidance at times t up to this alone", least=0, most=1)
    solver: str = option("euler", "of the pictures", choices=rf.SOLVERS)
    sample_steps: int = option(24, "solver steps from noise to image", least=1)

    # The run and its folder.
    out: Path = option(Path("runs/mnist"), "folder of the run's files", local=True, group="run")
    resume: bool = option(False, "continue the run in --out, or begin it", local=True)
    overwrite: bool = option(False, "begin anew; the run in --out becomes OUT.old", local=True)
    # A kill loses the steps since the last checkpoint.
    checkpoint_every: int = option(1000, "steps between checkpoints", least=1)
    dry_run: bool = option(False, "one step of everything, in a temporary folder", local=True)

    def __post_init__(self):
        """Refuse options that contradict each other, before any work is done."""
        super().__post_init__()
        if self.resume and (self.overwrite or self.dry_run or self.init):
            raise ValueError("--resume goes with none of --overwrite, --dry-run and --init")


# ------------------------------------------------------------------------------------------------
# 2 One step
# ------------------------------------------------------------------------------------------------


def draw(rows: Rows, settings: Settings, step: int, generator: torch.Generator) -> Batch:
    """The batch of a step, from (seed, step) alone.

    Because no random state is carried from step to step, a resumed run sees exactly the batches of
    a run that was never stopped. u is spread evenly over the batch; rf.line makes times of it.
    """
    B, device = settings.batch_size, generator.device
    generator.manual_seed(rf.mix_seed(settings.seed, "step", step))
    random = {"generator": generator, "device": device}  # drawn on the device: nothing is copied
    # What stands at these positions of the endless sequence of samples: every image once an epoch,
    # in an order that the seed decides.
    stored, text = rows.at(range(step * B, (step + 1) * B))
    shape = (B, *rows.shape(stored))  # (B, C, h, w)
    # Some captions are dropped, so the same network also learns the unconditional velocity that
    # guidance needs.
    dropped = torch.rand(B, **random) < rows.dropout if rows.dropout else None
    u, noise = rf.spread(B, **random), torch.randn(shape, **random)
    # A VAE gives a distribution of latents for each image; this noise samples one.
    vae_noise = torch.randn(shape, **random) if rows.random else None
    return Batch(stored, text, dropped, u, noise, vae_noise)


def train_step(model, adamw, rows: Rows, settings: Settings, step: int, generator):
    """One step on E‖v(x_t, t) − (noise − data)‖². → loss, gradient norm, on the device.

    The two results stay on the device. To read a number, the host waits until the device has
    computed it, and then the device waits for new work. So log.py reads once in LOG_EVERY steps.
    """
    # states (B, K + 1, C, h, w): the data alone (K = 0), or the known points of a path (pairs)
    states, text, u, noise = rows.encode(draw(rows, settings, step, generator), generator.device)
    # One line for each sample, by its two ends, and the time t at which the network is trained. For
    # the first flow the ends are the image and fresh noise.
    data, noise, t = rf.line(
        states,
        noise,
        u,
        segments=settings.segments,
        time=settings.time,
        shift=settings.shift,
        beta=annealing(settings, step),
    )
    # x_t = (1 − t)·data + t·noise goes in, v comes out, noise − data is what it should be.
    loss = rf.rf_loss(model, data, text, t=t, noise=noise, loss=settings.loss).mean()
    loss.backward()
    # The norm of all gradients together, before they are scaled down to CLIP if it is larger.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    # base_lr is the group's own rate, from muP's table (mmdit.py); the schedule scales all of them.
    for group in adamw.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(settings, step)
    adamw.step()  # moves the weights (matrices: use_muon), and then their average (keep_averages)
    adamw.zero_grad()
    return loss, norm


def learning_rate(settings: Settings, step: int) -> float:
    """The share of the base rate at a step (from 0): a line from 1 down to 0, times the warm-up.

    Warm-up: Adam's first estimates come from few batches and are noisy; full steps along them would
    be noisy as well. The line to zero: smaller steps at the end reduce the noise of the weights.
    """
    return min((step + 1) / settings.warmup_steps, 1) * (1 - step / settings.steps)


def annealing(settings: Settings, step: int) -> float:
    """beta of rf.line: from 1 (fresh noise) to 0 (pairs) over the first share `anneal` of a run."""
    steps = round(settings.anneal * settings.steps)  # 0: pairs from the first step on
    return 1 - step / steps if step < steps else 0.0


# ------------------------------------------------------------------------------------------------
# 3 The loop
# ------------------------------------------------------------------------------------------------


def train(
    model: MMDiT,
    adamw,
    rows: Rows,
    settings: Settings,
    log: Log,
    step: int,
    path: Path,
    one_step: Callable | None = None,
) -> int:
    """The loop, from `step` to the end. → the step at which it ended.

    one_step: in place of train_step (experiments/distill.py).
    Ctrl-C and SIGTERM end it after the step under way, with a checkpoint. Raises FloatingPointError
    if a loss or gradient was not finite; weights after such a step are never saved.
    """
    device = model.positions.device
    generator, B = torch.Generator(device), settings.batch_size
    h, w = max(rows.sides())
    # For the bar's MFU (model FLOPs utilisation): FLOP/s that the run reaches over the device's
    # peak.
    flops, peak = model.flops_per_image(h, w, rows.text.tokens), device_peak(device)
    # The bar counts images, so that speeds can be compared between batch sizes.
    bar = progress_bar(settings.steps * B, step * B)
    with bar, Signals() as signals:
        request = NOTHING
        while step < settings.steps and request != STOP:
            loss, norm = (one_step or train_step)(model, adamw, rows, settings, step, generator)
            log.add(loss)
            lr = settings.lr * learning_rate(settings, step)
            step += 1
            row = log.end_step(step, step * B, norm, lr=lr)
            if row:  # once in LOG_EVERY steps; the host waits for the device only here and to save
                check_finite(log, row, path)
                show(bar, row, flops, peak)
            request = signals.take()
            if request or step % settings.checkpoint_every == 0 or step == settings.steps:
                check_finite(log, log.flush(), path)  # the steps since the last row, too
                save(path, model, adamw, rows, settings, log, step)
                drop_export(path.parent)  # of an earlier end; finish writes the new one
            bar.update(B)
    return step


def check_finite(log: Log, row: dict | None, path: Path):
    """Stop a run that has diverged. A weight that is NaN makes every later output NaN, and so every
    gradient: it never heals."""
    if row and log.bad_step:
        left = f"{path} is from before" if path.exists() else "nothing was saved"
        raise FloatingPointError(
            f"loss or gradient is not finite at step {log.bad_step} (lr {row['lr']:.3g}); {left};"
            " start again with --overwrite and a lower --lr"
        )


# ------------------------------------------------------------------------------------------------
# 4 Save and resume
# ------------------------------------------------------------------------------------------------
# A resumed run restores the weights, the optimizer's moments and counts of steps, the average, the
# settings and the rows of log.csv. It need not restore random generators or a place in the data:
# both follow from seed and step. So the rest of the run is the same to the last bit (on a CPU; GPUs
# add up in an order that may differ from run to run). Nor are rates and decay restored: they follow
# from the settings, which may have changed.


def save(path: Path, model: MMDiT, adamw, rows: Rows, settings: Settings, log: Log, step: int):
    """Write the checkpoint, whole or not at all (write_whole: a temporary file is renamed)."""
    state = {
        "settings": settings.saved(),
        "rows": rows.id,  # a checksum: on other images the run would not be the same run
        "config": asdict(model.config),
        "step": step,
        "model": model.state_dict(),
        "adamw": adamw.state_dict(),  # moments, and the average beside them
        "log": log.rows,
    }
    # First into memory: a disk that fills up then costs the new checkpoint and not the old one.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


@dataclass(frozen=True)
class State(Checked):
    """What checkpoint.pt holds: see save."""

    settings: dict
    rows: str
    config: dict
    step: Count
    model: dict
    adamw: dict
    log: list[LogRow]


def load(path: Path, device) -> dict:
    """What save wrote. ValueError if it is not ours, or damaged.

    weights_only: a pickle may run any code when it is opened; this refuses all but tensors and
    plain values.
    """
    try:
        return fitting(State, torch.load(intact(path), map_location=device, weights_only=True))
    except Exception as error:  # torch raises half a dozen kinds for a file that is not its own
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this script ({line_of(error)}):"
            " replace the run with --overwrite, or choose another --out"
        ) from error


def build(settings: Settings, rows: Rows, state: dict, device) -> tuple[MMDiT, torch.optim.AdamW]:
    """Network and optimizer: new, with the weights of --init, or from the checkpoint's state."""
    torch.manual_seed(settings.seed)  # for the initial weights; no step draws from global state
    # What the data decides: grey or colour, how many classes, how many patches.
    channels, text_dim, sides = rows.latent_channels, rows.text.dim, list(rows.sides())
    sizes = {"channels": channels, "text_dim": text_dim, "sides": sides}
    patch, residual = settings.patch_size, settings.residual
    model = MMDiT(fitted(settings.preset, **sizes, patch_size=patch, residual=residual)).to(device)
    if settings.init and not state:  # for larger pictures start_from stretches the position table
        older = Pipeline.open(settings.init)
        model.start_from(older.model, settings.size / older.facts["size"])
    if state and state["config"] != asdict(model.config):
        raise ValueError(f"the run in {settings.out} is of another network: choose another --out")
    # torch.compile fuses small operations into few kernels. It pays on a GPU, where it needs
    # Triton.
    compiles = device.type == "cuda" and find_spec("triton") is not None
    if compiles if settings.compile is None else settings.compile:
        model.compile_blocks()
    # By muP each group has its own rate. Two optimizers share the work. AdamW moves every entry by
    # about its rate. Muon moves the matrices in the blocks in all their directions equally far, so
    # rare directions are learned as fast as frequent ones (common/muon.py).
    groups = model.param_groups(settings.lr, settings.weight_decay, muon_lr=settings.muon_lr)
    fused = device.type in ("cpu", "cuda")  # all weights of a group in one kernel
    adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused)
    use_muon(adamw)
    rf.keep_averages(adamw, [settings.ema])
    if state:
        restore(model, adamw, state, settings)
    return model, adamw


def restore(model: MMDiT, adamw, state: dict, settings: Settings):
    """Put the checkpoint's weights, moments and average in place. ValueError if they do not fit.

    torch compares names and shapes of the weights, but accepts any optimizer state. So we look at
    that ourselves: AdamW has two moments of each of its weights, Muon one, and each weight has its
    average and its count of steps.
    """
    if state["step"] > settings.steps:
        raise ValueError(
            f"--steps {settings.steps} is less than the {state['step']} steps that the run in"
            f" {settings.out} has made: give more, or choose another --out"
        )
    average, wanted = rf.average_name(settings.ema), []
    groups = [dict(group) for group in adamw.param_groups]  # as the settings say
    try:
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["adamw"])
        for group, own in zip(adamw.param_groups, groups, strict=True):
            wanted.append(set(group) == {*own, "updates"})
            group |= own
            moments = ["momentum"] if "matrices" in group else ["exp_avg", "exp_avg_sq"]
            names = (*moments, average)
            for parameter in group["params"]:
                shapes = {name: x.shape for name, x in adamw.state[parameter].items()}
                known = dict.fromkeys(names, parameter.shape) | {"step": torch.Size()}
                wanted.append(shapes == known)
        fits = all(wanted)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"{settings.out}/checkpoint.pt is damaged: its weights and optimizer are not those of"
            " such a run; replace it with --overwrite"
        )


# ------------------------------------------------------------------------------------------------
# 5 Start and end
# ------------------------------------------------------------------------------------------------


def finish(model: MMDiT, adamw, rows: Rows, settings: Settings, log: Log, step: int, out: Path):
    """Write the averaged weights, their validation loss, and pictures that they draw."""
    # From here on the model holds the averaged weights. The checkpoint with the real ones is
    # written already, and nothing trains any more, so they need not be swapped back.
    rf.exchange_averages(adamw, rf.average_name(settings.ema))
    samples, device = step * settings.batch_size, model.positions.device
    # The facts tell whoever opens the weights how to draw with them: size, guidance, steps, shift.
    facts = run_facts(settings, rows, model.config, samples)
    losses = validation(model, rows, settings, device, Ranks())  # at t = 0, 1/8, …, 7/8
    Pipeline(model, rows.text, rows.image, facts).save(out)  # for sample_t2i.py and Pipeline.open
    wanted = asked(rows, per_tag=ROWS)
    # The same captions and the same noise in every run with this seed, so that runs can be
    # compared.
    frames, _ = draw_asked(model, rows, wanted, settings, device, Ranks(), trajectory=True)
    row = eval_row(samples, losses)
    write_rows(out / "eval.csv", [])  # one row, also if the run is finished a second time
    append_row(out / "eval.csv", row)
    captions, columns = [wanted.captions[i] for i in wanted.shown], COLUMNS
    # Digits: a column for each class. Captioned rows: a sheet with a caption above each picture.
    if rows.words:
        columns = min(10, len(rows.words))
        pictures.classes(frames[-1], captions[:columns], out / "samples.png")
    elif captions:
        pictures.captioned(frames[-1], captions, out / "samples.png", columns)
    if captions:  # there are none if no row is held out
        pictures.film(frames, columns, out / "samples.gif")
    pictures.curves(log.rows, [row], out / "curves.png")


@program("train_mnist.py")
def main(argv: list[str] | None = None):
    """Everything before and after the loop. The order matters: all checks come before the first
    file of the run is written, and an old run is moved away only when they have passed."""
    started, typed = time.time(), parse(Settings, argv, __doc__, RECIPES)
    device = choose_device(typed.get("device", "auto"))
    begin(device)
    out = typed["out"] = real(typed.get("out", Settings.out))
    # 1. The run that is there: resume it, replace it, or refuse.
    claim(out, "train_mnist.py")
    before = listing(out)  # compared once the folder is ours: another process may write meanwhile
    state = {}
    if typed.get("resume") and (out / "checkpoint.pt").exists():
        state = load(out / "checkpoint.pt", device)
    # Any of these files means that a run is there, even if it was killed before its checkpoint.
    present = [file for file in FILES if (out / file).exists()]
    finished = {"checkpoint.pt", "model.safetensors"} & set(present)  # what is worth keeping
    if finished and typed.get("resume") and not state:
        raise ValueError(f"the run in {out} has no checkpoint.pt: begin anew with --overwrite")
    if present and not any(typed.get(key) for key in ("resume", "overwrite", "dry_run")):
        raise ValueError(
            f"--out {out} already holds a run: continue it with --resume, replace it with"
            " --overwrite, or choose another --out"
        )
    # 2. Combine the settings of the command line, the checkpoint and the data; open the data.
    recipe = RECIPES["cpu" if device.type == "cpu" else "gpu"]
    saved = state.get("settings", {})
    settings, rows = settle_run(Settings, typed, state, device, lambda preset: recipe)
    if settings.dry_run:  # all that a real run does, with one step
        settings = replace(settings, steps=1, sample_steps=1)
    # 3. Network and optimizer. Nothing is deleted or written yet: a preset that does not fit the
    # data, or a network too large for the memory, ends the program here and costs nothing. Tests
    # hold this for a dozen kinds of mistakes.
    model, adamw = build(settings, rows, state, device)
    # 4. The folder. A dry run takes a temporary one, so it does not touch a run in --out.
    where = tempfile.TemporaryDirectory() if settings.dry_run else nullcontext(out)
    if settings.dry_run:
        before = None  # the temporary folder is new
    elif settings.overwrite and present and move_away(out, "train_mnist.py", before):
        before = []
    with where as folder, owned(Path(folder), "train_mnist.py", before=before) as folder:
        log = Log(folder / "log.csv", LOG_EVERY)
        log.rows = list(state.get("log", []))  # later rows are dropped: their steps are made again
        log.changed = changes(saved, settings)
        log.begin()
        # 5. Train, and write the results, also those of a run that was stopped.
        path, step = folder / "checkpoint.pt", state.get("step", 0)
        if step == settings.steps and log.changed:  # or the next resume would undo it
            save(path, model, adamw, rows, settings, log, step)
        step = train(model, adamw, rows, settings, log, step, path)
        finish(model, adamw, rows, settings, log, step, folder)
    where = "dry run passed; a run would leave" if settings.dry_run else "wrote"
    print(f"{where} {', '.join(FILES)} in {settings.out} ({time.time() - started:.0f} s)")
    if step < settings.steps:
        print(f"stopped at step {step} of {settings.steps}; add --resume to continue")


if __name__ == "__main__":
    main()
