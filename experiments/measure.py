"""What the experiments share: medians of variants that take turns, tables, charts, strips."""

import csv
import os
import platform
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def machine() -> str:
    """The device and the versions that a number belongs to."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{cpu_name()}, {os.cpu_count()} cores"
    return f"{device}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(rows: list[dict], path: Path, bar: str | None = None):
    """The rows as a table on the screen and as a CSV; column `bar` also as a chart beside it."""
    columns = list(rows[0])
    cells = [columns, *([_text(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(machine())
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
        file.write(f"# {machine()}\n")
    if bar is not None:
        draw_bars(rows, bar, path.with_suffix(".png"))
    print(f"wrote {path}")


def draw_bars(rows: list[dict], column: str, path: Path):
    """A bar a row, named by its words and whole numbers; a row without a number has none."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if np.isfinite(row[column])][::-1]
    words = [[str(v) for v in row.values() if isinstance(v, str | int)] for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 0.8), layout="constrained")
    bars = axes.barh(range(len(rows)), [row[column] for row in rows], color="0.6")
    axes.bar_label(bars, [_text(float(row[column])) for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [", ".join(w) for w in words], fontsize=8)
    axes.set_xlabel(f"{column}   ({machine()})", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _text(value) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def draw_strip(lines: list[tuple[str, Tensor]], path: Path, above=(), below=()):
    """A named row of pictures a line, (n, C, H, W) uint8 each; words above and below columns."""
    import matplotlib.pyplot as plt

    n = len(lines[0][1])
    words = bool(above or below)
    figure, axes = plt.subplots(
        len(lines), n, figsize=(0.85 * n + 1, 0.85 * len(lines) + 0.8 * words), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for row, (name, pictures) in zip(axes, lines, strict=True):
        for axis, picture in zip(row, pictures.cpu(), strict=True):
            array = picture.permute(1, 2, 0).numpy()
            grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if array.shape[2] == 1 else {}
            axis.imshow(array.squeeze(), interpolation="nearest", **grey)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    for axis, words in zip(axes[0], above, strict=False):
        axis.set_title(textwrap.fill(words, 17), fontsize=6, parse_math=False)
    for axis, words in zip(axes[-1], below, strict=False):
        axis.set_xlabel(textwrap.fill(words, 17), fontsize=6, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(steps: dict[str, Callable], device: torch.device, repeats: int, inner: int = 1):
    """name → seconds of each repeat. The variants take turns, so that a slow moment meets all; a
    turn begins with a call that is not timed, after which caches and memory are the variant's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, step in steps.items():
            step()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(inner):
                step()
            synchronize(device)
            if repeat:
                seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def median(values: list[float]) -> float:
    return float(np.median(values))


def spread(values: list[float]) -> float:
    """Half the distance of the quartiles, over the median."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float((high - low) / 2 / np.median(values))
