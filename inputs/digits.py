"""CHAPTER 1's IMAGES: three small labelled sets, held in memory as bytes.

    mnist, cifar10   torchvision, downloaded once
    glyphs           digits drawn from matplotlib's own fonts: no download, seeded

Any other images come through a prepared folder (tools/prepare.py).
"""

import socket
import sys
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.start import line_of

SOURCES = ("auto", "mnist", "glyphs", "cifar10")


class ImageSet(NamedTuple):
    """Images (N, C, H, W) uint8, labels (N,) int64, the classes' names, and their source."""

    images: Tensor
    labels: Tensor
    classes: list[str]
    source: str


def load_images(
    source: str, data_dir: str | Path = "data", seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """The training images and the held-out ones of a source named in SOURCES.

    "auto" is MNIST, or glyphs where MNIST cannot be had (a line on stderr says so). data_dir: where
    torchvision finds or puts its files. seed: draws the glyphs.
    Raises ValueError for another source, and where a set cannot be downloaded.
    """
    if source not in SOURCES:
        raise ValueError(f"images {source!r}: must be one of {', '.join(SOURCES)}")
    if source == "auto":
        try:
            return load_torchvision("mnist", data_dir)
        except ValueError as error:
            print(f"{error}. Training on glyphs instead.", file=sys.stderr)
    if source in ("mnist", "cifar10"):
        return load_torchvision(source, data_dir)
    return glyphs(60_000, seed=2 * seed), glyphs(10_000, seed=2 * seed + 1)


MNIST = ["60637407", "895a175a"]  # the fingerprints of its two parts


def fingerprint(dataset: ImageSet) -> str:
    """Eight hexadecimal digits that tell one set of images and labels from another."""
    checksum = zlib.crc32(dataset.images.numpy())
    return f"{zlib.crc32(dataset.labels.numpy(), checksum):08x}"


def load_torchvision(source: str, data_dir: str | Path) -> tuple[ImageSet, ImageSet]:
    """The training and the test set of "mnist" or "cifar10".

    Raises ValueError in one line with the ways out where data_dir lacks it and no mirror answers,
    and where its files are damaged.
    """
    from torchvision import datasets

    data_class = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[source]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without an answer before a mirror is given up
    try:
        parts = [data_class(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # of a network, or of a file that is not what its name says
        reason = line_of(error, -1)  # the deepest one
        absent = isinstance(error, OSError) or "download" in str(error)
        what = "is not there and could not be downloaded" if absent else "is damaged: delete it"
        raise ValueError(
            f"{source} in {data_dir} {what} ({reason}); give its folder with --data-dir, or train"
            " without a download with --data glyphs"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)

    def image_set(part) -> ImageSet:
        pixels = torch.as_tensor(part.data)  # MNIST (N, H, W), CIFAR (N, H, W, C)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        classes = [c.split(" - ")[0] for c in part.classes]  # "7 - seven"
        labels = torch.as_tensor(part.targets)
        if len(labels) != len(images) or labels.unique().tolist()[-1:] >= [len(classes)]:
            raise ValueError(
                f"{source} in {data_dir} is damaged: delete it. It has {len(images)} images,"
                f" {len(labels)} labels, the highest {max(labels.tolist(), default=None)}"
            )
        return ImageSet(images, labels, classes, source)

    training, test = map(image_set, parts)
    shapes = {tuple(part.images.shape[1:]) for part in (training, test)}
    if len(shapes) > 1 or training.images.shape[2] != training.images.shape[3]:
        raise ValueError(f"{source} in {data_dir} has pictures of {shapes}, must be of one square")
    if source == "mnist" and [fingerprint(training), fingerprint(test)] != MNIST:
        print(f"{source} in {data_dir} is another set of its form, or damaged", file=sys.stderr)
    return training, test


# ------------------------------------------------------------------------------------------------
# Glyphs: digits from matplotlib's fonts
# ------------------------------------------------------------------------------------------------

FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10", "cmb10", "cmss10", "cmtt10")
CANVAS = 64  # pixels a side on which a font draws a digit, before it is warped to 28


@lru_cache(maxsize=1)
def glyph_masks() -> Tensor:
    """(fonts, 10, 64, 64) fp32 in [0, 1]: each digit of each font, centred by its ink's box."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(f for pattern in FONTS for f in folder.glob(f"{pattern}.ttf"))
    files = [f for f in files if "Display" not in f.name]  # these hold no digits
    masks = torch.zeros(len(files), 10, CANVAS, CANVAS)
    for row, file in zip(masks, files, strict=True):
        font = ImageFont.truetype(str(file), 48)
        for digit in range(10):
            canvas = Image.new("L", (CANVAS, CANVAS))
            left, top, right, bottom = font.getbbox(str(digit))
            at = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(at, str(digit), fill=255, font=font)
            row[digit] = torch.from_numpy(np.array(canvas)).float() / 255
    return masks


def glyphs(n: int, seed: int = 0) -> ImageSet:
    """n digits (1, 28, 28), each of a random font, rotation, shear, scale, shift and weight.

    The same n and seed give the same images.
    """
    masks, images = glyph_masks(), []
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)

    def uniform(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    for digits in labels.split(2000):
        B = len(digits)
        fonts = torch.randint(len(masks), (B,), generator=generator)
        angle, shear = uniform(-0.25, 0.25, B), uniform(-0.3, 0.3, B)  # radians, run per rise
        width, height = uniform(1.0, 1.35, B), uniform(1.0, 1.35, B)
        cos, sin = angle.cos() / width, angle.sin() / height
        # grid_sample asks where each output pixel comes from: the inverse of the digit's warp,
        # two rows (x from x, x from y, shift) and (y from x, y from y, shift).
        to_x = [cos, shear * cos - sin, uniform(-0.12, 0.12, B)]
        to_y = [sin, shear * sin + cos, uniform(-0.12, 0.12, B)]
        warp = torch.stack(to_x + to_y, dim=1).view(B, 2, 3)
        grid = F.affine_grid(warp, [B, 1, 28, 28], align_corners=False)
        soft = F.avg_pool2d(masks[fonts, digits][:, None], 3, stride=1, padding=1)  # blurred edges
        ink = F.grid_sample(soft, grid, align_corners=False)
        weight = uniform(0.25, 0.5, B)[:, None, None, None]  # where the edge is cut: bold to thin
        images.append((((ink - weight) * 5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return ImageSet(torch.cat(images), labels, [str(i) for i in range(10)], "glyphs")
