"""Straight paths: from many steps to one, on chapter 1's digits.

    python train_mnist.py && python experiments/reflow.py runs/mnist

    first      the run itself, guided
    second     trained on the first one's pairs (pairs.py): straighter paths, guidance folded in
    distilled  trained on the second one's pairs, only where the walk begins: one step
    student    --student: a narrower second flow from scratch, its start annealed (SlimFlow)

Then each is read by digit_score.py's CNN at few and many evaluations, by every solver, with
adaptive RK45 as the reference (if scipy is there). What comes out, in RUN/reflow: the stages' runs,
reflow.csv, reflow.png (quality and straightness), strip.png (1, 2 and 4 steps of each stage). Every
stage goes on where it was stopped. --ablate SEEDS instead compares uniform with U-shaped time and
squared error with pseudo-Huber (RF++, 2405.20320), a row a seed, in ablate.csv.
"""

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from digit_score import frechet_distance, n_unseen, read, reader_for, shuffled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules one folder up

import cpu
import pairs
import rf
import train_mnist
from data_mnist import OneHotText, load_images, to_bytes
from measure import draw_strip
from mmdit import MMDiT, load_model

EVALUATIONS = (1, 2, 4, 8, 16, 32)
COLUMNS = (
    "stage", "solver", "steps", "passes", "recognised", "frechet", "frechet_ratio", "straightness",
)  # fmt: skip
ABLATE_COLUMNS = ("time", "loss", "seed", "recognised_1", "frechet_1", "recognised_2", "frechet_2")
STRAIGHT = 200  # samples for the straightness
CHECKED = ("steps", "time", "loss", "seed", "anneal", "preset", "pairs_id")  # of a begun stage

# ------------------------------------------------------------------------------------------------
# The stages
# ------------------------------------------------------------------------------------------------


def make_pairs(args: argparse.Namespace, run: Path, out: Path, steps: int):
    print(f"{out.name}: {args.number} pairs of {run}", flush=True)
    options = [run, "--out", out, "--number", args.number, "--steps", steps]
    options += ["--seed", args.seed, "--device", args.device]
    pairs.launch(pairs.build_parser().parse_args([str(x) for x in options]))


