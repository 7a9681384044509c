"""Does every activation keep its size when the network gets wider? (muP's coordinate check)

    python -m experiments.coordinate_check                       table, CSV and picture
    python -m experiments.coordinate_check --residual auraflow --double 1 --lr 0.03

A few steps at a large learning rate, at several widths; then the mean |x| of every linear layer's
and every block's output. Under the maximal-update parametrisation it does not depend on the width:
the slope of log mean|x| against log width is about 0. Under the standard one it grows, and with it
what a learning rate does: that is why the best one moves with the width (Tensor Programs V,
2203.03466; the check itself is microsoft/mup's).
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import rf
from common.muon import use_muon
from common.pictures import save_figure
from common.settings import Options, option, parse
from common.start import claim, mark, program, write_whole
from inputs.digits import glyphs
from inputs.encoders import Words, to_unit
from mmdit import PRESETS, RESIDUALS, DoubleBlock, Linear, MMDiT, MMDiTConfig, SingleBlock
from train_mnist import BETAS, CLIP, EPS

NAME = "experiments.coordinate_check"

WIDTHS = (64, 128, 256, 512)
PARAMETRIZATIONS = ("standard", "mup", "muon")  # muon: mup, with Muon for the hidden matrices
STEPS = (1, 2, 4, 8)  # after which the activations are looked at
SEEDS = 2  # initialisations that are averaged
LR = 0.004  # large: twice as much and the standard parametrisation explodes
MUON_LR = 0.02


def shape(width: int, residual: str = "prenorm", double: int = 0) -> MMDiTConfig:
    """Chapter 1's network at a width; muP's multipliers are 1 at the smallest.

    Patches of 4 x 4: the 49 values of chapter 1's would nearly fill the narrowest width, and what
    is cramped there is not so in the wider ones.
    """
    fits = {"patch_size": 4, "max_grid": 4, "dim": width, "base_dim": WIDTHS[0]}
    return replace(PRESETS["digits"], **fits, residual=residual, n_double_layers=double)


def measure(config: MMDiTConfig, parametrization: str, lr: float = LR, seed: int = 0) -> list[dict]:
    """Rows of step, activation and mean |x|, in steps of AdamW on one batch of glyphs.

    The same glyphs (their middle, 16 x 16), labels, times and noise for every width and seed.
    """
    torch.manual_seed(seed)
    model = MMDiT(config)
    muon = {"parametrization": "mup", "muon_lr": MUON_LR}
    how = muon if parametrization == "muon" else {"parametrization": parametrization}
    adamw = torch.optim.AdamW(model.param_groups(lr, **how), betas=BETAS, eps=EPS)
    use_muon(adamw)
    images, generator = glyphs(48), torch.Generator().manual_seed(0)
    text = Words(images.classes).expand(images.labels)
    data = to_unit(images.images)[..., 6:22, 6:22]
    noise = torch.randn(data.shape, generator=generator)
    t = rf.sample_time(len(data), stratified=True, generator=generator)
    seen = (Linear, DoubleBlock, SingleBlock)
    names = {module: name for name, module in model.named_modules() if isinstance(module, seen)}
    rows = []

    def look(module, inputs, output):
        parts = output if isinstance(output, tuple) else (output,)
        size = float(np.mean([part.detach().abs().mean() for part in parts]))
        rows.append({"step": step, "activation": names[module], "mean_abs": size})

    for module in names:
        module.register_forward_hook(look)
    for step in range(max(STEPS) + 1):  # noqa: B007 (look reads it)
        rf.rf_loss(model, data, text, t=t, noise=noise).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        adamw.zero_grad()
    return [row for row in rows if row["step"] in STEPS]


def slopes(sizes: pd.DataFrame) -> pd.Series:
    """Slope of log mean|x| against log width, by least squares. sizes: a row a width, a column an
    activation.

    Without those that are still exactly 0, as what zero weights feed is in the first steps.
    """
    sizes = sizes.loc[:, (sizes > 0).all()]
    return pd.Series(np.polyfit(np.log(sizes.index), np.log(sizes), 1)[0], sizes.columns)


def plot(sizes: pd.DataFrame, path: Path):
    """Mean |x| against width after the last step, a line an activation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axis, name in zip(axes, PARAMETRIZATIONS, strict=True):
        last = sizes[name, max(STEPS)]
        title = f"{name}: worst slope {slopes(last).abs().max():.2f}"
        last.plot(ax=axis, loglog=True, style="o-", alpha=0.6, legend=False, title=title)
        axis.set_xticks(WIDTHS, WIDTHS)
        axis.minorticks_off()
    axes[0].set_ylabel(f"mean |activation| after {max(STEPS)} steps")
    save_figure(figure, path, dpi=100)


@dataclass(frozen=True)
class Settings(Options):
    lr: float = option(LR, "learning rate at the smallest width", above=0)
    residual: str = option("prenorm", "how a block adds up", choices=RESIDUALS)
    double: int = option(0, "double blocks among the four", least=0)
    out: Path = option(Path("runs/coordinate_check"), "folder for CSV and PNG")


@program(NAME)
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    claim(args.out, NAME)
    table = pd.DataFrame(
        {"parametrization": name, "width": width} | row
        for name, width, seed in product(PARAMETRIZATIONS, WIDTHS, range(SEEDS))
        for row in measure(shape(width, args.residual, args.double), name, args.lr, seed)
    )
    sizes = table.pivot_table("mean_abs", "width", ["parametrization", "step", "activation"])
    mark(args.out, NAME)
    written = sizes.unstack().to_csv(header=["mean_abs"])
    write_whole(args.out / "coordinate_check.csv", written.encode())
    for name, step in product(PARAMETRIZATIONS, STEPS):
        each = slopes(sizes[name, step])
        worst = each.abs().idxmax()
        print(f"{name:9} after {step} steps: worst slope {each[worst]:+.2f} ({worst})")
    plot(sizes, args.out / "coordinate_check.png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
