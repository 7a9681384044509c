"""Take a real picture back to its noise, redraw it, and redraw it with other words.

    python experiments/edit.py runs/mnist       digits; the label becomes another one
    python experiments/edit.py runs/shapes      shapes; one colour in the caption becomes another

Inversion runs the flow from t = 0 to t = 1 (rf.invert), reconstruction runs it back. What an exact
solver would return unchanged comes back with an error that tells the solver's order: at equal
numbers of evaluations RF-Solver (2411.04746) beats Euler. (There and back the leading error of an
even order cancels: where steps are short, RF-Solver's falls with the third power of their number,
Heun's, whose last step is Euler's, with the second.) Redrawn from the same noise with other
words and guidance, a picture keeps its style or its layout and changes what the words say.

What comes out, in RUN/edit: edit.csv and edit.png (error against evaluations), strip.png: each
picture, its noise, its reconstruction, its edit.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules one folder up

import cpu
import rf
import shapes
from data_mnist import load_images, to_bytes, to_unit
from measure import draw_strip
from pairs import Maker, maker_of
from sample_t2i import find_weights
from train_mnist import choose_device

EVALUATIONS = (10, 20, 40, 80, 160)  # of the model, one way; even, for the solvers that take two
SHOWN = 10
COLUMNS = ("solver", "steps", "evaluations", "rmse", "slope")

# ------------------------------------------------------------------------------------------------
# Real pictures with their words, and the words of the edit
# ------------------------------------------------------------------------------------------------


def real_digits(run: dict, data_dir: Path | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """→ held-out images (n, C, H, W) in [−1, 1], their labels, and the next label of each."""
    where = data_dir or run["data_dir"]
    _, held_out = load_images(run["dataset"], where, size=run["size"], seed=run["seed"])
    labels = held_out.labels[:n]
    return to_unit(held_out.images[:n]), labels, (labels + 1) % len(held_out.classes)


def real_shapes(run: dict, n: int) -> tuple[Tensor, list[str], list[str]]:
    """→ held-out pictures whose caption names a colour, the captions, and the edited ones."""
    world = shapes.World(*(run[key] for key in shapes.World._fields))
    source, palette = shapes.Shapes(world, run["seed"], held=True), list(shapes.COLORS)
    pictures, captions, edited, i = [], [], [], 0
    while len(captions) < n:
        picture, caption = source[i]
        words = caption.split()
        there = [w for w in words if w in palette[: world.colors]]
        if there:
            other = next(c for c in palette if c not in there)
            words[words.index(there[0])] = other
            pictures.append(torch.from_numpy(picture))
            captions.append(caption)
            edited.append(" ".join(words))
        i += 1
    return to_unit(torch.stack(pictures)), captions, edited


# ------------------------------------------------------------------------------------------------
# Error of there and back
# ------------------------------------------------------------------------------------------------


def round_trip(maker: Maker, data: Tensor, text: Tensor, solver: str, steps: int) -> Tensor:
    how = {"steps": steps, "solver": solver, "shift": maker.settings["shift"]}
    noise = rf.invert(maker.model, data, text, **how)
    return rf.sample(maker.model, noise, text, **how)


def errors(maker: Maker, data: Tensor, text: Tensor) -> list[tuple]:
    """A row a solver and number of evaluations; slope: of log error over log evaluations so far."""
    rows = []
    for solver in rf.SOLVERS:
        before = None
        for evaluations in tqdm(EVALUATIONS, desc=solver, leave=False):
            steps = evaluations if solver == "euler" else evaluations // 2
            back = round_trip(maker, data, text, solver, steps)
            rmse = float((back - data).square().mean().sqrt())
            slope = float("nan")
            if before is not None:
                slope = float(np.log(rmse / before[1]) / np.log(evaluations / before[0]))
            rows.append((solver, steps, evaluations, rmse, slope))
            before = (evaluations, rmse)
    return rows


# ------------------------------------------------------------------------------------------------
# Plot
# ------------------------------------------------------------------------------------------------


def plot(rows: list[tuple], path: Path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for solver in rf.SOLVERS:
        mine = [row for row in rows if row[0] == solver]
        axes.plot([r[2] for r in mine], [r[3] for r in mine], "o-", label=solver)
    first = rows[0]
    guide = np.array(EVALUATIONS, float)
    for order in (1, 2, 3):
        line = first[3] * (guide / guide[0]) ** -order
        axes.plot(guide, line, ":", color="0.6", label=f"order {order}")
    axes.set(xscale="log", yscale="log", xlabel="model evaluations, one way",
             ylabel="RMSE after there and back")  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "run",
        type=Path,
        metavar="RUN",
        help="of train_mnist.py, or of train_t2i.py on shapes",
    )
    add("--data-dir", type=Path, help="of the digits (default: where the run had it)")
    add("--number", type=int, default=100, help="pictures (default: 100)")
    add("--cfg", type=float, default=2.0, help="guidance of the edit (default: 2)")
    add("--ema", help="which average of a chapter 2 run (default: the narrowest)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    return parser


def edit(args: argparse.Namespace) -> list[tuple]:
    device = choose_device(args.device)
    if args.number < 1:
        raise ValueError(f"--number {args.number} must be at least 1")
    run = json.loads((find_weights(args.run, args.ema) / "config.json").read_text()).get("run", {})
    ours = "text_encoder" not in run or (run["vae"] == "pixels" and run.get("shapes"))
    if not ours or run.get("data"):
        raise ValueError(f"{args.run} is not of shapes in pixels: there are no real ones to edit")
    maker = maker_of(SimpleNamespace(run=args.run, ema=args.ema, prompts=None), device)
    if maker.words == "labels":
        data, words, edited = real_digits(maker.settings, args.data_dir, args.number)
    else:
        data, words, edited = real_shapes(maker.settings, args.number)
    data, text = data.to(device), maker.features(words)
    rows, out = errors(maker, data, text), args.run / "edit"
    out.mkdir(exist_ok=True)
    print(f"{'solver':>10} {'steps':>6} {'evaluations':>12} {'RMSE':>10} {'slope':>7}")
    for solver, steps, evaluations, rmse, slope in rows:
        print(f"{solver:>10} {steps:>6} {evaluations:>12} {rmse:>10.5f} {slope:>7.2f}")
    with open(out / "edit.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    plot(rows, out / "edit.png")

    n = min(SHOWN, args.number)
    how = {"steps": 25, "solver": "rf_solver", "shift": maker.settings["shift"]}
    noise = rf.invert(maker.model, data[:n], text[:n], **how)
    back = rf.sample(maker.model, noise, text[:n], **how)
    other = rf.sample(
        maker.model, noise, maker.features(edited[:n]), null_text=maker.null_text, cfg=args.cfg,
        **how,
    )  # fmt: skip
    stages = {"real": data[:n], "its noise": noise / 2, "redrawn": back, "edited": other}
    lines = [(name, to_bytes(x)) for name, x in stages.items()]
    before, after = ([str(w) for w in plain(some[:n])] for some in (words, edited))
    draw_strip(lines, out / "strip.png", above=before, below=after)
    print(f"wrote {out}/edit.csv, edit.png and strip.png")
    return rows


def plain(words: Tensor | list[str]) -> list:
    return words.tolist() if isinstance(words, Tensor) else words


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    cpu.tune()
    try:
        return edit(args)
    except (ValueError, OSError) as error:
        sys.exit(f"edit.py: {error}")


if __name__ == "__main__":
    main()
