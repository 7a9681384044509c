"""Which shape should a network have? AuraFlow's small-proxy searches, and a scaling law.

    python experiments/shape_scaling.py                    all three, on chapter 2's shapes
    python experiments/shape_scaling.py aspect --seeds 3   one of them: blocks, aspect or scaling

blocks    how many of the layers should be double (text and image apart), at equal compute
aspect    wide and short or narrow and long, at equal compute (AuraFlow went "wider, shorter")
scaling   L(N) = L∞ + c·N^(−α), a power law plus constant in the parameters N at equal samples
          (Henighan et al. 2020, 2010.14701): fitted to small networks, it predicts the loss of a
          larger one before that is run

Equal compute: training FLOPs, 3 x forward; a dearer network takes fewer steps. One learning rate
serves all of them, muP scales it with the width. Runs that are in the CSV are not run again.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from lr_transfer import BATCH, dataset, train
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdit import MMDiT, MMDiTConfig
from train_mnist import choose_device

SEARCHES = ("blocks", "aspect", "scaling")
COLUMNS = ("search", "dataset", "samples", "lr", "width", "layers", "double", "seed", "parameters",
           "flops", "steps", "loss")  # fmt: skip
BASE_WIDTH = 32  # where --lr holds
DEPTH, WIDTH = 6, 96  # of the equal-compute searches' first network, whose compute the others get
ASPECTS = (
    (64, 13),
    (96, 6),
    (128, 3),
    (160, 2),
    (224, 1),
)  # width, single blocks: about as many weights
SIZES = (64, 96, 128, 160, 192)  # widths to fit; parameters grow as the square
HELD_OUT = 256  # the width whose loss is predicted, then measured


def shapes_of(search: str, data) -> list[MMDiTConfig]:
    """The networks of a search, the one that sets the compute first."""
    base = replace(data.config, base_dim=BASE_WIDTH, mlp_multiple_of=32)
    if search == "blocks":
        doubles = range(DEPTH + 1)
        return [replace(base, dim=WIDTH, n_layers=DEPTH, n_double_layers=n) for n in doubles]
    if search == "aspect":
        shapes = sorted(ASPECTS, key=lambda shape: shape != (WIDTH, DEPTH))
        return [replace(base, dim=w, n_layers=n, n_double_layers=0) for w, n in shapes]
    return [replace(base, dim=w, n_layers=4, n_double_layers=1) for w in (*SIZES, HELD_OUT)]


def flops(config: MMDiTConfig, data) -> int:
    """Forward FLOPs of one training image."""
    side = config.patch_size * config.max_grid
    return MMDiT(config).flops_per_image(side, side, data.text_tokens)


def fit(parameters: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """(L∞, c, α) of L = L∞ + c·N^(−α) by least squares, L∞ ≥ 0, c ≥ 0, α in 0.02 … 2.

    For a given α the rest is linear; α is found on a fine grid.
    """
    N = parameters / parameters.min()  # so that c is of the size of a loss

    def given(alpha: float) -> tuple[float, float, float]:
        design = np.stack([np.ones_like(N), N**-alpha], axis=1)
        (constant, c), *_ = np.linalg.lstsq(design, losses, rcond=None)
        if constant < 0:  # then the best allowed is without a constant
            constant, c = 0.0, (losses @ design[:, 1]) / (design[:, 1] @ design[:, 1])
        elif c < 0:
            constant, c = losses.mean(), 0.0
        error = ((constant + c * design[:, 1] - losses) ** 2).sum()
        return error, constant, c

    alphas = np.geomspace(0.02, 2, 400)
    alpha = min(alphas, key=lambda a: given(a)[0])
    _, constant, c = given(alpha)
    return float(constant), float(c * parameters.min() ** alpha), float(alpha)


def read(path: Path) -> dict[tuple, dict]:
    """The first eight columns → row, of the runs that are done."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in COLUMNS[:8]): row for row in csv.DictReader(file)}


