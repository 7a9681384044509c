"""One learning rate for every width? Loss against learning rate, a curve a width.

    python experiments/lr_transfer.py                                   glyphs, widths 32 to 256
    python experiments/lr_transfer.py --dataset mnist --seeds 3         or --data-dir DIR
    python experiments/lr_transfer.py --dataset shapes --steps 1000

Left the standard parametrisation, right the maximal-update one (muP, Tensor Programs V,
2203.03466), as in AuraFlow's post. Under muP the best rate of the narrowest network is the best
one of all; under the standard one it falls as the network widens. A cell (parametrisation, width,
rate, seed) that is in the CSV is not run again: stop at any time, add seeds, rates or widths, and
start once more.
"""

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rf
import shapes
from data_mnist import Batches, OneHotText, load_images, to_unit
from data_t2i import Samples, Shuffled, encode
from encoders import HashText, Pixels
from mmdit import PRESETS, MMDiT, MMDiTConfig
from train_mnist import choose_device

PARAMETRIZATIONS = ("standard", "mup")
RATES = [0.001 * 2**i for i in range(7)]  # 0.001 … 0.064 at the smallest width
BATCH, WARMUP, VALIDATION = 64, 20, 512
WORLD = shapes.World(20, 4, 6, 10)  # the tiny recipe's


class Cell(NamedTuple):
    """One run of the grid. lr is the rate at the smallest width: of all widths under standard."""

    dataset: str
    steps: int
    parametrization: str
    width: int
    lr: float
    seed: int


# ------------------------------------------------------------------------------------------------
# Data: the same batches for every width, rate and parametrisation
# ------------------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # data, text, t, noise


class Digits:
    """MNIST or glyphs at 16 x 16, and chapter 1's network on patches of 4 x 4.

    A patch of 7 x 7 would hold 49 values, more than the narrowest width: it could not pass them on
    at any rate.
    """

    text_tokens = 1

    def __init__(self, name: str, data_dir: Path, device: torch.device):
        self.training, self.held_out = load_images(name, data_dir, size=28, seed=0)
        self.text, self.device = OneHotText(len(self.training.classes), device), device
        classes = len(self.training.classes)
        self.config = replace(PRESETS["digits"], patch_size=4, text_dim=classes + 1)

    def batches(self, seed: int) -> Iterator[Batch]:
        batches = Batches(
            self.training, BATCH, seed=seed, flip=False, dropout=0.1, device=self.device
        )
        step = 0
        while True:
            batch, step = batches[step], step + 1
            draw = {"generator": batch.generator, "device": self.device}
            t = rf.sample_time(BATCH, stratified=True, **draw)
            data = half(batch.data)
            yield data, self.text(batch.labels), t, torch.randn(data.shape, **draw)

    @cached_property
    def validation(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        data = half(to_unit(self.held_out.images[:VALIDATION]))
        t = rf.sample_time(len(data), stratified=True, generator=generator)
        noise = torch.randn(data.shape, generator=generator)
        text = self.text(self.held_out.labels[:VALIDATION].to(self.device))
        return data.to(self.device), text, t.to(self.device), noise.to(self.device)


def half(images: Tensor) -> Tensor:
    """(B, 1, 28, 28) → (B, 1, 16, 16): a black margin of 2 pixels, then the mean of 2 x 2."""
    return F.avg_pool2d(F.pad(images, (2, 2, 2, 2), value=-1.0), 2)


class Scenes:
    """Chapter 2's world and network, in the tiny recipe's size."""

    text_tokens = shapes.MAX_WORDS

    def __init__(self, device: torch.device):
        self.text, self.device = HashText(tokens=self.text_tokens), device
        self.config = PRESETS["tiny"]

    def _encoded(self, samples: Samples, positions: range) -> Batch:
        return encode(samples.__getitems__(list(positions)), Pixels(), self.text, self.device)

    def batches(self, seed: int) -> Iterator[Batch]:
        samples, seen = (
            Samples(Shuffled(shapes.Shapes(WORLD, seed), seed), self.text, seed=seed, shift=2.0),
            0,
        )
        while True:
            yield self._encoded(samples, range(seen, seen + BATCH))
            seen += BATCH

    @cached_property
    def validation(self) -> Batch:
        source = shapes.Shapes(WORLD, 0, held=True)
        samples = Samples(Shuffled(source, 0), self.text, seed=0, shift=2.0, dropout=0.0)
        return self._encoded(samples, range(VALIDATION))


def dataset(name: str, data_dir: Path, device: torch.device) -> Digits | Scenes:
    return Scenes(device) if name == "shapes" else Digits(name, data_dir, device)


# ------------------------------------------------------------------------------------------------
# One cell
# ------------------------------------------------------------------------------------------------


def train(
    config: MMDiTConfig, data: Digits | Scenes, *, lr: float, steps: int, seed: int = 0,
    parametrization: str = "mup",
) -> float:  # fmt: skip
    """Validation loss after `steps` steps of AdamW, warmed up, then down to 0 in a line.

    inf if the run diverges: that is an answer too.
    """
    torch.manual_seed(seed)
    model = MMDiT(config).to(data.device)
    groups = model.param_groups(lr, parametrization=parametrization)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1) * (1 - step / steps)
    )
    batches = data.batches(seed)
    for _ in range(steps):
        x, text, t, noise = next(batches)
        rf.rf_loss(model, x, text, t=t, noise=noise).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    x, text, t, noise = data.validation
    with torch.no_grad():
        loss = rf.rf_loss(model, x, text, t=t, noise=noise).mean().item()
    return loss if math.isfinite(loss) else math.inf


