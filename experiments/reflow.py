"""Straight paths: from many steps to one, on chapter 1's digits.

    python train_mnist.py && python -m experiments.reflow runs/mnist

    first      the run itself, guided
    second     trained on the first one's pairs (tools.pairs): straighter paths, guidance folded in
    distilled  trained on the second one's pairs, only where the walk begins: one step
    student    --student: a narrower second flow from scratch, its start annealed (SlimFlow)

Then each is read by digit_score.py's CNN at few and many evaluations, by every solver, with
adaptive RK45 as the reference (if scipy is there). What comes out, in RUN/reflow: the stages' runs,
reflow.csv, reflow.png (quality and straightness), strip.png (1, 2 and 4 steps of each stage). Pairs
and runs that are there already stay, and one that was stopped goes on: give the same command again.
--ablate SEEDS instead compares uniform with U-shaped time and squared error with pseudo-Huber
(RF++, 2405.20320), a row a seed, in ablate.csv.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from math import nan
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import rf
import train_mnist
from common import pictures
from common.pipeline import Pipeline, read_facts
from common.settings import Options, option, parse
from common.start import begin, choose_device, move_away, owned, program, write_whole
from experiments.digit_score import Judge
from mmdit import PRESETS
from tools import pairs

EVALUATIONS = (1, 2, 4, 8, 16, 32)  # even, for the solvers that take two a step
STRAIGHT = 200  # samples for the straightness

# ------------------------------------------------------------------------------------------------
# The stages
# ------------------------------------------------------------------------------------------------


def call(main, *words):
    """Run a program's main, and say how to do so by hand."""
    print("python -m", main.__module__, *words, flush=True)
    main([str(word) for word in words])


def make_pairs(args: "Settings", run: Path, out: Path, steps: int):
    options = ("--number", args.number, "--seed", args.seed, "--device", args.device)
    call(pairs.main, run, "--out", out, "--steps", steps, *options)


def train(args: "Settings", out: Path, steps: int, time: str, *options, init=()):
    """An ordinary run of train_mnist.py: new, from the run --init, or continued."""
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():  # the trainer would change them, but later stages come from this one
        made = train_mnist.load(checkpoint, "cpu")["settings"]
        if (made["steps"], made["time"]) != (steps, time):
            raise ValueError(
                f"{out} has --steps {made['steps']} --time {made['time']}, not {steps} and {time}:"
                " begin anew with --overwrite"
            )
    begun = ["--resume"] if checkpoint.exists() else ["--overwrite", *init]
    where = ("--out", out, "--steps", steps, "--time", time, "--device", args.device)
    call(train_mnist.main, *where, *begun, *options)
    if train_mnist.load(checkpoint, "cpu")["step"] < steps:
        raise KeyboardInterrupt  # it has saved and ended its pictures; what follows needs it whole


def build_stages(args: "Settings", folder: Path) -> dict[str, Path]:
    """name → the folder of its run; made where it is missing."""
    stages = {"first": args.run, "second": folder / "second", "distilled": folder / "distilled"}
    how = ("--loss", args.loss, "--seed", args.seed)
    make_pairs(args, args.run, folder / "pairs", steps=12)
    second = (args.time, "--data", folder / "pairs", "--sample-steps", 4, *how)
    train(args, stages["second"], args.steps, *second, init=("--init", args.run))
    make_pairs(args, stages["second"], folder / "pairs2", steps=8)
    one = ("start", "--data", folder / "pairs2", *how)
    train(args, stages["distilled"], args.steps, *one, init=("--init", stages["second"]))
    if args.student:
        stages["student"] = folder / "student"
        narrow = ("--preset", args.student, "--anneal", 0.3)
        train(args, stages["student"], 2 * args.steps, *second, *narrow)
    return stages


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def rk45(pipeline: Pipeline, captions: list[str], noise: Tensor) -> tuple[Tensor, int, int]:
    """Adaptive Runge-Kutta on all of it at once (scipy): → x at t = 0, its steps, evaluations."""
    from scipy.integrate import solve_ivp

    text, null_text = pipeline.features(captions), pipeline.features([""])

    def slope(t: float, flat):
        x = torch.from_numpy(flat).float().view(noise.shape).to(pipeline.device)
        times = torch.full((len(x),), t, device=x.device)
        cfg = pipeline.facts["cfg"] if t <= pipeline.facts["cfg_below"] else 1.0
        v = rf.guided_velocity(pipeline.model, x, times, text, null_text, cfg)
        return v.flatten().double().cpu().numpy()

    found = solve_ivp(slope, (1.0, 0.0), noise.flatten().double().numpy(), rtol=1e-3, atol=1e-3)
    x = torch.from_numpy(found.y[:, -1]).float().view(noise.shape)
    return x, len(found.t) - 1, found.nfev


