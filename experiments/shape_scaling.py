"""Which shape should a network have? AuraFlow's small-proxy searches, and a scaling law.

    python -m experiments.shape_scaling                       all three, on chapter 2's shapes
    python -m experiments.shape_scaling --searches aspect --seeds 3

blocks    how many of the layers should be double (text and image apart), at equal compute
aspect    wide and short or narrow and long, at equal compute (AuraFlow went "wider, shorter")
scaling   L(N) = L∞ + c·N^(−α), a power law plus constant in the parameters N at equal samples
          (Henighan et al. 2020, 2010.14701): fitted to small networks, it predicts the loss of a
          larger one before that is run

Equal compute: training FLOPs, 3 x forward; a dearer network takes fewer steps. One learning rate
serves all of them, muP scales it with the width. Runs that are in the CSV are not run again.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.pictures import save_figure
from common.settings import option, parse
from common.start import claim, mark, program
from experiments.lr_transfer import DATASETS, Data, Grid, remembered
from mmdit import MMDiT, MMDiTConfig

BASE_WIDTH = 32  # where --lr holds
SEARCHES = {  # the networks of each (width, layers, double blocks); the first sets the compute
    "blocks": [(96, 6, double) for double in range(7)],
    "aspect": [(96, 6, 0), (64, 13, 0), (128, 3, 0), (160, 2, 0), (224, 1, 0)],  # as many weights
    "scaling": [(width, 4, 1) for width in (64, 96, 128, 160, 192, 256)],  # the last is predicted
}


def networks(search: str, data: Data) -> list[MMDiTConfig]:
    base = replace(data.config, base_dim=BASE_WIDTH, mlp_multiple_of=32)
    return [replace(base, dim=w, n_layers=n, n_double_layers=k) for w, n, k in SEARCHES[search]]


def flops(config: MMDiTConfig, data: Data) -> int:
    """Forward FLOPs of one training image."""
    side = config.patch_size * config.max_grid
    return MMDiT(config).flops_per_image(side, side, data.rows.text.tokens)


def measure(search: str, configs: list[MMDiTConfig], data: Data, args) -> pd.DataFrame:
    """The losses of networks, means over the seeds: those in the CSV are read, the others run."""
    rows, path = [], args.csv("shape_scaling")
    budget = args.samples * flops(networks(search, data)[0], data)
    for config, seed in tqdm(list(product(configs, range(args.seeds))), desc=search, unit="run"):
        cost = flops(config, data)
        steps = round(
            (args.samples if search == "scaling" else budget / cost) / data.settings.batch_size
        )
        key = {"search": search, "dataset": args.dataset, "samples": args.samples, "lr": args.lr}
        key |= {"width": config.dim, "layers": config.n_layers, "double": config.n_double_layers}
        key |= {"seed": seed, "parameters": MMDiT(config).n_parameters()}
        key |= {"flops": cost, "steps": steps, "rows": data.rows.id}
        rows.append(remembered(path, key, config, data))
    keys = ["width", "layers", "double", "parameters"]
    return pd.DataFrame(rows).groupby(keys, as_index=False).loss.mean()


def compare(search: str, data: Data, args):
    """blocks or aspect: the losses at equal compute, as a table and a figure."""
    table = measure(search, networks(search, data), data, args)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    table["width / depth"] = table.width / table.layers
    x = "double" if search == "blocks" else "width / depth"
    save(table.plot(x, "loss", style="o-"), args.out / f"{search}.png")


def save(axes, path: Path):
    axes.set_ylabel("validation loss")
    save_figure(axes.figure, path, dpi=100)


def fit(parameters: pd.Series, losses: pd.Series) -> tuple[float, float, float]:
    """(L∞, c, α) of L = L∞ + c·N^(−α), 0 ≤ L∞, by least squares.

    For a given L∞ it is a straight line in the logarithms; L∞ is found on a fine grid.
    """

    def given(constant):
        slope, offset = np.polyfit(np.log(parameters), np.log(losses - constant), 1)
        error = constant + np.exp(offset) * parameters**slope - losses
        return (error**2).sum(), constant, np.exp(offset), -slope

    return min(map(given, np.linspace(0, min(losses), 1000, endpoint=False)))[1:]


def extrapolate(data: Data, args):
    """scaling: fit the small networks, predict the large one, then run it."""
    *small, large = networks("scaling", data)
    table = measure("scaling", small, data, args)
    constant, c, alpha = fit(table.parameters, table.loss)
    print(f"L(N) = {constant:.4f} + {c:.4g} N^-{alpha:.3f}")
    N = MMDiT(large).n_parameters()
    predicted = constant + c * N**-alpha
    print(f"predicted for width {large.dim}, {N:,} parameters: {predicted:.4f}", flush=True)
    measured = measure("scaling", [large], data, args).loss[0]
    print(f"measured: {measured:.4f}, {100 * (measured / predicted - 1):+.1f} % of the prediction")
    axes = table.plot("parameters", "loss", style="o", logx=True, label="measured")
    line = np.geomspace(table.parameters[0], N, 100)
    axes.plot(line, constant + c * line**-alpha, "--", color="gray", label="fitted to the dots")
    axes.plot(N, measured, "*", markersize=14, label="measured after the prediction")
    axes.legend()
    save(axes, args.out / "scaling.png")


@dataclass(frozen=True)
class Settings(Grid):
    searches: list[str] = option(list(SEARCHES), "which", choices=SEARCHES)
    dataset: str = option("shapes", "shapes, mnist or glyphs", choices=DATASETS)
    samples: int = option(16_000, "of a search's first network", least=1)
    lr: float = option(0.016, f"at width {BASE_WIDTH}", above=0)
    out: Path = option(Path("runs/shape_scaling"), "folder for CSV and PNGs")


@program("experiments.shape_scaling")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, "experiments.shape_scaling")
    data = Data(args)
    mark(args.out, "experiments.shape_scaling")
    for search in args.searches:
        extrapolate(data, args) if search == "scaling" else compare(search, data, args)
    print(f"wrote shape_scaling.csv and the figures in {args.out}")


if __name__ == "__main__":
    main()