def train(args: argparse.Namespace, out: Path, steps: int, **options):
    """An ordinary run of train_mnist.py on pairs: a stopped one goes on, a finished one stays."""
    told = {"out": out, "steps": steps, "device": args.device} | options
    told |= {"data_dir": args.data_dir} if args.data_dir else {}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = train_mnist.load_checkpoint(checkpoint)
        begun, asked = state["settings"], told | {"pairs_id": pairs.Pairs(told["pairs"]).id}
        differs = [f"{k} {begun[k]} there, {asked[k]} here" for k in CHECKED
                   if k in asked and begun[k] != asked[k]]  # fmt: skip
        if differs:
            raise ValueError(f"{out} was begun otherwise ({'; '.join(differs)}): add --overwrite")
        if state["step"] == steps and (out / "model.safetensors").exists():
            return
        told.pop("init", None)  # the checkpoint is further
    print(f"{out.name}: {steps} steps", flush=True)
    words = [w for k, v in told.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words += ["--resume" if checkpoint.exists() else "--overwrite"]
    run = train_mnist.launch(train_mnist.build_parser().parse_args(words))
    if run.step < steps:
        raise KeyboardInterrupt  # it has saved and ended its pictures; what follows needs it whole


def build_stages(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """name → the folder of its run; made where it is missing."""
    first = args.run
    make_pairs(args, first, folder / "pairs", steps=12)
    how = {"loss": args.loss, "seed": args.seed}
    second = {"pairs": folder / "pairs", "time": args.time, "sample_steps": 4} | how
    train(args, folder / "second", args.steps, init=first, **second)
    make_pairs(args, folder / "second", folder / "pairs2", steps=8)
    one = {"pairs": folder / "pairs2", "time": "start", "sample_steps": 1} | how
    train(args, folder / "distilled", args.steps, init=folder / "second", **one)
    stages = {"first": first, "second": folder / "second", "distilled": folder / "distilled"}
    if args.student:
        narrow = {"preset": args.student, "anneal": 0.3} | second
        train(args, folder / "student", 2 * args.steps, **narrow)
        stages["student"] = folder / "student"
    return stages


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


class Judge:
    """The reader, the real features it is held against, and the fixed noise and labels it asks."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        run = json.loads((args.run / "config.json").read_text())["run"]
        training, test = load_images(
            run["dataset"], args.data_dir or run["data_dir"], size=run["size"], seed=run["seed"]
        )
        self.device, self.reader = device, reader_for(training, args.cache, device)
        self.features, _ = read(self.reader, test.images, device)
        unseen = shuffled(training)[: min(n_unseen(training), args.samples)]
        real, _ = read(self.reader, training.images[unseen], device)
        self.real = frechet_distance(real, self.features)
        self.text = OneHotText(len(training.classes), device)
        self.labels = torch.arange(args.samples) % self.text.null
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(args.samples, *test.images.shape[1:], generator=generator)

    def ask(self, walk: Callable) -> tuple[float, float, float]:
        """walk(noise, text) → samples: share recognised, Fréchet distance, over the real one."""
        parts = [
            walk(e.to(self.device), self.text(y.to(self.device))).cpu()
            for e, y in zip(self.noise.split(128), self.labels.split(128), strict=True)
        ]
        features, classes = read(self.reader, to_bytes(torch.cat(parts)), self.device)
        distance = frechet_distance(features, self.features)
        recognised = (classes == self.labels).double().mean().item()
        return recognised, distance, distance / self.real


class Walker(NamedTuple):
    """A stage's model and how it is sampled."""

    model: MMDiT
    null_text: Tensor
    cfg: float
    shift: float

    def __call__(self, noise: Tensor, text: Tensor, solver: str, steps: int) -> Tensor:
        return rf.sample(
            self.model, noise, text, null_text=self.null_text, cfg=self.cfg, shift=self.shift,
            solver=solver, steps=steps,
        )  # fmt: skip

    @torch.no_grad()
    def rk45(self, noise: Tensor, text: Tensor) -> tuple[Tensor, int]:
        """Adaptive Runge-Kutta on the whole batch at once (scipy), and its evaluations."""
        from scipy.integrate import solve_ivp

        def slope(t: float, flat: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(flat).float().view(noise.shape).to(noise.device)
            times = torch.full((len(x),), t, device=x.device)
            v = rf.guided_velocity(self.model, x, times, text, self.null_text, self.cfg)
            return v.flatten().double().cpu().numpy()

        start = noise.flatten().double().cpu().numpy()
        found = solve_ivp(slope, (1.0, 0.0), start, rtol=1e-3, atol=1e-3)
        return torch.from_numpy(found.y[:, -1]).float().view(noise.shape), found.nfev


def walker_of(folder: Path, judge: Judge) -> Walker:
    run = json.loads((folder / "config.json").read_text())["run"]
    model = load_model(folder, judge.device)
    return Walker(model, judge.text.null_text, run["cfg"], run["shift"])


def score_stage(name: str, folder: Path, judge: Judge) -> list[tuple]:
    """A row a solver and number of evaluations. The distilled flow is a map for one step alone."""
    walker = walker_of(folder, judge)
    guided = 1 if walker.cfg == 1 else 2  # network passes of an evaluation
    if name == "distilled":
        return [(name, "euler", 1, 1, *judge.ask(partial(walker, solver="euler", steps=1)), "")]
    few = slice(0, STRAIGHT)
    bend = rf.straightness(
        walker.model, judge.noise[few].to(judge.device),
        judge.text(judge.labels[few].to(judge.device)), null_text=walker.null_text,
        cfg=walker.cfg, steps=50,
    ).mean().item()  # fmt: skip
    rows = []
    for solver, evaluations in product(rf.SOLVERS, EVALUATIONS):
        if solver != "euler" and evaluations == 1:
            continue
        steps = evaluations if solver == "euler" else evaluations // 2
        used = 2 * steps - 1 if solver == "heun" else evaluations
        found = judge.ask(partial(walker, solver=solver, steps=steps))
        rows.append((name, solver, steps, guided * used, *found, bend))
    if find_spec("scipy") is None:
        print("no RK45: pip install scipy")
        return rows
    used = []

    def reference(noise: Tensor, text: Tensor) -> Tensor:
        x, evaluations = walker.rk45(noise, text)
        used.append(evaluations)
        return x

    found = judge.ask(reference)
    rows.append((name, "rk45", "", guided * round(np.mean(used)), *found, bend))
    return rows


# ------------------------------------------------------------------------------------------------
# Table and pictures
# ------------------------------------------------------------------------------------------------


def show(rows: list[tuple]):
    for row in rows:
        stage, solver, steps, passes, recognised, distance, ratio, bend = row
        bend = f"{bend:.2f}" if bend != "" else ""
        print(
            f"{stage:>10} {solver:>10} {steps!s:>10} {passes:>10} {recognised:>10.1%}"
            f" {distance:>10.2f} {ratio:>13.2f} {bend:>12}", flush=True
        )  # fmt: skip


def plot(rows: list[tuple], path: Path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    stages = list(dict.fromkeys(row[0] for row in rows))
    for k, stage in enumerate(stages):
        for solver, style in {"euler": "o-", "rf_solver": "s:"}.items():
            mine = [row for row in rows if row[:2] == (stage, solver)]
            passes = [row[3] for row in mine]
            for axis, column, scale in ((axes[0], 4, 100), (axes[1], 5, 1)) if mine else ():
                axis.plot(passes, [scale * row[column] for row in mine], style, color=f"C{k}",
                          ms=4, label=f"{stage}, {solver}")  # fmt: skip
        for row in (row for row in rows if row[:2] == (stage, "rk45")):
            for axis, column, scale in ((axes[0], 4, 100), (axes[1], 5, 1)):
                axis.plot(row[3], scale * row[column], "*", color=f"C{k}", ms=10)
    axes[0].set(ylabel="recognised (%)", xscale="log", xlabel="network passes a sample (★ RK45)")
    axes[1].set(ylabel="Fréchet distance", xscale="log", yscale="log",
                xlabel="network passes a sample (★ RK45)")  # fmt: skip
    axes[0].legend(fontsize=7)
    bends = {row[0]: (row[7], f"C{stages.index(row[0])}") for row in rows if row[7] != ""}
    bars = axes[2].bar(
        list(bends), [b for b, _ in bends.values()], color=[c for _, c in bends.values()]
    )
    axes[2].bar_label(bars, fmt="%.1f", fontsize=8)
    axes[2].set(title="straightness (0: straight)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_strip(stages: dict[str, Path], judge: Judge, path: Path):
    """A row a stage and number of steps, a column a class; the same noise everywhere."""
    n = min(10, judge.text.null)
    noise, text = judge.noise[:n].to(judge.device), judge.text(judge.labels[:n].to(judge.device))
    lines = [
        (f"{name}, {steps} step{'s' * (steps > 1)}",
         to_bytes(walker_of(folder, judge)(noise, text, "euler", steps)))
        for name, folder in stages.items()
        for steps in ((1,) if name == "distilled" else (1, 2, 4))
    ]  # fmt: skip
    draw_strip(lines, path)


def write(path: Path, columns: tuple[str, ...], rows: list[tuple]):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    print(f"wrote {path}", flush=True)


# ------------------------------------------------------------------------------------------------
# Ablation: where to train, which error
# ------------------------------------------------------------------------------------------------


def ablate(args: argparse.Namespace, folder: Path, judge: Judge) -> list[tuple]:
    """One and two Euler steps of second flows that differ in time, loss and seed alone."""
    make_pairs(args, args.run, folder / "pairs", steps=12)
    rows = []
    for where, loss, seed in product(("uniform", "u_shaped"), rf.LOSSES, args.ablate):
        out = folder / "ablate" / f"{where} {loss} {seed}"
        how = {"time": where, "loss": loss, "seed": seed, "sample_steps": 4}
        train(args, out, args.ablate_steps, pairs=folder / "pairs", init=args.run, **how)
        walker = walker_of(out, judge)
        found = []
        for steps in (1, 2):
            found += judge.ask(partial(walker, solver="euler", steps=steps))[:2]
        rows.append((where, loss, seed, *found))
        print("  ".join(str(x) for x in rows[-1]), flush=True)
    for where, loss in product(("uniform", "u_shaped"), rf.LOSSES):
        mine = np.array([row[3:] for row in rows if row[:2] == (where, loss)])
        mean, spread = mine.mean(0), mine.std(0, ddof=1) if len(mine) > 1 else mine[0] * 0
        cells = (f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
        print(f"{where:>10} {loss:>13} {'  '.join(cells)}")
    return rows


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a finished run of train_mnist.py")
    add("--data-dir", type=Path, help="of the images (default: where the run had them)")
    add("--number", type=int, default=20_000, help="pairs (default: 20000)")
    add("--steps", type=int, default=8000, help="training steps of a stage (default: 8000)")
    add("--time", default="u_shaped", choices=rf.TIME_DISTRIBUTIONS, help="(default: u_shaped)")
    add("--loss", default="pseudo_huber", choices=rf.LOSSES, help="(default: pseudo_huber)")
    add("--student", metavar="PRESET", help="also a smaller flow, say digits-narrow")
    add("--ablate", type=int, nargs="+", metavar="SEED", help="compare time and loss instead")
    add("--ablate-steps", type=int, default=1500, help="training steps of each (default: 1500)")
    add("--samples", type=int, default=1000, help="that the CNN reads (default: 1000)")
    add("--cache", type=Path, default=Path("runs/readers"), help="where CNNs are kept")
    add("--seed", type=int, default=0, help="of pairs and training (default: 0)")
    add("--overwrite", action="store_true", help="begin anew: delete RUN/reflow")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    return parser


def launch(args: argparse.Namespace) -> list[tuple]:
    started, device = time.time(), train_mnist.choose_device(args.device)
    if not (args.run / "model.safetensors").is_file():
        raise FileNotFoundError(f"{args.run} holds no finished run: python train_mnist.py")
    if "dataset" not in json.loads((args.run / "config.json").read_text()).get("run", {}):
        raise ValueError(f"{args.run} is no run of train_mnist.py")
    if args.samples < 2:
        raise ValueError(f"--samples {args.samples} must be at least 2")
    folder = args.run / "reflow"
    if args.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    judge = Judge(args, device)
    if args.ablate:
        rows = ablate(args, folder, judge)
        write(folder / "ablate.csv", ABLATE_COLUMNS, rows)
        return rows
    stages, rows = build_stages(args, folder), []
    print(" ".join(f"{c:>10}" for c in COLUMNS), flush=True)
    for name, path in stages.items():
        found = score_stage(name, path, judge)
        show(found)
        rows += found
    write(folder / "reflow.csv", COLUMNS, rows)
    plot(rows, folder / "reflow.png")
    plot_strip(stages, judge, folder / "strip.png")
    print(f"wrote {folder}/reflow.png and strip.png ({time.time() - started:.0f} s)")
    return rows


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    cpu.tune()
    try:
        return launch(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"reflow.py: {error}")
    except KeyboardInterrupt:
        sys.exit("reflow.py: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
