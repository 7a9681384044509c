"""Paths in the plane: why they bend, and how reflow straightens them. The classroom opener.

    python experiments/toy2d.py                         eight Gaussians, two moons, checkerboard
    python experiments/toy2d.py --sets moons --source gaussians       from data to data
    python experiments/toy2d.py --lagrangian            also a flow map, learned without a teacher

For each set a small MLP learns the first rectified flow (any noise with any data: lines cross, so
paths bend), then the second, from the pairs that the first one makes (lines no longer cross). Flow,
solver, straightness and transport cost are rf.py's own. What comes out, in --out: toy2d.csv, paths
and samples as SET.png, and the walk from noise to data as SET.gif and SET.html, a page with a time
slider that needs no network.

Shapes: B points, (B, 2) each.
"""

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules one folder up

import rf
from data_mnist import mix_seed

STEPS = 50  # of the Euler walks that are called "many steps"
BATCH = 512
POINTS = 2000  # for the measures
COLUMNS = ("set", "source", "flow", "straightness", "cost", "energy_1", "energy_2", "energy_many")

# ------------------------------------------------------------------------------------------------
# Distributions: n points by a generator, about unit size
# ------------------------------------------------------------------------------------------------


def noise(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, 2))


def gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight narrow ones on a circle of radius 2."""
    angle = 2 * np.pi * rng.integers(8, size=n) / 8
    centres = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centres + 0.15 * rng.standard_normal((n, 2))


def moons(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two interleaved half circles."""
    angle, upper = np.pi * rng.random(n), rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return 1.6 * np.stack([x, y], 1) + 0.08 * rng.standard_normal((n, 2))


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight of the sixteen fields of a board from −2 to 2."""
    field = rng.integers(8, size=n)
    row, column = field // 2, 2 * (field % 2) + field // 2 % 2
    return np.stack([column, row], 1) - 2 + rng.random((n, 2))


SETS = {"gaussians": gaussians, "moons": moons, "checkerboard": checkerboard}
SOURCES = {"noise": noise} | SETS


def draw(name: str, n: int, seed: int, purpose: str) -> Tensor:
    """(n, 2) fp32 points of a distribution, by (seed, purpose) alone."""
    rng = np.random.default_rng(mix_seed(seed, purpose, 0))
    return torch.from_numpy(SOURCES[name](n, rng)).float()


# ------------------------------------------------------------------------------------------------
# The network and its training
# ------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """velocity = MLP(x, t); text is taken and ignored: to rf.py a model like any other."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 7, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        waves = [f(k * t) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, torch.stack([t, *waves], 1)], 1))


def train(
    pairs: Callable[[int], tuple[Tensor, Tensor]], steps: int, seed: int,
    start: MLP | None = None,
) -> MLP:  # fmt: skip
    """A flow between the two sides of pairs(step) → data, source: Adam, the rate down a line."""
    torch.manual_seed(seed)
    model = MLP()
    if start is not None:
        model.load_state_dict(start.state_dict())
    adam = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    average = rf.PowerEMA(list(model.parameters()), 0.10)
    generator = torch.Generator().manual_seed(mix_seed(seed, "time", 0))
    for step in range(steps):
        data, source = pairs(step)
        t = rf.sample_time(len(data), distribution="uniform", stratified=True, generator=generator)
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rf.rf_loss(model, data, data, t=t, noise=source).mean().backward()
        adam.step()
        adam.zero_grad()
        average.update(step + 1)
    average.copy_to(list(model.parameters()))
    return model.eval()


