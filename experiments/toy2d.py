"""Paths in the plane: why they bend, and how reflow straightens them. The classroom opener.

    python -m experiments.toy2d                         eight Gaussians, two moons, checkerboard
    python -m experiments.toy2d --sets moons --source gaussians       from data to data
    python -m experiments.toy2d --lagrangian            also a flow map, learned without a teacher

For each set a small MLP learns the first rectified flow (any noise with any data: lines cross, so
paths bend), then the second, from the pairs that the first one makes (lines no longer cross). Flow,
solver, straightness and transport cost are rf.py's own. What comes out, in --out: toy2d.csv, paths
and samples as SET.png, and the way from noise to data as SET.gif.

Shapes: B points, (B, 2) each.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from torch import Tensor

import rf
from common.pictures import save_figure
from common.settings import Options, option, parse
from common.start import claim, mark, program, write_whole

NAME = "experiments.toy2d"

STEPS = 50  # of the Euler walks that are called "many steps"
BATCH = 512
POINTS = 2000  # for the measures
COLUMNS = ("set", "source", "flow", "straightness", "cost", "energy_1", "energy_2", "energy_many")

# ------------------------------------------------------------------------------------------------
# Distributions: n points by a generator, about unit size
# ------------------------------------------------------------------------------------------------


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
SOURCES = SETS | {"noise": lambda n, rng: rng.standard_normal((n, 2))}


def draw(name: str, n: int, seed: int, purpose: str) -> Tensor:
    """(n, 2) fp32 points of a distribution, by (seed, purpose) alone."""
    rng = np.random.default_rng(rf.mix_seed(seed, purpose, 0))
    return torch.from_numpy(SOURCES[name](n, rng)).float()


# ------------------------------------------------------------------------------------------------
# The network and its training
# ------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """velocity = MLP()(x, t); text is taken and ignored: to rf.py a model like any other."""

    def __init__(self, times: int = 1):
        super().__init__()
        sizes = [2 + 7 * times, 128, 128, 128, 2]
        layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.SiLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def velocity(self, x: Tensor, *times: Tensor) -> Tensor:
        waves = [f(k * t) for t in times for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, torch.stack([*times, *waves], 1)], 1))

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        return self.velocity(x, t)


def fit(model: nn.Module, steps: int, loss: Callable):
    """Adam on loss(step) (B,), its rate down a line to 0 → the model, with averaged weights."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    rf.keep_averages(adam, [0.10])
    for step in range(steps):
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        loss(step).mean().backward()
        adam.step()
        adam.zero_grad()
    rf.exchange_averages(adam, rf.average_name(0.10))
    return model


def train(model: MLP, rows: Iterator, args) -> MLP:
    """A flow from rows of states (B, K + 1, 2) and fresh source (B, 2), see rf.line."""
    generator = torch.Generator().manual_seed(rf.mix_seed(args.seed, "time", 0))

    def loss(step):
        states, source = next(rows)
        data, source, t = rf.line(states, source, rf.spread(BATCH, generator), time="uniform")
        return rf.rf_loss(model, data, data, t=t, noise=source)

    return fit(model, args.steps, loss)


