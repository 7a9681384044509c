"""PICTURES: what a program leaves to look at.

    captioned, classes, progress   a sheet: pictures row by row, with words above and beside them
    film, strip                    pixels as they are: an animation, one row
    curves                         the loss and the scores of a run

All pictures are uint8 (B, C, H, W) on the CPU, C = 1 (grey) or 3.
"""

import textwrap
from contextlib import suppress
from io import BytesIO
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.start import MARK, write_whole

matplotlib.rcdefaults()  # a notebook's or a user's habits must not end a run at its first picture
matplotlib.use("Agg")


GIF_SIDE = 2**16 - 1  # pixels: the format has no room for more
SIGN = b"drawn by a rectified flow"  # in every file: what lacks it is the user's


def encoded(picture, **how) -> memoryview:
    """An image of PIL as the bytes of a PNG, or as `how` says."""
    from PIL.PngImagePlugin import PngInfo

    signed, content = PngInfo(), BytesIO()
    signed.add_text("Comment", SIGN.decode())
    picture.save(content, **{"format": "PNG", "pnginfo": signed, "comment": SIGN} | how)
    return content.getbuffer()


def save_figure(figure, path: Path, **how):
    """Write a figure of matplotlib as a PNG, whole or not at all, and forget it."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Comment": SIGN.decode()}, **how)
    plt.close(figure)
    write_whole(path, content.getbuffer())


def png_path(path: Path, option: str = "--out"):
    """ValueError unless a PNG can be written there: to be asked before hours of drawing."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"{option} {path} must be the name of a .png file")
    if path.exists() and SIGN not in path.read_bytes():
        raise ValueError(f"{option} {path} is there and was not drawn here: choose another")
    if path.exists() and any((above / MARK).exists() for above in path.resolve().parents[1:]):
        raise ValueError(f"{option} {path} is a picture of a run: choose another")
    if (
        path.stem in ("samples", "progress", "curves", "log", "eval")
        and path.with_name(MARK).exists()
    ):
        raise ValueError(f"{option} {path}: the run has files of this name, choose another")


def grid(pictures: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """(B, C, H, W) → one picture (rows·(H + gap) + gap, columns·(W + gap) + gap, 3), row by row.

    gap: white pixels around each picture (but around a single one: none). Where the last row is
    not full, the rest is white.
    """
    from torchvision.utils import make_grid

    return make_grid(pictures, columns, padding=gap, pad_value=255).permute(1, 2, 0).numpy()


def sheet(
    pictures: Tensor, columns: int, path: Path, above: list[str], beside=(), inches=1.8, wrap=26
):
    """A PNG of pictures, row by row, with words above and beside them.

    above: for the pictures of the first row, or for all. beside: for the rows, at their left.
    inches: width of a picture. wrap: letters in a line of `above`.
    """
    import matplotlib.pyplot as plt

    H, W = pictures.shape[2:]
    gap = W // 32 + 1
    above = [textwrap.fill(text, wrap) for text in above]
    lines = max(text.count("\n") for text in above) + 1
    head = ceil(lines * 0.13 * W / inches) if len(above) > columns else 0  # a line has 0.13 inch
    row = head + H + gap
    image = grid(F.pad(pictures, (0, 0, head, 0), value=255), columns, gap)
    figure = plt.figure(figsize=(inches * image.shape[1] / W, inches * image.shape[0] / W))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image)
    axes.axis("off")
    words = {"fontsize": 7, "parse_math": False}  # a prompt may hold dollars
    for i, text in enumerate(above):
        x, y = (i % columns + 0.5) * (W + gap), i // columns * row + head
        axes.text(x, y, text, ha="center", va="bottom", **words)
    for i, text in enumerate(beside):
        axes.text(0, i * row + head + H / 2, f"{text} ", ha="right", va="center", **words)
    save_figure(figure, path, dpi=120, bbox_inches="tight")


def captioned(pictures: Tensor, captions: list[str], path: Path, columns: int = 6):
    """A PNG of B pictures, each under its caption."""
    sheet(pictures, columns, path, captions)