def flows(args: argparse.Namespace, name: str) -> dict[str, MLP]:
    """First rectified flow from any pairs, second from the pairs that the first one makes."""
    n = args.steps * BATCH
    data, source = (
        draw(which, n, args.seed, f"train {name} {k}").split(BATCH)
        for k, which in enumerate((name, args.source))
    )
    first = train(lambda step: (data[step], source[step]), args.steps, args.seed)
    start = draw(args.source, 40 * BATCH, args.seed, f"pairs {name}")
    states = rf.reflow_states(first, start, start, steps=STEPS // 2, solver="rf_solver")
    start, end = states[:, 0], states[:, 1]
    rng = np.random.default_rng(mix_seed(args.seed, "order", 0))

    def reflowed(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(rng.integers(len(start), size=BATCH))
        return end[rows], start[rows]

    return {"first": first, "second": train(reflowed, args.steps, args.seed, start=first)}


# ------------------------------------------------------------------------------------------------
# A flow map, learned by itself: Lagrangian self-distillation (Boffi et al. 2025, 2505.18825)
# ------------------------------------------------------------------------------------------------


class FlowMap(nn.Module):
    """X(x, s, t) = x + (t − s)·u(x, s, t): from where a path is at time s to where it is at t.

    As t → s the mean velocity u becomes the flow's own, u(x, s, s) = v(x, s).
    """

    def __init__(self):
        super().__init__()
        self.mlp = MLP()
        self.mlp.layers[0] = nn.Linear(2 + 14, self.mlp.layers[0].out_features)

    def mean_velocity(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        waves = [
            f(k * time) for time in (s, t) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)
        ]
        return self.mlp.layers(torch.cat([x, torch.stack([s, t, *waves], 1)], 1))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x + (t - s)[:, None] * self.mean_velocity(x, s, t)


def lagrangian_loss(
    flow: FlowMap, data: Tensor, source: Tensor, r: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """‖u(x_r, r, r) − (source − data)‖² + ‖∂_t X(x_s, s, t) − v(X(x_s, s, t), t)‖², (B,).

    The first term is rf_loss; the second says that the map moves as the flow does, with the map's
    own diagonal for v, its gradient stopped (the paper's Algorithm for LSD): no teacher is needed.
    """
    x, target = rf.interpolate(data, source, r), rf.velocity_target(data, source)
    matching = (flow.mean_velocity(x, r, r) - target).square().sum(1)
    x = rf.interpolate(data, source, s)
    ones = torch.ones_like(t)
    end, slope = torch.func.jvp(lambda time: flow(x, s, time), (t,), (ones,))
    velocity = flow.mean_velocity(end, t, t).detach()
    return matching + (slope - velocity).square().sum(1)


def train_flow_map(args: argparse.Namespace, name: str, steps: int) -> FlowMap:
    torch.manual_seed(args.seed)
    flow = FlowMap()
    adam = torch.optim.Adam(flow.parameters(), lr=3e-3, betas=(0.9, 0.99))
    average = rf.PowerEMA(list(flow.parameters()), 0.10)
    generator = torch.Generator().manual_seed(mix_seed(args.seed, "flow map", 0))
    data = draw(name, steps * BATCH, args.seed, f"flow map data {name}").split(BATCH)
    source = draw(args.source, steps * BATCH, args.seed, f"flow map source {name}").split(BATCH)
    for step in range(steps):
        r, s, t = torch.rand(3, BATCH, generator=generator)
        s, t = torch.maximum(s, t), torch.minimum(s, t)  # towards the data
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        lagrangian_loss(flow, data[step], source[step], r, s, t).mean().backward()
        adam.step()
        adam.zero_grad()
        average.update(step + 1)
    average.copy_to(list(flow.parameters()))
    return flow.eval()


@torch.no_grad()
def walk_map(flow: FlowMap, x: Tensor, steps: int) -> Tensor:
    """Source → data in `steps` jumps of the map."""
    for s, t in pairwise(rf.timesteps(steps)):
        x = flow(x, torch.full((len(x),), s), torch.full((len(x),), t))
    return x


# ------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------


def energy_distance(a: Tensor, b: Tensor) -> float:
    """√(2E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖) of two sets of points, ≥ 0 (Székely & Rizzo 2013).

    Two finite sets from one distribution are not at 0: the table's "real" row is that floor.
    """
    mean = [torch.cdist(x, y).double().mean() for x, y in ((a, b), (a, a), (b, b))]
    return float((2 * mean[0] - mean[1] - mean[2]).clamp(min=0).sqrt())


def measure(args: argparse.Namespace, name: str, models: dict[str, MLP]) -> list[dict]:
    start = draw(args.source, POINTS, args.seed, f"measure {name}")
    real = draw(name, 4 * POINTS, args.seed, f"real {name}")
    rows = []
    any_data = draw(name, POINTS, args.seed, f"cost {name}")
    cost = float(rf.transport_cost(any_data, start).mean())
    rows.append({"flow": "real", "cost": cost, "energy_many": energy_distance(any_data, real)})
    for flow, model in models.items():
        row = {"flow": flow}
        row["straightness"] = float(rf.straightness(model, start, start, steps=STEPS).mean())
        for label, steps in {"1": 1, "2": 2, "many": STEPS}.items():
            end = rf.sample(model, start, start, steps=steps)
            row[f"energy_{label}"] = energy_distance(end, real)
        end = rf.sample(model, start, start, steps=STEPS, solver="rf_solver")
        row["cost"] = float(rf.transport_cost(end, start).mean())
        rows.append(row)
    if args.lagrangian:
        flow = train_flow_map(args, name, 2 * args.steps)
        rows.append({"flow": "flow map"} | {
            f"energy_{label}": energy_distance(walk_map(flow, start, steps), real)
            for label, steps in {"1": 1, "2": 2, "many": 8}.items()
        })  # fmt: skip
    return [{"set": name, "source": args.source} | row for row in rows]


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def limits(axes, points: Tensor):
    reach = float(points.abs().quantile(0.995)) + 0.4
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")


def plot_paths(args: argparse.Namespace, name: str, models: dict[str, MLP], path: Path):
    """Left the lines that training draws, then each flow's paths, then one step of each."""
    import matplotlib.pyplot as plt

    start = draw(args.source, POINTS, args.seed, f"measure {name}")
    data = draw(name, POINTS, args.seed, f"cost {name}")
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.3), layout="constrained")
    few = 60
    axes[0].plot(*torch.stack([start[:few], data[:few]]).unbind(2), color="0.7", lw=0.6)
    axes[0].set_title("any pairs: lines cross", fontsize=9)
    for axis, (flow, model) in zip(axes[1:3], models.items(), strict=True):
        walk = rf.sample(model, start[:few], start[:few], steps=STEPS, return_trajectory=True)
        axis.plot(*walk.unbind(2), color="0.6", lw=0.6)
        axis.scatter(*walk[-1].T, s=4, color="C0", zorder=3)
        axis.set_title(f"paths of the {flow} rectified flow", fontsize=9)
    for axis, (flow, model) in zip(axes[3:], models.items(), strict=True):
        axis.scatter(*data.T, s=1, color="0.85")
        axis.scatter(*rf.sample(model, start, start, steps=1).T, s=1, color="C1")
        axis.set_title(f"one step of the {flow}", fontsize=9)
    for axis in axes:
        limits(axis, torch.cat([start, data]))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def animate(args: argparse.Namespace, name: str, models: dict[str, MLP], folder: Path):
    """The walk of many points, first and second flow side by side: a GIF, a page with a slider."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    points, frames = 600, 20
    start = draw(args.source, points, args.seed, f"animation {name}")
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 3), layout="constrained")
    walks, dots = [], []
    for axis, (flow, model) in zip(axes, models.items(), strict=True):
        walk = rf.sample(model, start, start, steps=frames, return_trajectory=True)
        axis.plot(*walk[:, :40].unbind(2), color="0.8", lw=0.6)
        limits(axis, torch.cat([walk[0], walk[-1]]))
        axis.set_title(f"{flow} rectified flow", fontsize=9)
        walks.append(walk)
        dots.append(axis.scatter(*walk[0].T, s=3, color="C0"))
    title = figure.supxlabel("t = 1.00", fontsize=9)

    def show(frame: int):
        for dot, walk in zip(dots, walks, strict=True):
            dot.set_offsets(walk[frame].numpy())
        title.set_text(f"t = {1 - frame / frames:.2f}   (1 {args.source}, 0 {name})")
        return [*dots, title]

    film = FuncAnimation(figure, show, frames=frames + 1, interval=120)
    film.save(folder / f"{name}.gif", PillowWriter(fps=8), dpi=80)
    page = self_contained(film.to_jshtml(fps=8, default_mode="loop"))
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    plt.close(figure)


ICONS = {  # of the player's buttons
    "minus": "−", "fast-backward": "|◀", "step-backward": "◁", "play fa-flip-horizontal": "◀",
    "pause": "❚❚", "play": "▶", "step-forward": "▷", "fast-forward": "▶|", "plus": "+",
}  # fmt: skip


def self_contained(page: str) -> str:
    """Matplotlib's player without the icon font that it would fetch: signs on the buttons."""
    page = re.sub(r"<link[^>]*>", '<meta charset="utf-8">', page)
    return re.sub(r'<i class="fa fa-([^"]*)"></i>', lambda icon: ICONS.get(icon[1], "•"), page)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="(default: all)")
    add("--source", choices=SOURCES, default="noise", help="where paths begin (default: noise)")
    add("--steps", type=int, default=2000, help="training steps of each flow (default: 2000)")
    add("--lagrangian", action="store_true", help="also the self-distilled flow map")
    add("--seed", type=int, default=0, help="of everything (default: 0)")
    add("--no-film", action="store_true", help="leave out the GIF and the page")
    add("--out", type=Path, default=Path("runs/toy2d"), help="folder (default: runs/toy2d)")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    args = build_parser().parse_args(argv)
    for key, least in {"steps": 1, "seed": 0}.items():
        if getattr(args, key) < least:
            sys.exit(f"toy2d.py: --{key} {getattr(args, key)} must be at least {least}")
    try:
        return run(args)
    except OSError as error:
        sys.exit(f"toy2d.py: {error}")


def run(args: argparse.Namespace) -> list[dict]:
    started, rows = time.time(), []
    args.out.mkdir(parents=True, exist_ok=True)
    print("  ".join(f"{column:>12}" for column in COLUMNS))
    for name in args.sets:
        models = flows(args, name)
        for row in measure(args, name, models):
            rows.append(row)
            cells = (row.get(column, "") for column in COLUMNS)
            cells = (f"{c:.4f}" if isinstance(c, float) else c for c in cells)
            print("  ".join(f"{c:>12}" for c in cells), flush=True)
        plot_paths(args, name, models, args.out / f"{name}.png")
        if not args.no_film:
            animate(args, name, models, args.out)
    with open(args.out / "toy2d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.out} ({time.time() - started:.0f} s)")
    return rows


if __name__ == "__main__":
    main()