def flows(args, name: str) -> dict:
    """name → MLP: the first rectified flow from any pairs, the second from the first's pairs."""
    n = args.steps * BATCH
    data = draw(name, n, args.seed, f"train {name} 0")[:, None].split(BATCH)
    source = draw(args.source, n, args.seed, f"train {name} 1").split(BATCH)
    torch.manual_seed(args.seed)
    first = train(MLP(), zip(data, source, strict=True), args)
    start = draw(args.source, 40 * BATCH, args.seed, f"pairs {name}")
    states = rf.reflow_states(first, start, start, steps=STEPS // 2, solver="rf_solver")
    rng = np.random.default_rng(rf.mix_seed(args.seed, "order", 0))
    pairs = ((states[rng.integers(len(states), size=BATCH)], fresh) for fresh in source)
    return {"first": first, "second": train(copy.deepcopy(first), pairs, args)}


# ------------------------------------------------------------------------------------------------
# A flow map, learned by itself: Lagrangian self-distillation (Boffi et al. 2025, 2505.18825)
# ------------------------------------------------------------------------------------------------


class FlowMap(MLP):
    """X(x, s, t) = x + (t − s)·u(x, s, t): from where a path is at time s to where it is at t.

    As t → s the mean velocity u becomes the flow's own, u(x, s, s) = v(x, s).
    """

    def __init__(self):
        super().__init__(times=2)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return x + (t - s)[:, None] * self.velocity(x, s, t)


def lagrangian_loss(
    flow: FlowMap, data: Tensor, source: Tensor, r: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """‖u(x_r, r, r) − (source − data)‖² + ‖∂_t X(x_s, s, t) − v(X(x_s, s, t), t)‖², (B,).

    The first term is rf_loss; the second says that the map moves as the flow does, with the map's
    own diagonal for v, its gradient stopped (the paper's Algorithm for LSD): no teacher is needed.
    """
    x, target = rf.interpolate(data, source, r), rf.velocity_target(data, source)
    matching = (flow.velocity(x, r, r) - target).square().sum(1)
    x = rf.interpolate(data, source, s)
    end, slope = torch.func.jvp(lambda time: flow(x, s, time), (t,), (torch.ones_like(t),))
    velocity = flow.velocity(end, t, t).detach()
    return matching + (slope - velocity).square().sum(1)


def flow_map(args, name: str) -> FlowMap:
    """A trained one: no teacher, so it takes twice the steps."""
    generator = torch.Generator().manual_seed(rf.mix_seed(args.seed, "flow map", 0))
    torch.manual_seed(args.seed)
    flow = FlowMap()

    def loss(step):
        data = draw(name, BATCH, args.seed, f"flow map data {step}")
        source = draw(args.source, BATCH, args.seed, f"flow map source {step}")
        r, s, t = torch.rand(3, BATCH, generator=generator)
        s, t = torch.maximum(s, t), torch.minimum(s, t)  # towards the data
        return lagrangian_loss(flow, data, source, r, s, t)

    return fit(flow, 2 * args.steps, loss)


@torch.no_grad()
def walk_map(flow: FlowMap, x: Tensor, steps: int) -> Tensor:
    """Source → data in `steps` jumps of the map."""
    times = torch.tensor(rf.timesteps(steps))[:, None].expand(-1, len(x))  # (steps + 1, B)
    for s, t in pairwise(times):
        x = flow(x, s, t)
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


def measure(args, name: str, models: dict, start: Tensor, data: Tensor) -> list[dict]:
    """A row for real points and any pairs, one a flow, and with --lagrangian one for the map."""
    real = draw(name, 4 * POINTS, args.seed, f"real {name}")

    def energies(walk):
        steps = {"energy_1": 1, "energy_2": 2, "energy_many": STEPS}
        return {column: energy_distance(walk(steps=n), real) for column, n in steps.items()}

    cost = float(rf.transport_cost(data, start).mean())
    rows = [{"flow": "real", "cost": cost, "energy_many": energy_distance(data, real)}]
    for flow, model in models.items():
        straightness = float(rf.straightness(model, start, start, steps=STEPS).mean())
        end = rf.sample(model, start, start, steps=STEPS, solver="rf_solver")
        cost = float(rf.transport_cost(end, start).mean())
        row = {"flow": flow, "straightness": straightness, "cost": cost}
        rows.append(row | energies(partial(rf.sample, model, start, start)))
    if args.lagrangian:
        rows.append({"flow": "map"} | energies(partial(walk_map, flow_map(args, name), start)))
    return [{"set": name, "source": args.source} | row for row in rows]


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def panel(axis, title: str, walk: Tensor, reach: float):
    """A square from −reach to reach with the paths of a few points, walk (steps + 1, B, 2)."""
    axis.plot(*walk[:, :60].unbind(2), color="0.7", lw=0.6)
    axis.set_title(title, fontsize=9)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")


def show(args, name: str, models: dict, start: Tensor, data: Tensor):
    """SET.png: left the lines that training draws, then each flow's paths, then one step of each.
    SET.gif: the way of many points, both flows side by side."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    reach = float(torch.cat([start, data]).abs().quantile(0.995)) + 0.4
    still, axes = plt.subplots(1, 5, figsize=(15, 3.3), layout="constrained")
    film, squares = plt.subplots(1, 2, figsize=(5.6, 3), layout="constrained")
    panel(axes[0], "any pairs: lines cross", torch.stack([start, data]), reach)
    moving = []
    for i, (flow, model) in enumerate(models.items()):
        walk = rf.sample(model, start, start, steps=STEPS, return_trajectory=True)
        paths, step, square = axes[1 + i], axes[3 + i], squares[i]
        panel(paths, f"paths of the {flow} rectified flow", walk, reach)
        paths.scatter(*walk[-1, :60].T, s=4, color="C0", zorder=3)
        panel(step, f"one step of the {flow}", walk[:0], reach)
        step.scatter(*data.T, s=1, color="0.85")
        step.scatter(*rf.sample(model, start, start, steps=1).T, s=1, color="C1")
        panel(square, f"{flow} rectified flow", walk, reach)
        moving.append((square.scatter(*walk[0].T, s=2, color="C0"), walk))
    save_figure(still, args.out / f"{name}.png", dpi=100)
    label, writer = film.supxlabel(""), PillowWriter(fps=8)
    with TemporaryDirectory() as folder:  # the writer needs a file
        made = Path(folder) / "film.gif"
        with writer.saving(film, made, dpi=80):
            for frame in range(0, STEPS + 1, 2):
                for dots, walk in moving:
                    dots.set_offsets(walk[frame, :600])
                label.set_text(f"t = {1 - frame / STEPS:.2f}   (1 {args.source}, 0 {name})")
                writer.grab_frame()
        write_whole(args.out / f"{name}.gif", made.read_bytes())
    plt.close("all")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Options):
    sets: list[str] = option(list(SETS), "which", choices=SETS)
    source: str = option("noise", "where paths begin: noise, or a set", choices=SOURCES)
    steps: int = option(2000, "training steps of each flow", least=1)
    lagrangian: bool = option(False, "also the self-distilled flow map")
    seed: int = option(0, "of everything", least=0)
    out: Path = option(Path("runs/toy2d"), "folder")


@program(NAME)
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, NAME)
    rows = []
    mark(args.out, NAME)
    for name in args.sets:
        models = flows(args, name)
        start = draw(args.source, POINTS, args.seed, f"measure {name}")
        data = draw(name, POINTS, args.seed, f"cost {name}")
        rows += measure(args, name, models, start, data)
        show(args, name, models, start, data)
    table = pd.DataFrame(rows, columns=COLUMNS)
    print(table.to_string(index=False, na_rep="", float_format="{:.4f}".format))
    write_whole(args.out / "toy2d.csv", table.to_csv(index=False).encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
