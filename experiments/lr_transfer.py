"""One learning rate for every width? Loss against learning rate, a curve a width.

    python -m experiments.lr_transfer                                   glyphs, widths 32 to 256
    python -m experiments.lr_transfer --dataset mnist --seeds 3         or --data-dir DIR
    python -m experiments.lr_transfer --dataset shapes --steps 1000

Left the standard parametrisation, in the middle the maximal-update one (muP, Tensor Programs V,
2203.03466), as in AuraFlow's post, right muP with Muon for the hidden matrices (common/muon.py).
Under muP the best rate of the narrowest network serves all the others; under the standard one the
best rate falls as the network widens. A cell (parametrisation, width, rate, seed) that is in the
CSV is not run again: stop at any time, add seeds, rates or widths, and start once more.
"""

import csv
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import rf
import train_mnist
from common.log import append_row
from common.muon import use_muon
from common.pictures import save_figure
from common.settings import Options, option, parse
from common.start import choose_device, claim, mark, program
from inputs.encoders import Pixels
from inputs.rows import open_rows
from mmdit import PRESETS, MMDiT, MMDiTConfig

PARAMETRIZATIONS = ("standard", "mup", "muon")  # muon: mup, with Muon for the hidden matrices
DATASETS = ("glyphs", "mnist", "shapes")
WIDTHS = [32, 64, 128, 256]
RATES = [0.001 * 2**i for i in range(7)]  # 0.001 … 0.064 at the smallest width
VALIDATION = 512  # held-out rows that are asked, at most

# ------------------------------------------------------------------------------------------------
# Data: the same batches for every width, rate and parametrisation
# ------------------------------------------------------------------------------------------------


class Halves(Pixels):
    """An image encoder: (B, 1, 28, 28) uint8 → (B, 1, 16, 16), the mean of 2 x 2 pixels inside a
    black margin.

    Chapter 1's patch of 7 x 7 holds 49 values, more than the narrowest width could pass on at any
    rate; this is for patches of 4 x 4.
    """

    factor = Fraction(28, 16)

    def encode(self, images: Tensor, vae_noise: Tensor | None = None) -> Tensor:
        return F.avg_pool2d(F.pad(super().encode(images), (2, 2, 2, 2), value=-1.0), 2)