def classes(pictures: Tensor, names: list[str], path: Path):
    """A PNG with a column for each class: B = rows·len(names) pictures, row by row."""
    sheet(pictures, len(names), path, names, inches=0.8, wrap=12)


def beside(pictures: Tensor):
    """An image of PIL: B pictures side by side, without a gap."""
    from PIL import Image

    return Image.fromarray(grid(pictures, len(pictures), gap=0))


def strip(pictures: Tensor, path: Path):
    """A PNG of B pictures side by side."""
    path.parent.mkdir(exist_ok=True)
    write_whole(path, encoded(beside(pictures)))


def read_png(path: Path) -> Tensor:
    """→ (C, H, W) uint8."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(Image.open(path))


def progress(folder: Path, captions: list[str], path: Path):
    """A PNG of every strip of the folder, a row each, under the captions of their pictures.

    The name of a strip is the number of samples seen: 000000083200.png.
    """
    rows = {}
    for file in sorted(folder.glob(12 * "[0-9]" + ".png")):
        with suppress(OSError):  # damaged: no reason to end a run
            rows[f"{int(file.stem):,}"] = read_png(file)
    *_, last = rows.values()  # a run that was resumed may draw other captions: their rows go
    rows = {seen: row for seen, row in rows.items() if row.shape == last.shape}
    columns, seen = len(captions), list(rows)
    pictures = torch.cat([torch.stack(row.chunk(columns, dim=2)) for row in rows.values()])
    sheet(pictures, columns, path, captions, seen, inches=0.95, wrap=16)


def film(frames: Tensor, columns: int, path: Path):
    """A looping GIF of frames (S, B, C, H, W), from noise to data; it rests on the last one."""
    from PIL import Image

    images = [Image.fromarray(grid(pictures, columns)) for pictures in frames]
    size = images[0].size
    factor = max(1, min(round(300 / size[0]), GIF_SIDE // max(size)))
    images = [
        image.resize((image.width * factor, image.height * factor), Image.NEAREST).quantize(32)
        for image in images  # noise does not compress: few colours and no more pixels than needed
    ]
    durations = [120] * (len(images) - 1) + [2000]  # milliseconds
    how = {"save_all": True, "append_images": images[1:], "duration": durations, "loop": 0}
    write_whole(path, encoded(images[0], format="GIF", **how))


def curves(log: list[dict], evals: list[dict], path: Path):
    """A PNG of the loss over the samples seen, the last held-out loss against t, and the scores.

    log: rows of samples and loss. evals: rows of samples, loss, "loss_t0/8" … "loss_t7/8", and the
    scores, whose names are whatever other keys there are ("mean" is drawn thick).
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    last = evals[-1] if evals else {}
    by_time = [loss for name, loss in last.items() if name.startswith("loss_t")]
    scores = [name for name in last if name != "samples" and not name.startswith("loss")]
    panels = 2 + bool(scores)
    figure, axes = plt.subplots(1, panels, figsize=(4.7 * panels, 3.8), layout="constrained")

    def draw(axis, rows: list[dict], name: str, *style, **options):
        axis.plot([row["samples"] for row in rows], [row[name] for row in rows], *style, **options)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k for 200000
        axis.set(xlabel="samples")
        axis.legend(fontsize=7)

    draw(axes[0], log, "loss", alpha=0.5, label="training")
    draw(axes[0], evals, "loss", "o-", label="held out, t = 0, 1/8 … 7/8")
    axes[0].set(ylabel="loss", yscale="log")
    axes[1].bar([i / 8 for i in range(len(by_time))], by_time, width=0.1)
    axes[1].set(xlabel="t   (0 = data, 1 = noise)", ylabel="held-out loss")
    for name in scores:
        thick = {"color": "black", "linewidth": 2.5} if name == "mean" else {}
        draw(axes[2], evals, name, "o-", markersize=3, label=name, **thick)
    if "mean" in scores:
        axes[2].set(ylabel="share of pictures that obey", ylim=(0, 1))
    save_figure(figure, path, dpi=100)