def score_stage(stage: str, pipeline: Pipeline, judge: Judge) -> pd.DataFrame:
    """A row a solver and number of evaluations. The distilled flow is a map for one step alone."""
    cfg, rows, bend = pipeline.facts["cfg"], [], nan
    guided = 1 if cfg == 1 else 2  # network passes of an evaluation

    def add(solver: str, steps: int, evaluations: int, drawn: Tensor):
        recognised, distance = judge.score(drawn, judge.labels)
        ratio = distance / judge.real[1]
        passes = guided * evaluations
        rows.append((stage, solver, steps, passes, recognised, distance, ratio, bend))

    if stage == "distilled":
        add("euler", 1, 1, pipeline.draw(judge.captions, judge.noise, steps=1, solver="euler"))
    else:
        few, null_text = judge.noise[:STRAIGHT].to(pipeline.device), pipeline.features([""])
        text, how = pipeline.features(judge.captions[:STRAIGHT]), {"cfg": cfg, "steps": 50}
        curved = rf.straightness(pipeline.model, few, text, null_text=null_text, **how)
        bend = curved.mean().item()
        for solver, n in product(rf.SOLVERS, EVALUATIONS):
            steps = n if solver == "euler" else n // 2
            if steps:
                drawn = pipeline.draw(judge.captions, judge.noise, solver=solver, steps=steps)
                add(solver, steps, n - (solver == "heun"), drawn)  # its last step is Euler's
        if find_spec("scipy"):
            x, *used = rk45(pipeline, judge.captions, judge.noise)
            add("rk45", *used, pipeline.image.decode(x))
        else:
            print("no RK45: pip install scipy")
    names = "stage solver steps passes recognised frechet frechet_ratio straightness"
    table = pd.DataFrame(rows, columns=names.split())
    print(table.to_string(index=False, float_format="{:.3f}".format), flush=True)
    return table


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def plot(table: pd.DataFrame, path: Path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    styles = {"euler": "o-", "rf_solver": "s:", "rk45": "*"}
    for k, (stage, rows) in enumerate(table.groupby("stage", sort=False)):
        for solver, found in rows.groupby("solver", sort=False):
            for axis, column in zip(axes, ("recognised", "frechet"), strict=False):
                if solver in styles:
                    how = {"color": f"C{k}", "label": f"{stage}, {solver}"}
                    axis.plot(found.passes, found[column], styles[solver], **how)
        bar = axes[2].bar(stage, rows.straightness.iloc[0], color=f"C{k}")
        axes[2].bar_label(bar, fmt="%.1f")
    axes[0].set(ylabel="share recognised", xscale="log", xlabel="network passes a sample")
    axes[1].set(ylabel="Fréchet distance", xscale="log", yscale="log", xlabel="network passes")
    axes[2].set(title="straightness (0: straight)")
    axes[0].legend(fontsize=7)
    pictures.save_figure(figure, path, dpi=110)


def plot_strip(pipelines: dict[str, Pipeline], judge: Judge, path: Path):
    """A row a stage and number of steps, a column a class; the same noise everywhere."""
    captions, drawn, beside = judge.captions[:10], [], []
    for name, pipeline in pipelines.items():
        for steps in (1,) if name == "distilled" else (1, 2, 4):
            drawn.append(pipeline.draw(captions, judge.noise[:10], steps=steps, solver="euler"))
            beside.append(f"{name}, {steps} step{'s' * (steps > 1)}")
    pictures.sheet(torch.cat(drawn), len(captions), path, captions, beside, inches=0.85)


# ------------------------------------------------------------------------------------------------
# Ablation: where to train, which error
# ------------------------------------------------------------------------------------------------


def ablate(args: "Settings", folder: Path, judge: Judge) -> pd.DataFrame:
    """One and two Euler steps of second flows that differ in time, loss and seed alone."""
    make_pairs(args, args.run, folder / "pairs", steps=12)
    rows = []
    for where, loss, seed in product(("uniform", "u_shaped"), rf.LOSSES, args.ablate):
        out = folder / "ablate" / f"{where} {loss} {seed}"
        how = (where, "--loss", loss, "--seed", seed, "--sample-steps", 4)
        how += ("--data", folder / "pairs")
        train(args, out, args.ablate_steps, *how, init=("--init", args.run))
        pipeline = Pipeline.open(out, judge.device)
        row = {"time": where, "loss": loss, "seed": seed}
        for n in (1, 2):
            drawn = pipeline.draw(judge.captions, judge.noise, steps=n, solver="euler")
            row[f"recognised_{n}"], row[f"frechet_{n}"] = judge.score(drawn, judge.labels)
        rows.append(row)
    table = pd.DataFrame(rows)
    over_seeds = table.drop(columns="seed").groupby(["time", "loss"], sort=False)
    print(over_seeds.agg(["mean", "std"]).to_string(float_format="{:.3f}".format))
    return table


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Options):
    run: Path = option(None, "a finished run of train_mnist.py", positional=True)
    data_dir: Path = option(Path("data"), "of the real images")
    number: int = option(20_000, "pairs", least=1)
    steps: int = option(8000, "training steps of a stage", least=1)
    time: str = option("u_shaped", "where", choices=rf.TIME_DISTRIBUTIONS)
    loss: str = option("pseudo_huber", "mse or pseudo_huber", choices=rf.LOSSES)
    student: str | None = option(None, "also a smaller flow, say digits-narrow", choices=PRESETS)
    ablate: list[int] = option([], "compare time and loss instead, at these seeds", least=0)
    ablate_steps: int = option(1500, "training steps of each", least=1)
    samples: int = option(1000, "that the CNN reads", least=2)
    cache: Path = option(Path("runs/readers"), "where CNNs are kept")
    seed: int = option(0, "of pairs and training", least=0)
    overwrite: bool = option(False, "begin anew; what is there becomes RUN/reflow.old")
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")


@program("experiments.reflow")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    device, folder = choose_device(args.device), args.run / "reflow"
    begin(device)
    source = read_facts(args.run)["source"]
    judge = Judge(source, args.data_dir, args.cache, args.samples, device)
    if args.overwrite and folder.exists():
        move_away(folder, "experiments.reflow")
    with owned(folder, "experiments.reflow", "RUN/reflow"):
        if args.ablate:
            table, path = ablate(args, folder, judge), folder / "ablate.csv"
        else:
            stages, path = build_stages(args, folder), folder / "reflow.csv"
            pipelines = {name: Pipeline.open(run, device) for name, run in stages.items()}
            table = pd.concat([score_stage(*each, judge) for each in pipelines.items()])
            plot(table, folder / "reflow.png")
            plot_strip(pipelines, judge, folder / "strip.png")
        write_whole(path, table.to_csv(index=False).encode())
    print(f"wrote {path} and what else is in {folder}")


if __name__ == "__main__":
    main()