@dataclass(frozen=True)
class Grid(Options):
    """What a grid of small trainings is told."""

    dataset: str = option("glyphs", ", ".join(DATASETS), choices=DATASETS)
    data_dir: Path = option(Path("data"), "where MNIST lies or goes")
    seeds: int = option(1, "runs of each network", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")

    def csv(self, name: str) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        return self.out / f"{name}.csv"


class Data:
    """Rows of digits or shapes, settings of chapter 1's step, and a network that fits them.

    Rows and held-out rows do not depend on a cell's seed.
    """

    def __init__(self, args: Grid):
        name, self.device = args.dataset, choose_device(args.device)
        self.rows = open_rows([name], data_dir=args.data_dir)
        how = {"data": [name], "warmup_steps": 20, "shift": 2.0 if name == "shapes" else 1.0}
        self.settings = train_mnist.Settings(**how, **self.rows.facts)
        self.rows.begin(self.settings, self.device)
        self.config = PRESETS["tiny"]
        if name != "shapes":
            self.rows.image, self.rows.factor = Halves(1), Halves.factor
            self.config = replace(PRESETS["digits"], patch_size=4)
        held, generator = self.rows.held[0], torch.Generator().manual_seed(0)
        asked = min(VALIDATION, len(held.rows))
        batch = self.rows.draw(range(asked), 0, held)
        u, noise = rf.spread(asked, generator), batch.noise.normal_(generator=generator)
        self.held = batch._replace(u=u, noise=noise)


# ------------------------------------------------------------------------------------------------
# One cell
# ------------------------------------------------------------------------------------------------


def train(config: MMDiTConfig, data: Data, parametrization: str = "mup", **how) -> float:
    """Validation loss after so many steps of AdamW, warmed up, then down to 0 in a line.

    how: of train_mnist.Settings: lr, steps, and seed, of weights, noise, time and dropped captions.
    inf if the run diverges: that is an answer too.
    """
    settings, rows, device = replace(data.settings, **how), data.rows, data.device
    torch.manual_seed(settings.seed)
    model = MMDiT(config).to(device)
    # Muon's rate follows AdamW's, as in the trainers' defaults.
    default, muon = train_mnist.Settings, parametrization == "muon"
    groups = model.param_groups(
        settings.lr,
        parametrization="mup" if muon else parametrization,
        muon_lr=settings.lr * default.muon_lr / default.lr if muon else 0,
    )
    adamw = torch.optim.AdamW(groups, betas=train_mnist.BETAS, eps=train_mnist.EPS)
    use_muon(adamw)
    generator = torch.Generator(device)
    for step in range(settings.steps):
        train_mnist.train_step(model, adamw, rows, settings, step, generator)
    states, text, u, noise = rows.encode(data.held, device)
    x, noise, t = rf.line(states, noise, u, shift=settings.shift)
    with torch.no_grad():
        loss = rf.rf_loss(model, x, text, t=t, noise=noise).mean().item()
    return loss if math.isfinite(loss) else math.inf


def remembered(path: Path, key: dict, config: MMDiTConfig, data: Data) -> dict:
    """key and its "loss": from the CSV if it is there, else trained as key says, and appended."""
    wanted = {name: str(value) for name, value in key.items()}
    kept = path.read_text() if path.exists() else ""
    if kept and not kept.endswith("\n"):
        raise ValueError(f"{path} is cut: move it away")
    for row in csv.DictReader(kept.splitlines()):
        if wanted.items() <= row.items() and row["loss"]:
            return key | {"loss": float(row["loss"])}
    how = {name: key[name] for name in ("parametrization", "lr", "steps", "seed") if name in key}
    row = key | {"loss": train(config, data, **how)}
    append_row(path, row)
    return row


# ------------------------------------------------------------------------------------------------
# The grid: a CSV that remembers, a table and a figure
# ------------------------------------------------------------------------------------------------


def plot(means: pd.DataFrame, path: Path):
    """means: losses, a row a parametrisation and width, a column a rate. Stars are the best."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    lowest, label = means.min(axis=None), "learning rate at the first width"
    for axis, name in zip(axes, PARAMETRIZATIONS, strict=True):
        curves = means.loc[name].T
        curves.plot(ax=axis, logx=True, style="o-", colormap="cool", title=name, xlabel=label)
        axis.scatter(curves.idxmin(), curves.min(), 200, "black", marker="*", zorder=3)
    axes[0].set(ylabel="validation loss", ylim=(0.95 * lowest, 2.2 * lowest))
    save_figure(figure, path, dpi=100)


@dataclass(frozen=True)
class Settings(Grid):
    widths: list[int] = option(
        [], "multiples of 32; rates are those of the first (32 to 256)", least=32
    )
    rates: list[float] = option([], "(0.001 to 0.064, by 2)", above=0)
    steps: int = option(400, "steps of each run, batch 64", least=1)
    out: Path = option(Path("runs/lr_transfer"), "folder for CSV and PNG")


@program("experiments.lr_transfer")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, "experiments.lr_transfer")
    path, data, rows = args.csv(f"lr_transfer_{args.dataset}"), Data(args), []
    widths, rates = args.widths or WIDTHS, args.rates or RATES
    cells = list(product(range(args.seeds), widths, PARAMETRIZATIONS, rates))
    mark(args.out, "experiments.lr_transfer")
    for seed, width, name, lr in tqdm(cells, unit="run"):
        key = {"dataset": args.dataset, "steps": args.steps, "parametrization": name}
        key |= {"width": width, "lr": lr, "seed": seed, "base": widths[0], "rows": data.rows.id}
        config = replace(data.config, base_dim=widths[0], dim=width)
        rows.append(remembered(path, key, config, data))
    means = pd.DataFrame(rows).pivot_table("loss", ["parametrization", "width"], "lr")
    print(means.assign(best=means.idxmin(axis=1)).to_string(float_format="{:.4g}".format))
    plot(means, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