class Search:
    """The runs of one search: those in the CSV are read, the others made and appended."""

    def __init__(self, name: str, data, args: argparse.Namespace):
        self.name, self.data, self.args = name, data, args
        self.path = args.out / "shape_scaling.csv"
        self.done = read(self.path)
        configs = shapes_of(name, data)
        self.budget = args.samples * flops(configs[0], data)
        self.bar = tqdm(total=len(configs) * args.seeds, desc=name, unit="run")

    def loss(self, config: MMDiTConfig) -> float:
        """Mean over the seeds."""
        return float(np.mean([self._run(config, seed) for seed in range(self.args.seeds)]))

    def _run(self, config: MMDiTConfig, seed: int) -> float:
        args, cost = self.args, flops(config, self.data)
        samples = args.samples if self.name == "scaling" else self.budget / cost
        steps = round(samples / BATCH)
        key = (self.name, args.dataset, args.samples, args.lr, config.dim, config.n_layers,
               config.n_double_layers, seed)  # fmt: skip
        found = self.done.get(tuple(map(str, key)))
        if found is None:
            loss = train(config, self.data, lr=args.lr, steps=steps, seed=seed)
            row = (*key, MMDiT(config).n_parameters(), cost, steps, loss)
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerows([COLUMNS, row] if new else [row])
        else:
            loss = float(found["loss"])
        self.bar.update()
        return loss


def compare(search: Search):
    """blocks or aspect: the losses at equal compute, as a table and a figure."""
    import matplotlib.pyplot as plt

    configs = sorted(shapes_of(search.name, search.data), key=lambda c: (c.dim, c.n_double_layers))
    losses = [search.loss(config) for config in configs]
    search.bar.close()
    print("width  layers  double  parameters   loss")
    for config, loss in zip(configs, losses, strict=True):
        print(f"{config.dim:5} {config.n_layers:7} {config.n_double_layers:7}"
              f" {MMDiT(config).n_parameters():11,} {loss:7.4f}")  # fmt: skip
    if search.name == "blocks":
        x, label = [c.n_double_layers for c in configs], f"double blocks among {DEPTH}"
    else:
        x, label = [c.dim / c.n_layers for c in configs], "width / depth"
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.plot(x, losses, "o-")
    axis.set(xlabel=label, ylabel="validation loss at equal compute",
             xscale="linear" if search.name == "blocks" else "log")  # fmt: skip
    figure.savefig(search.args.out / f"{search.name}.png", dpi=100)
    plt.close(figure)


def extrapolate(search: Search):
    """scaling: fit the small networks, predict the large one, then run it."""
    import matplotlib.pyplot as plt

    *small, large = shapes_of("scaling", search.data)
    N = np.array([MMDiT(config).n_parameters() for config in (*small, large)], dtype=float)
    losses = np.array([search.loss(config) for config in small])
    constant, c, alpha = fit(N[:-1], losses)
    predicted = constant + c * N[-1] ** -alpha
    search.bar.write(f"L(N) = {constant:.4f} + {c:.4g} N^-{alpha:.3f}")
    search.bar.write(f"predicted for width {large.dim}, {N[-1]:,.0f} parameters: {predicted:.4f}")
    measured = search.loss(large)
    search.bar.close()
    print(f"measured: {measured:.4f}, {100 * (measured / predicted - 1):+.1f} % of the prediction")
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    line = np.geomspace(N[0], N[-1], 100)
    axis.plot(line, constant + c * line**-alpha, "--", color="gray", label="fitted to the dots")
    axis.plot(N[:-1], losses, "o", label="measured")
    axis.plot(N[-1], measured, "*", markersize=14, label="measured after the prediction")
    axis.set(xscale="log", xlabel="parameters", ylabel="validation loss at equal samples")
    axis.legend()
    figure.savefig(search.args.out / "scaling.png", dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("search", nargs="*", help=f"{', '.join(SEARCHES)} (default: all)")
    add("--dataset", default="shapes", choices=["shapes", "mnist", "glyphs"])
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST lies or goes")
    add("--samples", type=int, default=16_000, help="of a search's first network (default: 16000)")
    add("--lr", type=float, default=0.016, help=f"at width {BASE_WIDTH} (default: 0.016)")
    add("--seeds", type=int, default=1, help="runs of each network (default: 1)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    add("--out", type=Path, default=Path("runs/shape_scaling"), help="folder for CSV and PNGs")
    args = parser.parse_args(argv)
    for name in args.search:
        if name not in SEARCHES:
            parser.error(f"{name!r} must be one of {', '.join(SEARCHES)}")
    data = dataset(args.dataset, args.data_dir, choose_device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.search or SEARCHES:
        search = Search(name, data, args)
        extrapolate(search) if name == "scaling" else compare(search)
    print(f"wrote shape_scaling.csv and the figures in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"shape_scaling.py: {error}")
