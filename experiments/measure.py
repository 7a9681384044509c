"""What the experiments share: medians of variants that take turns, tables and their charts."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from common.pictures import save_figure
from common.start import write_whole


def interleaved(steps: dict[str, Callable], repeats: int, inner: int = 1) -> pd.DataFrame:
    """name → milliseconds of a call, see `summary`.

    The variants take turns, so that a slow moment meets all of them. A turn begins with a call that
    is not timed, after which caches and memory are the variant's; then `inner` calls are timed
    together. The first round of turns warms up and does not count.
    """
    rounds = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, step in steps.items():
            step()
            wait()
            start = time.perf_counter()
            for _ in range(inner):
                step()
            wait()
            rounds[-1][name] = 1e3 * (time.perf_counter() - start) / inner
    return summary(rounds[1:])


def wait():
    """Until the GPU, if there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def summary(rounds: list[dict[str, float]]) -> pd.DataFrame:
    """A row a name: ms, the median, and spread, half the distance of the quartiles over it."""
    low, median, high = map(pd.DataFrame(rounds).quantile, (0.25, 0.5, 0.75))
    return pd.DataFrame({"ms": median, "spread": (high - low) / 2 / median})


def machine() -> str:
    """The device and the versions that a number belongs to."""
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    device = f"{name}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def report(table: pd.DataFrame, path: Path, bar: str = "ms"):
    """A table on the screen and as a CSV; its column `bar` as a bar chart beside it.

    A bar is named by what is no fraction in its row: words and whole numbers. A row without a
    number has none.
    """
    print(table.to_string(index=False, float_format=short), machine(), sep="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{table.to_csv(index=False)}# {machine()}\n".encode())
    table = table.dropna(subset=bar)[::-1]
    names = table.select_dtypes(exclude="float").astype(str).agg(", ".join, axis=1)
    size = (8, 0.32 * len(table) + 0.8)
    axes = table.set_index(names).plot.barh(y=bar, figsize=size, color="0.6", legend=False)
    axes.bar_label(axes.containers[0], fmt=short, padding=3)
    axes.margins(x=0.12)  # room for the labels
    axes.set(xlabel=f"{bar}   ({machine()})", ylabel="")
    save_figure(axes.figure, path.with_suffix(".png"), dpi=110, bbox_inches="tight")
    print(f"wrote {path} and its chart")


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
