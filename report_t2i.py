"""CHAPTER 2's REPORT: what a run says while it goes, without a host read of its own in a step.

    log.csv    a row every LOG_EVERY steps: loss, gradient norm, learning rate, skipped steps
    eval.csv   a row an evaluation: validation loss at eight times and their mean, the six scores
    curves.png both, drawn; progress.png: the same prompts at every evaluation, a row each
    the bar    loss, gradient norm, images/s, TFLOP/s, MFU, time left

Shapes: R ranks, S steps of an interval (LOG_EVERY).
"""

import csv
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import shapes

LOG_EVERY = 10
LOG_COLUMNS = ("step", "samples", "loss", "grad_norm", "lr", "skipped")
TIMES = [f"loss_t{i}/8" for i in range(8)]


def eval_columns(scored: bool) -> tuple[str, ...]:
    """Of eval.csv. scored: on shapes; pictures of other data have no score."""
    return "samples", "loss", *TIMES, *((*shapes.TAGS, "mean") if scored else ())


# Dense bf16 peak in TFLOP/s, from the vendors' data sheets (without sparsity), for the MFU.
PEAK_TFLOPS = {  # a word of the device's name; the first that fits
    "B200": 2250, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "3090": 71,
}  # fmt: skip


class Log:
    """Losses and norms stay on the device for LOG_EVERY steps, travel to the host while training
    goes on, and are read one interval later. Rank 0 keeps the rows; every rank takes part.

    (DeepSpeed 0.19.8 itself reads the gradient's norm in each step, to clip and to skip.)
    """

    def __init__(self, out: Path, engine):
        self.path, self.engine, self.rows = out / "log.csv", engine, []
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.accumulation = engine.gradient_accumulation_steps()
        self.losses = torch.zeros(LOG_EVERY, device=engine.device)  # (S,) of this rank
        self.norms = torch.zeros(LOG_EVERY, device=engine.device)  # (S,) of the whole gradient
        self.step, self.in_flight = 0, None

    def open(self):
        if self.rank == 0:
            write_rows(self.path, LOG_COLUMNS, self.rows)

    def add(self, loss: Tensor):
        """The loss of one micro-batch of the step under way."""
        self.losses[self.step % LOG_EVERY].add_(loss, alpha=1 / self.accumulation)

    def end_step(self, samples: int, lr: float):
        norm = self.engine.get_global_grad_norm()
        slot = self.norms[self.step % LOG_EVERY]
        slot.copy_(norm) if isinstance(norm, Tensor) else slot.fill_(norm)
        self.step += 1
        if self.step % LOG_EVERY == 0:
            self._receive()
            self.in_flight = (self.step, samples, lr, self.engine.skipped_steps, *self._send())
            self.losses.zero_()

    def _send(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """(R + 1, S): the losses of every rank, and the norms; on their way to the host."""
        table = self.losses.new_empty(self.world_size + 1, LOG_EVERY)
        dist.all_gather_into_tensor(table[:-1].view(-1), self.losses)
        table[-1] = self.norms
        if not table.is_cuda:
            return table, None
        host = torch.empty(table.shape, pin_memory=True)
        host.copy_(table, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _receive(self):
        if self.in_flight is None:
            return
        step, samples, lr, skipped, table, event = self.in_flight
        self.in_flight = None
        if event is not None:
            event.synchronize()  # of a copy one interval ago, not of the present
        row = (step, samples, finite_mean(table[:-1]), finite_mean(table[-1]), lr, skipped)
        self.rows.append(row)
        if self.rank == 0:
            append_rows(self.path, [row])
            values = zip(LOG_COLUMNS[2:], row[2:], strict=True)
            write_to_monitor(self.engine, {f"Train/{name}": v for name, v in values}, samples)

    def state(self) -> dict:
        """Every row, and the steps after the last one, of every rank. Waits for the device."""
        self._receive()
        table, event = self._send()
        if event is not None:
            event.synchronize()
        k = self.step % LOG_EVERY
        return {"step": self.step, "rows": self.rows, "open": table[:, :k].tolist()}

    def load_state(self, state: dict):
        self.step, self.rows = state["step"], [tuple(row) for row in state["rows"]]
        table = torch.tensor(state["open"])  # (ranks then + 1, k)
        then, k = len(table) - 1, self.step % LOG_EVERY
        mine = table[self.rank] if then == self.world_size else table[:-1].mean(0)
        self.losses[:k] = mine.to(self.losses.device)
        self.norms[:k] = table[-1].to(self.norms.device)


def finite_mean(values: Tensor) -> float:
    """The mean of what is finite (a skipped step's values are not); NaN if nothing is."""
    return values[values.isfinite()].mean().item()


def write_to_monitor(engine, values: dict[str, float], samples: int):
    """To tensorboard, wandb or csv, whichever ds_config.json switches on."""
    if engine.monitor.enabled:
        engine.monitor.write_events([(name, v, samples) for name, v in values.items()])


def write_rows(path: Path, columns: tuple[str, ...], rows: list[tuple]):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def append_rows(path: Path, rows: list[tuple]):
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows(rows)


# ------------------------------------------------------------------------------------------------
# The bar
# ------------------------------------------------------------------------------------------------


def device_peak(device: torch.device) -> float | None:
    """TFLOP/s that a device can do at best in bf16; None for what the table does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def show(bar: tqdm, log: Log, flops_per_image: float, peak: float | None):
    """loss 0.093, |g| 0.21, 420 images/s, 0.10 TFLOP/s, MFU 45 %.

    |g|: norm before clipping. TFLOP/s: of all ranks together, training an image = 3 forward passes.
    MFU: that per device, as a share of its peak.
    """
    if not log.rows:
        return
    _, _, loss, norm, _, skipped = log.rows[-1]
    rate = bar.format_dict["rate"] or 0.0
    tflops = rate * 3 * flops_per_image / 1e12
    parts = [f"loss {loss:.4f}", f"|g| {norm:.2f}", f"{tflops:.2f} TFLOP/s"]
    if peak is not None:
        parts.append(f"MFU {tflops / log.world_size / peak:.0%}")
    if skipped:
        parts.append(f"{skipped} skipped")
    bar.set_postfix_str(", ".join(parts))


# ------------------------------------------------------------------------------------------------
# The pictures
# ------------------------------------------------------------------------------------------------


def save_strip(pictures: Tensor, path: Path):
    """(B, 3, H, W) uint8, side by side in one PNG, as they are."""
    path.parent.mkdir(exist_ok=True)
    row = torch.cat(list(pictures), dim=2).permute(1, 2, 0)  # (H, B·W, 3)
    Image.fromarray(row.numpy()).save(path)


def plot_progress(folder: Path, captions: list[str], path: Path):
    """Every strip of the folder, a row each, under the prompts of its pictures."""
    import matplotlib.pyplot as plt

    strips = sorted(folder.glob("[0-9]*.png"))
    images = [np.asarray(Image.open(strip)) for strip in strips]  # (H, columns·W, 3)
    columns = len(captions)
    figure, axes = plt.subplots(
        len(strips), columns, figsize=(0.95 * columns + 0.7, 0.95 * len(strips) + 0.7),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, strip, image in zip(axes, strips, images, strict=True):
        for axis, picture in zip(row, np.split(image, columns, axis=1), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{int(strip.stem):,}", fontsize=7)
    for axis, caption in zip(axes[0], captions, strict=False):
        axis.set_title(textwrap.fill(caption, 16), fontsize=5.5, parse_math=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(log_rows: list[tuple], eval_rows: list[tuple], path: Path):
    """Loss and scores over the samples seen, and the last validation loss against t."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    names = eval_columns(scored=len(eval_rows[-1]) > 10)[10:]
    panels = 3 if names else 2
    figure, axes = plt.subplots(1, panels, figsize=(14 * panels / 3, 3.8), layout="constrained")
    left, middle = axes[:2]
    left.plot([r[1] for r in log_rows], [r[2] for r in log_rows], alpha=0.5, label="training")
    seen = [row[0] for row in eval_rows]
    left.plot(seen, [row[1] for row in eval_rows], "o-", label="validation, t = 0, 1/8 … 7/8")
    left.set(xlabel="samples", ylabel="loss", yscale="log")
    left.legend()
    middle.bar([i / 8 for i in range(8)], eval_rows[-1][2:10], width=0.1)
    middle.set(xlabel="t   (0 = data, 1 = noise)", ylabel="validation loss")
    for i, name in enumerate(names, start=10):
        style = {"color": "black", "linewidth": 2.5} if name == "mean" else {}
        axes[2].plot(seen, [row[i] for row in eval_rows], "o-", markersize=3, label=name, **style)
    if names:
        axes[2].set(xlabel="samples", ylabel="share of pictures that obey", ylim=(0, 1))
        axes[2].legend(fontsize=7)
    for axis in (left, *axes[2:]):
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k for 200000
    figure.savefig(path, dpi=100)
    plt.close(figure)
