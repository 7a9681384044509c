"""Take a real picture back to its noise, redraw it, and redraw it with other words.

    python -m experiments.edit runs/mnist       digits; the label becomes another one
    python -m experiments.edit runs/shapes      shapes; one colour in the caption becomes another

Inversion runs the flow from t = 0 to t = 1 (rf.invert), reconstruction runs it back. What an exact
solver would return unchanged comes back with an error that tells the solver's order: at equal
numbers of evaluations RF-Solver (2411.04746) beats Euler. (There and back the leading error of an
even order cancels: where steps are short, RF-Solver's falls with the third power of their number,
Heun's, whose last step is Euler's, with the second.) Redrawn from the same noise with other
words and guidance, a picture keeps its style or its layout and changes what the words say.

What comes out, in RUN/edit: edit.csv and edit.png (error against evaluations), strip.png: each
picture, its noise, its reconstruction, its edit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

import rf
from common import pictures
from common.pipeline import Pipeline
from common.settings import Options, option, parse
from common.start import begin, choose_device, claim, mark, program, write_whole
from inputs.digits import load_images
from inputs.shapes import COLORS, Shapes, World

NAME = "experiments.edit"

EVALUATIONS = (10, 20, 40, 80, 160)  # of the model, one way; even, for the solvers that take two
SHOWN = 10

# ------------------------------------------------------------------------------------------------
# Real pictures with their words, and the words of the edit
# ------------------------------------------------------------------------------------------------


def real_digits(name: str, data_dir: Path) -> Iterator:
    """Held-out digits (C, H, W) uint8, their words, and the next class for the edit."""
    _, (images, labels, classes, _) = load_images(name, data_dir)
    for image, label in zip(images, labels, strict=True):
        yield image, classes[label], classes[label + 1 - len(classes)]


def real_shapes(world: World) -> Iterator:
    """Held-out pictures whose caption names a colour, the caption, and one with another colour."""
    for picture, caption in Shapes(world, held=True):
        present = [word for word in caption.split() if word in COLORS]
        if present:
            other = next(color for color in COLORS if color not in present)
            yield torch.from_numpy(picture), caption, caption.replace(present[0], other, 1)


# ------------------------------------------------------------------------------------------------
# Error of there and back
# ------------------------------------------------------------------------------------------------


def errors(model: rf.Model, data: Tensor, text: Tensor, shift: float = 1.0) -> pd.DataFrame:
    """A row a solver and number of evaluations; slope: of log error over log evaluations so far.

    rmse: of all pictures. median: the RMSE of the median picture, which a few bad ones do not move.
    """
    rows = []
    for solver, evaluations in tqdm(list(product(rf.SOLVERS, EVALUATIONS))):
        steps = evaluations if solver == "euler" else evaluations // 2
        how = {"steps": steps, "solver": solver, "shift": shift}
        back = rf.sample(model, rf.invert(model, data, text, **how), text, **how)
        squares = (back - data).square().flatten(1).mean(1)  # (B,)
        rmse, median = float(squares.mean().sqrt()), float(squares.median().sqrt())
        row = {"solver": solver, "steps": steps, "evaluations": evaluations}
        rows.append(row | {"rmse": rmse, "median": median})
    table = pd.DataFrame(rows)
    rise = np.log(table[["rmse", "evaluations"]]).groupby(table.solver).diff()
    table["slope"] = rise.rmse / rise.evaluations
    return table


def plot(table: pd.DataFrame, path: Path):
    curves = table.pivot(index="evaluations", columns="solver", values="rmse")
    axes = curves.plot(loglog=True, style="o-", figsize=(5.6, 3.8))
    for order in (1, 2, 3):
        line = table.rmse[0] * (curves.index / curves.index[0]) ** -order
        axes.plot(curves.index, line, ":", color="0.6", label=f"order {order}")
    axes.set(xlabel="model evaluations, one way", ylabel="RMSE after there and back")
    axes.legend(fontsize=8)
    pictures.save_figure(axes.figure, path, dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Options):
    run: Path = option(None, "of either chapter, on digits or shapes", positional=True)
    data_dir: Path = option(Path("data"), "of the digits")
    number: int = option(100, "pictures", least=1)
    cfg: float = option(2.0, "guidance of the edit", least=-100, most=100)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")


@program(NAME)
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    device, out = choose_device(args.device), args.run / "edit"
    claim(out, NAME, "the folder")
    begin(device)
    pipeline = Pipeline.open(args.run, device)
    model, facts = pipeline.model, pipeline.facts
    if facts["words"]:
        examples = real_digits(facts["source"], args.data_dir)
    elif facts["shapes"]:
        examples = real_shapes(World.of(facts))
    else:
        raise ValueError(f"{args.run} is of neither digits nor shapes: nothing real to edit")
    real, words, edited = map(list, zip(*islice(examples, args.number), strict=True))
    data, text = pipeline.image.encode(torch.stack(real).to(device)), pipeline.features(words)
    table = errors(model, data, text, facts["shift"])
    print(table.to_string(index=False))
    mark(out, NAME)
    write_whole(out / "edit.csv", table.to_csv(index=False).encode())
    plot(table, out / "edit.png")

    data, text, words, edited = (x[:SHOWN] for x in (data, text, words, edited))
    how = {"steps": 25, "solver": "rf_solver", "shift": facts["shift"]}
    noise = rf.invert(model, data, text, **how)
    back = rf.sample(model, noise, text, **how)
    how |= {"null_text": pipeline.features([""]), "cfg": args.cfg}
    other = rf.sample(model, noise, pipeline.features(edited), **how)
    shown = pipeline.image.decode(torch.cat([data, noise / 2, back, other])).cpu()
    above = [*words, *[""] * 2 * len(words), *edited]
    beside = ("real", "its noise", "redrawn", "edited")
    pictures.sheet(shown, len(words), out / "strip.png", above, beside, inches=0.85, wrap=17)
    print(f"wrote {out}/edit.csv, edit.png and strip.png")


if __name__ == "__main__":
    main()