# ------------------------------------------------------------------------------------------------
# The grid: a CSV that remembers, a table and a figure
# ------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[Cell, float]:
    """The cells that are done and their losses; none if there is no file."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {
            Cell(r["dataset"], int(r["steps"]), r["parametrization"], int(r["width"]),
                 float(r["lr"]), int(r["seed"])): float(r["loss"])
            for r in csv.DictReader(file)
        }  # fmt: skip


def append(path: Path, cell: Cell, loss: float):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([*Cell._fields, "loss"])
        writer.writerow([*cell, loss])


def curve(losses: dict[Cell, float], parametrization: str, width: int) -> dict[float, float]:
    """lr → mean loss over seeds."""
    cells = {}
    for cell, loss in losses.items():
        if (cell.parametrization, cell.width) == (parametrization, width):
            cells.setdefault(cell.lr, []).append(loss)
    return {lr: sum(cells[lr]) / len(cells[lr]) for lr in sorted(cells)}


def best(means: dict[float, float]) -> tuple[float, float]:
    """The learning rate of the lowest loss, and that loss."""
    return min(means.items(), key=lambda pair: pair[1])


def plot(losses: dict[Cell, float], widths: list[int], path: Path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = ("standard parametrisation", "muP")
    for axis, name, title in zip(axes, PARAMETRIZATIONS, titles, strict=True):
        for i, width in enumerate(widths):
            means = curve(losses, name, width)
            color = plt.get_cmap("viridis")(0.9 * i / max(1, len(widths) - 1))
            axis.plot(list(means), list(means.values()), "o-", color=color, label=f"width {width}")
            axis.plot(*best(means), "*", color=color, markersize=16)
        where = "" if name == "standard" else f" at width {widths[0]}"
        axis.set(xscale="log", xlabel=f"learning rate{where}", title=title)
    lowest = min(losses.values())
    axes[0].set(ylabel="validation loss", ylim=(0.95 * lowest, 2.2 * lowest))
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="glyphs", choices=["glyphs", "mnist", "shapes"])
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST lies or goes")
    add("--widths", type=int, nargs="+", default=[32, 64, 128, 256],
        help="multiples of 32; rates are those of the first (default: 32 64 128 256)")  # fmt: skip
    add("--rates", type=float, nargs="+", default=RATES, help="(default: 0.001 to 0.064, by 2)")
    add("--steps", type=int, default=400, help="steps of each run, batch 64 (default: 400)")
    add("--seeds", type=int, default=1, help="runs of each cell (default: 1)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    add("--out", type=Path, default=Path("runs/lr_transfer"), help="folder for CSV and PNG")
    return parser


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    data = dataset(args.dataset, args.data_dir, choose_device(args.device))
    base = replace(data.config, base_dim=args.widths[0])
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"lr_transfer_{args.dataset}.csv"
    done = read(path)
    cells = [
        Cell(args.dataset, args.steps, name, width, lr, seed)
        for seed in range(args.seeds)
        for width in args.widths
        for name in PARAMETRIZATIONS
        for lr in args.rates
    ]
    todo = [cell for cell in cells if cell not in done]
    work = [20_000 + cell.width**2 for cell in todo]  # so that the time left is about right
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=sum(work), desc="grid", bar_format=form) as bar:
        for cell, share in zip(todo, work, strict=True):
            done[cell] = train(
                replace(base, dim=cell.width), data, lr=cell.lr, steps=cell.steps, seed=cell.seed,
                parametrization=cell.parametrization,
            )  # fmt: skip
            append(path, cell, done[cell])
            bar.set_postfix_str(
                f"{cell.parametrization} width {cell.width} lr {cell.lr:.3g}: {done[cell]:.4f}"
            )
            bar.update(share)
    losses = {cell: done[cell] for cell in cells}
    print("parametrisation  width  best rate    loss   loss at the first width's best rate")
    for name in PARAMETRIZATIONS:
        first = best(curve(losses, name, args.widths[0]))[0]
        for width in args.widths:
            means = curve(losses, name, width)
            rate, loss = best(means)
            print(f"{name:15} {width:6} {rate:10.4g} {loss:7.4f} {means[first]:9.4f}")
    plot(losses, args.widths, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"lr_transfer.py: {error}")
