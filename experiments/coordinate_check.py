"""Does every activation keep its size when the network gets wider? (muP's coordinate check)

    python experiments/coordinate_check.py                       table, CSV and picture
    python experiments/coordinate_check.py --residual auraflow --double 1 --lr 0.03

A few steps at a large learning rate, at several widths; then the mean |x| of every linear layer's
and every block's output. Under the maximal-update parametrisation it does not depend on the width:
the slope of log mean|x| against log width is about 0. Under the standard one it grows, and with it
what a learning rate does: that is why the best one moves with the width (Tensor Programs V,
2203.03466; the check itself is microsoft/mup's).
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rf
from data_mnist import OneHotText, glyphs, to_unit
from mmdit import PRESETS, RESIDUALS, Linear, MMDiT, MMDiTConfig

WIDTHS = (64, 128, 256, 512)
PARAMETRIZATIONS = ("standard", "mup")
STEPS = (1, 2, 4, 8)  # after which the activations are looked at
LR = 0.004  # large: twice as much and the standard parametrisation explodes
SEEDS = 2  # initialisations that are averaged
COLUMNS = ("parametrization", "width", "step", "activation", "mean_abs")


def shape(width: int, residual: str = "prenorm", double: int = 0) -> MMDiTConfig:
    """Chapter 1's network at a width; muP's multipliers are 1 at the smallest.

    Patches of 4 x 4: the 49 values of chapter 1's would nearly fill the narrowest width, and what
    is cramped there is not so in the wider ones.
    """
    return replace(
        PRESETS["digits"], patch_size=4, max_grid=4, dim=width, base_dim=WIDTHS[0],
        residual=residual, n_double_layers=double,
    )  # fmt: skip


def measure(
    config: MMDiTConfig, parametrization: str, *, lr: float = LR, steps=STEPS, seeds: int = SEEDS
) -> dict[int, dict[str, float]]:
    """step → activation → mean |x| on one batch of glyphs, after so many steps of AdamW on it.

    The mean is over values, images and `seeds` initialisations.
    """
    runs = [_measure(config, parametrization, lr, steps, seed) for seed in range(seeds)]
    return {
        step: {name: float(np.mean([run[step][name] for run in runs])) for name in runs[0][step]}
        for step in steps
    }


def _measure(config: MMDiTConfig, parametrization: str, lr: float, steps, seed: int):
    torch.manual_seed(seed)
    model = MMDiT(config)
    groups = model.param_groups(lr, parametrization=parametrization)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15)
    data, text, t, noise = batch()
    seen: dict[str, float] = {}

    def look(name):
        def hook(module, inputs, output):
            parts = output if isinstance(output, tuple) else (output,)
            seen[name] = float(np.mean([part.detach().abs().mean().item() for part in parts]))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Linear) or name.rpartition(".")[0] in (
            "double_blocks", "single_blocks",
        ):  # fmt: skip
            module.register_forward_hook(look(name))
    found = {}
    for step in range(max(steps) + 1):
        loss = rf.rf_loss(model, data, text, t=t, noise=noise).mean()
        if step in steps:
            found[step] = dict(seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


def batch(size: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same glyphs (their middle, 16 x 16), labels, times and noise for every width."""
    generator = torch.Generator().manual_seed(0)
    images = glyphs(size, seed=0)
    text = OneHotText(10, "cpu")(images.labels)
    data = to_unit(images.images)[..., 6:22, 6:22]
    noise = torch.randn(data.shape, generator=generator)
    t = rf.sample_time(size, stratified=True, generator=generator)
    return data, text, t, noise


def slopes(by_width: dict[int, dict[str, float]]) -> dict[str, float]:
    """activation → slope of log mean|x| against log width, by least squares.

    Without those that are still exactly 0, as what zero weights feed is in the first steps.
    """
    widths = list(by_width)
    found = {}
    for name in by_width[widths[0]]:
        sizes = [by_width[width][name] for width in widths]
        if min(sizes) > 0:
            found[name] = float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])
    return found


def plot(found: dict, path: Path):
    """Mean |x| against width after the last step, a line an activation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, by_width) in zip(axes, found.items(), strict=True):
        last = {width: by_step[max(by_step)] for width, by_step in by_width.items()}
        for activation in next(iter(last.values())):
            axis.plot(list(last), [last[w][activation] for w in last], "o-", alpha=0.6)
        worst = max(abs(slope) for slope in slopes(last).values())
        axis.set(
            xscale="log", yscale="log", xlabel="width", title=f"{name}: worst slope {worst:.2f}"
        )
        axis.set_xticks(list(last), [str(width) for width in last])
        axis.minorticks_off()
    axes[0].set_ylabel(f"mean |activation| after {max(STEPS)} steps")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lr", type=float, default=LR, help=f"learning rate at width {WIDTHS[0]} (default: {LR})")
    add("--residual", default="prenorm", choices=RESIDUALS, help="(default: prenorm)")
    add("--double", type=int, default=0, help="double blocks among the four (default: 0)")
    add("--seeds", type=int, default=SEEDS, help=f"initialisations averaged (default: {SEEDS})")
    add("--out", type=Path, default=Path("runs/coordinate_check"), help="folder for CSV and PNG")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found, rows = {}, []
    for name in PARAMETRIZATIONS:
        found[name] = {}
        for width in WIDTHS:
            config = shape(width, args.residual, args.double)
            found[name][width] = measure(config, name, lr=args.lr, seeds=args.seeds)
            for step, values in found[name][width].items():
                rows += [(name, width, step, activation, v) for activation, v in values.items()]
        for step in STEPS:
            each = slopes({width: by_step[step] for width, by_step in found[name].items()})
            worst = max(each, key=lambda activation: abs(each[activation]))
            print(f"{name:9} after {step} steps: worst slope {each[worst]:+.2f} ({worst})")
    with open(args.out / "coordinate_check.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    plot(found, args.out / "coordinate_check.png")
    print(f"wrote coordinate_check.csv and .png in {args.out}")


if __name__ == "__main__":
    main()
