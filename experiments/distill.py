"""DISTILLATION: a guided run of many steps → one of a few steps without guidance, in minutes.

    python -m experiments.distill runs/shapes --pieces 4 --out runs/shapes4
    python sample_t2i.py runs/shapes4 --score
    python -m experiments.distill runs/shapes --resume        go on with one that was stopped

The teacher is the run itself, with its own solver, guidance and number of steps, N. Its times are
cut into K pieces. The student is the same network, and starts as the teacher. From any of
the N times it learns to jump to the end of its piece, so it samples in K steps of one pass.

    u(x_t, t) = (x_t − x_e) / (t − e)         the mean velocity of the teacher's path from t to e
    (t − e)·u(x_t, t) = x_t − x_{t−h} + (t − h − e)·u(x_{t−h}, t − h)     a step h, then the rest

The second line is the target: the teacher makes one guided step, and the student itself says what
remains. So errors are mended from the end of a piece upwards, and nobody ever follows a whole path
(a flow map, learned by consistency: Boffi et al. 2025, 2505.18825, with K fixed ends). Reflow on
stored pairs (tools/pairs.py) sees the same few paths again and again; here x_t lies on a line
between fresh data and fresh noise, new at each step. No path need be straight: u is a mean.

A run comes out that samples in K steps at guidance 1. Start reading at target().
"""

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import rf
import train_mnist
from common.log import Log
from common.pipeline import Pipeline, settle_run
from common.settings import Options, changes, option, parse
from common.start import begin, choose_device, claim, owned, program, write_whole
from inputs.rows import Rows

NAME = "experiments.distill"


@torch.no_grad()
def target(
    teacher: Pipeline, student: rf.Model, x: Tensor, text: Tensor, place: Tensor, times: Tensor
) -> Tensor:
    """The mean velocity from times[place] to the end of its piece, (B, C, h, w) fp32.

    x (B, C, h, w) at times[place]; place (B,) int64; times (K, N/K + 1) fall, and the last of a row
    is the first of the next: a row is a piece.
    """
    piece, inside = place // (times.shape[1] - 1), place % (times.shape[1] - 1)
    t, after, end = times[piece, inside], times[piece, inside + 1], times[piece, -1]
    t, after, end = (time.view(-1, 1, 1, 1) for time in (t, after, end))
    facts, null_text = teacher.facts, teacher.features([""])
    step = rf.euler_step if facts["solver"] == "euler" else rf.rf_solver_step

    def guided(x: Tensor, t: Tensor) -> Tensor:
        cfg = torch.where(t <= facts["cfg_below"], facts["cfg"], 1.0)
        return rf.guided_velocity(teacher.model, x, t.flatten(), text, null_text, cfg).float()

    near = step(guided, x, t, after - t)
    rest = (after - end) * student(near, after.flatten(), text).float()  # 0 at a piece's end
    return (x - near + rest) / (t - end)


