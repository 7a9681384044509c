"""LOG: what a run says while it goes; it reads the device once an interval.

log.csv    a row every few steps: mean loss and gradient norm, learning rate, skipped steps, and in
           the first row after a resume the options that were changed
eval.csv   a row an evaluation: the held-out loss, at eight times and their mean, and scores
the bar    loss, gradient norm, images/s, TFLOP/s, MFU, time left
"""

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

from common.settings import Checked, Natural, rule
from common.start import still_there, write_new, write_whole

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets (without sparsity), for the MFU.
PEAK_TFLOPS = {  # a word of the device's name; the first that fits
    "B300": 2250,
    "B200": 2250,
    "GB200": 2500,
    "GH200": 990,
    "H200 NVL": 835,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "5090": 210,
    "4090": 165,
    "3090": 71,
}


@dataclass(frozen=True)
class LogRow(Checked):
    """What a row of log.csv or eval.csv holds in any case; the loss is NaN if nothing was asked."""

    samples: Natural
    loss: Annotated[float, rule(nan=True)]


class Log:
    """Losses and norms stay on the device until an interval of `every` steps is over.

    gather: a function (k,) → (ranks, k) that collects the losses of all ranks; every rank calls
    add and end_step alike, and rank 0 alone (path is not None) writes the file.
    """

    def __init__(
        self,
        path: Path | None,
        every: int,
        gather: Callable[[Tensor], Tensor] = lambda losses: losses[None],
    ):
        self.path, self.every, self.gather = path, every, gather
        self.rows: list[dict] = []
        self.losses, self.norms, self.bad_step = [], [], None
        self.changed = ""

    def begin(self):
        """The file of a run that starts, or goes on with the rows and `changed` of a resume."""
        write_rows(self.path, self.rows)
        if self.path and self.changed:
            print(f"changed from here on: {self.changed}")

    def add(self, loss: Tensor):
        """The loss of one micro-batch of the step under way."""
        self.losses.append(loss.detach())

    def end_step(self, step: int, samples: int, norm, **values: float) -> dict | None:
        """The step is over. norm: of the gradient before clipping. → the row, if one is complete.

        step, samples: counted with this step. values: further columns, known on the host.
        """
        self.norms.append(norm)
        self.now = {"step": step, "samples": samples}, values
        return self.flush() if step % self.every == 0 else None

    def flush(self) -> dict | None:
        """The row of the steps that no row holds yet: at an interval's end, and before a save.

        bad_step is then the first step whose loss or norm was not finite, or None.
        """
        if not self.norms:
            return None
        steps = len(self.norms)
        losses = torch.stack(self.losses).view(steps, -1).mean(1)  # (k,) of this rank
        norms = torch.stack([torch.as_tensor(n).to(losses) for n in self.norms])
        table = torch.cat([self.gather(losses), norms[None]]).cpu()  # (ranks + 1, k): the one read
        losses, norms = table[:-1], table[-1]
        self.losses, self.norms = [], []
        bad = (~losses.isfinite()).any(0) | ~norms.isfinite()  # (k,)
        where, values = self.now
        self.bad_step = where["step"] - steps + 1 + int(bad.nonzero()[0]) if bad.any() else None
        row = where | {"loss": finite_mean(losses), "grad_norm": finite_mean(norms)} | values
        row["changed"], self.changed = self.changed, ""
        self.rows.append(row)
        try:
            append_row(self.path, row)
        except ValueError:  # somebody wrote into it, or the disk was full: all rows are here
            write_rows(self.path, self.rows)
        return row


def finite_mean(values: Tensor) -> float:
    """The mean of what is finite (a skipped step's values are not); NaN if nothing is."""
    return values[values.isfinite()].mean().item()


def write_rows(path: Path | None, rows: list[dict]):
    """A CSV of these rows alone, whole or not at all; without rows no file. None: not on this
    rank."""
    if path is not None and not rows:
        path.unlink(missing_ok=True)
    elif path is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue().encode())


def check_table(path: Path, columns: Iterable[str]) -> bool:
    """Whether the table must be begun. ValueError if it is cut, or has other columns."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no such folder, make it first")
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as file:
        head = file.readline().decode(errors="replace").strip().split(",")
        file.seek(-1, 2)
        if head != [*columns] or file.read() != b"\n":
            raise ValueError(f"{path} is cut, or holds other columns: move it away")
    return False


def append_row(path: Path | None, row: dict):
    if path is not None:
        still_there(path)
        new = check_table(path, row)
        if new:  # several processes may begin a table together
            write_new(path, (",".join(row) + "\r\n").encode())
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, row.keys()).writerow(row)


# ------------------------------------------------------------------------------------------------
# The bar
# ------------------------------------------------------------------------------------------------


def device_peak(device: torch.device) -> float | None:
    """TFLOP/s that a device can do at best in bf16; None for what the table does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def progress_bar(samples: int, seen: int, shown: bool = True) -> tqdm:
    """Over the samples of a run; those before `seen` do not count for the speed."""
    return tqdm(
        total=samples,
        initial=seen,
        unit="image",
        unit_scale=True,
        desc="training",
        smoothing=0.05,
        disable=not shown,
    )


def show(bar: tqdm, row: dict, flops_per_image: float, peak: float | None, ranks: int = 1):
    """loss 0.093, |g| 0.21, 0.10 TFLOP/s, MFU 45 %, behind the bar.

    |g|: norm before clipping. TFLOP/s: of all ranks together; training on an image takes three
    forward passes. MFU: that per device, as a share of its peak.
    """
    tflops = (bar.format_dict["rate"] or 0.0) * 3 * flops_per_image / 1e12
    parts = [f"loss {row['loss']:.4f}", f"|g| {row['grad_norm']:.2f}", f"{tflops:.2f} TFLOP/s"]
    if peak is not None:
        parts.append(f"MFU {tflops / ranks / peak:.0%}")
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    bar.set_postfix_str(", ".join(parts))