def distill_step(
    teacher: Pipeline, pieces: int, model, adamw, rows: Rows, settings, step: int, generator
):
    """In place of chapter 1's train_step: another target, and t is one of the teacher's times."""
    steps, shift = teacher.facts["steps"], teacher.facts["shift"]
    batch = train_mnist.draw(rows, settings, step, generator)
    batch = batch._replace(dropped=None)  # the student draws without guidance
    states, text, u, noise = rows.encode(batch, generator.device)
    grid = rf.shift_time(1 - torch.arange(steps + 1, device=u.device) / steps, shift)
    times = torch.cat(
        [grid[:-1].view(pieces, -1), grid[steps // pieces :: steps // pieces, None]], 1
    )
    place = (u * steps).long().clamp(max=steps - 1)  # each of the N times equally often
    t = grid[place]
    x = rf.interpolate(states[:, 0], noise, t)
    wanted = target(teacher, model, x, text, place, times)
    loss = (model(x, t, text).float() - wanted).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_mnist.CLIP)
    for group in adamw.param_groups:
        group["lr"] = group["base_lr"] * train_mnist.learning_rate(settings, step)
    adamw.step()
    adamw.zero_grad()
    return loss.detach(), norm


@dataclass(frozen=True)
class Settings(Options):
    run: Path = option(None, "the teacher: a run of either chapter", positional=True)
    pieces: int = option(4, "steps of the student; they divide the teacher's", least=1)
    steps: int = option(6000, "training steps", least=1)
    batch_size: int = option(64, "samples a step", least=1)
    lr: float = option(2e-3, "AdamW's rate", least=0)
    muon_lr: float = option(0.02, "Muon's rate", least=0)
    data_dir: Path = option(Path("data"), "of MNIST or CIFAR-10")
    seed: int = option(1, "of noise and captions; the teacher's would repeat what it saw", least=0)
    out: Path | None = option(None, "folder of the student's run (RUN with its number of steps)")
    resume: bool = option(False, "go on with the student in --out")
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")


@program(NAME)
def main(argv: list[str] | None = None):
    given = parse(Settings, argv, __doc__)
    args = Settings(**given)
    device = choose_device(args.device)
    begin(device)
    teacher = Pipeline.open(args.run, device)
    facts, out = teacher.facts, args.out or args.run.with_name(f"{args.run.name}{args.pieces}")
    if facts["solver"] not in ("euler", "rf_solver"):
        raise ValueError(f"{args.run} draws with {facts['solver']}: must be euler or rf_solver")
    claim(out, NAME)
    checkpoint, state = out / "checkpoint.pt", {}
    if checkpoint.exists() and not args.resume:
        raise ValueError(f"--out {out} holds a student: go on with --resume, or choose another")
    if (out / "model.safetensors").exists() and not checkpoint.exists():
        raise ValueError(f"the student in {out} has no checkpoint.pt: choose another --out")
    of = out / "teacher.txt"
    if checkpoint.exists():
        state = train_mnist.load(checkpoint, device)
        if not of.exists() or of.read_text() != teacher.origin:
            raise ValueError(f"--out {out} learns from another teacher than {teacher.origin}")
        pieces = state["settings"]["sample_steps"]
        if "pieces" in given and args.pieces != pieces:
            raise ValueError(f"--pieces {args.pieces}: the student in {out} has {pieces}, drop it")
        args = replace(args, pieces=pieces)
    if facts["steps"] % args.pieces or facts["steps"] == args.pieces:
        raise ValueError(
            f"--pieces {args.pieces} must divide the {facts['steps']} steps of {args.run}"
        )
    keys = ("steps", "batch_size", "lr", "muon_lr", "seed")  # a resume changes what was typed
    typed = {key: getattr(args, key) for key in keys if key in given or not state}
    typed |= {key: facts[key] for key in ("shapes", "colors", "places", "shift")}
    typed |= {"data": shlex.split(facts["source"]), "data_dir": args.data_dir, "out": out}
    typed |= {"cfg": 1.0, "cfg_below": 1.0, "sample_steps": args.pieces, "solver": "euler"}
    init = {} if state else {"init": args.run}
    saved = state.get("settings", {})
    settings, rows = settle_run(
        train_mnist.Settings, typed | init, state, device, lambda preset: {}
    )
    if rows.K or facts["steps"] % args.pieces:
        raise ValueError(f"{args.run} learned from pairs: give the run that made them")
    model, adamw = train_mnist.build(settings, rows, state, device)
    step = partial(distill_step, teacher, args.pieces)
    with owned(out, NAME):
        write_whole(of, teacher.origin.encode())
        log = Log(out / "log.csv", train_mnist.LOG_EVERY)
        log.rows, log.changed = list(state.get("log", [])), changes(saved, settings)
        log.begin()
        at = train_mnist.train(
            model, adamw, rows, settings, log, state.get("step", 0), checkpoint, step
        )
        train_mnist.finish(model, adamw, rows, settings, log, at, out)
    print(f"{'finished' if at == settings.steps else 'stopped'} at step {at}; all is in {out}")


if __name__ == "__main__":
    main()
