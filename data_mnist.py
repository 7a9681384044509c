"""CHAPTER 1's DATA: small labelled images from five sources, held in memory as bytes.

    mnist, cifar10   torchvision, downloaded once
    glyphs           digits drawn from matplotlib's own fonts: no download, seeded
    folder           one sub-folder a class, any image format
    parquet          a parquet file, or a folder of them, with an image and a label column

A label is a one-word caption: one-hot (B, 1, num_classes + 1), whose last class means "no caption".
That is all the text encoder chapter 1 needs, and chapter 2's network takes it unchanged.
"""

import io
import re
import socket
import sys
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

SOURCES = ("auto", "mnist", "glyphs", "cifar10", "folder", "parquet")
HELD_OUT = 0.1  # share of a folder or parquet file without a test split that is kept from training
UNREADABLE_LIMIT = 0.01  # share of images that may be skipped


class ImageSet(NamedTuple):
    """Images (N, C, H, W) uint8, labels (N,) int64, the classes' names, and their source."""

    images: Tensor
    labels: Tensor
    classes: list[str]
    source: str


def load_images(
    source: str, data_dir: str | Path = "data", *, size: int = 32, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """The training images and the held-out ones of a source named in SOURCES.

    size: side in pixels to which folder and parquet images are cropped and scaled; the others have
    their own. seed: draws the glyphs, and the held-out part where the source has no test split.
    Raises ValueError or FileNotFoundError in one line with the ways out; "auto" is MNIST, or glyphs
    where MNIST cannot be had.
    """
    if source not in SOURCES:
        raise ValueError(f"--dataset {source!r} must be one of {', '.join(SOURCES)}")
    data_dir = Path(data_dir)
    if source == "auto":
        try:
            return load_torchvision("mnist", data_dir)
        except ValueError as error:
            print(f"{error}. Training on glyphs instead.", file=sys.stderr)
            source = "glyphs"
    if source == "glyphs":
        return glyphs(60_000, seed=2 * seed), glyphs(10_000, seed=2 * seed + 1)
    if source in ("mnist", "cifar10"):
        return load_torchvision(source, data_dir)
    if not data_dir.exists():
        raise FileNotFoundError(f"--data-dir {data_dir} does not exist: give the {source} to read")
    return (load_folder if source == "folder" else load_parquet)(data_dir, size, seed)


class OneHotText:
    """Labels (B,) int64 → one-word captions (B, 1, num_classes + 1) fp32, looked up on the device.

    `null` is the label of "no caption".
    """

    def __init__(self, num_classes: int, device: str | torch.device = "cpu"):
        self.null = num_classes
        self.words = torch.eye(num_classes + 1, device=device)

    def __call__(self, labels: Tensor) -> Tensor:
        return self.words[labels][:, None]

    @property
    def null_text(self) -> Tensor:
        return self.words[-1:, None]


def fingerprint(dataset: ImageSet) -> str:
    """Eight hexadecimal digits that tell one set of images and labels from another."""
    checksum = zlib.crc32(dataset.images.numpy().tobytes())
    return f"{zlib.crc32(dataset.labels.numpy().tobytes(), checksum):08x}"


def to_unit(images: Tensor) -> Tensor:
    """uint8 in 0..255 → fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """float in [−1, 1] (clamped) → uint8 in 0..255: the inverse of to_unit."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# Batches: a function of (seed, step) alone
# ------------------------------------------------------------------------------------------------


def mix_seed(seed: int, purpose: str, number: int) -> int:
    """One seed from three. Adding them up would not do: torch's CPU generator looks at 32 bits."""
    words = (seed, *purpose.encode(), number)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class Batch(NamedTuple):
    data: Tensor  # (B, C, H, W) fp32 in [−1, 1]
    labels: Tensor  # (B,) int64, some replaced by the null label
    generator: torch.Generator  # at the place where the step's noise and time come from
    noise: Tensor | None = None  # like data; pairs (pairs.py) bring it, and
    t: Tensor | None = None  # (B,) fp32


class Batches:
    """batches[step]: the same for the same seed, whatever ran before; so resuming is exact.

    Samples come from one seeded permutation an epoch. The bytes lie on the device. Each step's
    flip, label dropout, noise and time come from a generator seeded by (seed, step).
    """

    def __init__(
        self, dataset: ImageSet, batch_size: int, *, seed: int, flip: bool, dropout: float, device
    ):
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.null = len(dataset.classes)
        self.batch_size, self.seed, self.flip, self.dropout = batch_size, seed, flip, dropout
        self.generator = torch.Generator(device)
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "epoch", epoch))
        return torch.randperm(len(self.labels), generator=generator).to(self.images.device)

    def indices(self, step: int) -> Tensor:
        """Positions step·B … step·B + B − 1 of the endless row of permuted epochs, (B,) int64."""
        first, last, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while first < last:
            epoch, offset = divmod(first, len(self.labels))
            parts.append(self.permutation(epoch)[offset : offset + last - first])
            first += len(parts[-1])
        return torch.cat(parts)

    def __getitem__(self, step: int) -> Batch:
        generator = self.generator.manual_seed(mix_seed(self.seed, "step", step))
        random = {"generator": generator, "device": self.images.device}
        index = self.indices(step)
        data, labels = to_unit(self.images[index]), self.labels[index]
        if self.flip:
            mirrored = torch.rand(self.batch_size, **random) < 0.5
            data = torch.where(mirrored[:, None, None, None], data.flip(3), data)
        dropped = torch.rand(self.batch_size, **random) < self.dropout
        return Batch(data, labels.masked_fill(dropped, self.null), generator)


# ------------------------------------------------------------------------------------------------
# Sources
# ------------------------------------------------------------------------------------------------


def load_torchvision(source: str, data_dir: Path) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    data_class = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[source]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without an answer before a mirror is given up
    try:
        parts = [data_class(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # the deepest one
        raise ValueError(
            f"{source} is not in {data_dir} and could not be downloaded ({reason}); give its folder"
            " with --data-dir, or train without a download with --dataset glyphs"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)

    def image_set(part) -> ImageSet:
        pixels = torch.as_tensor(part.data)  # MNIST (N, H, W), CIFAR (N, H, W, C)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        classes = [c.split(" - ")[0] for c in part.classes]  # "7 - seven"
        return ImageSet(images, torch.as_tensor(part.targets), classes, source)

    return image_set(parts[0]), image_set(parts[1])


def load_folder(data_dir: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    if not data_dir.is_dir():
        raise ValueError(f"--data-dir {data_dir} is a file; --dataset folder needs a folder")
    classes = sorted(d.name for d in data_dir.iterdir() if d.is_dir() and d.name[0] != ".")
    files = [(f, k) for k, c in enumerate(classes) for f in sorted((data_dir / c).rglob("*"))]
    files = [(f, k) for f, k in files if f.is_file() and f.name[0] != "."]
    if len(files) < 2:
        raise ValueError(
            f"--data-dir {data_dir} holds {len(files)} images: make one sub-folder a class and put"
            " them there"
        )
    rows = ((str(f), f.read_bytes, k) for f, k in files)
    return hold_out(ImageSet(*decode(rows, len(files), size), classes, "folder"), seed)


def load_parquet(data_dir: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    try:
        from datasets import ClassLabel, Dataset
        from datasets import Image as ImageFeature
    except ImportError as error:
        raise ValueError("--dataset parquet needs the package: pip install datasets") from error
    files = sorted(data_dir.rglob("*.parquet")) if data_dir.is_dir() else [data_dir]
    if not files:
        raise ValueError(f"--data-dir {data_dir} holds no .parquet file")

    # Hub layouts name the split in the file (test-0000.parquet) or its folder (test/0000.parquet).
    is_test = {
        f: "test" in re.split("[^a-z]+", str(f.relative_to(data_dir)).lower()) for f in files
    }

    def table_of(files: list[Path]):
        try:
            return Dataset.from_parquet([str(f) for f in files])
        except Exception as error:  # of `datasets`, pyarrow or the file system
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"--data-dir {data_dir} is not readable parquet: {reason}") from error

    training = table_of([f for f in files if not is_test[f]] or files)
    image_column = _column(training, ("image", "img", "picture"))
    label_column = _column(training, ("label", "labels", "class", "fine_label"))
    feature = training.features[label_column]
    named = isinstance(feature, ClassLabel)
    classes = feature.names if named else sorted(set(training[label_column]))
    number = {value: k for k, value in enumerate(range(len(classes)) if named else classes)}

    def image_set(table) -> ImageSet:
        unknown = sorted(set(table[label_column]) - set(number))
        if unknown:
            raise ValueError(f"--data-dir {data_dir}: the test split has unknown labels {unknown}")

        def rows():
            for i, row in enumerate(table.cast_column(image_column, ImageFeature(decode=False))):
                yield f"row {i}", partial(cell_bytes, row[image_column]), number[row[label_column]]

        images, labels = decode(rows(), len(table), size)
        return ImageSet(images, labels, [str(c) for c in classes], "parquet")

    if len(set(is_test.values())) == 2:
        return image_set(training), image_set(table_of([f for f in files if is_test[f]]))
    return hold_out(image_set(training), seed)


def cell_bytes(cell: dict) -> bytes:
    """The file behind an image cell of `datasets`, which holds its bytes or its path."""
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def _column(table, candidates: tuple[str, ...]) -> str:
    for name in candidates:
        if name in table.column_names:
            return name
    there = ", ".join(table.column_names)
    raise ValueError(f"the parquet data has no column {' / '.join(candidates)}; there are: {there}")


def hold_out(whole: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """A seeded tenth, at least one image, is kept from training."""
    n = len(whole.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    training, held_out = order[max(1, int(HELD_OUT * n)) :], order[: max(1, int(HELD_OUT * n))]
    return tuple(
        whole._replace(images=whole.images[part], labels=whole.labels[part])
        for part in (training, held_out)
    )


def decode(
    rows: Iterable[tuple[str, Callable[[], bytes], int]], total: int, size: int
) -> tuple[Tensor, Tensor]:
    """(name, read, label) rows → images (N, C, size, size) uint8 and labels; C = 1 if all are grey.

    Images are cropped to a centred square and scaled. Unreadable ones are named, counted and
    skipped, up to 1 %; above that it is a ValueError.
    """
    images, labels, bad = np.empty((total, size, size, 3), np.uint8), [], []
    for name, read, label in tqdm(rows, total=total, desc="reading images", unit="img"):
        try:
            with Image.open(io.BytesIO(read())) as image:
                images[len(labels)] = ImageOps.fit(image.convert("RGB"), (size, size))
            labels.append(label)
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            bad.append(f"{name} ({(str(error) or type(error).__name__).splitlines()[0]})")
    if bad:
        listed = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
        found = f"{len(bad)} of {total} images are unreadable: {listed}"
        if len(bad) > UNREADABLE_LIMIT * total:
            raise ValueError(
                f"{found}; at most {UNREADABLE_LIMIT:.0%} may be: repair or remove them"
            )
        print(f"{found}; skipped", file=sys.stderr)
    x = torch.from_numpy(images[: len(labels)]).permute(0, 3, 1, 2)
    grey = bool((x[:, :1] == x).all())
    return (x[:, :1] if grey else x).contiguous(), torch.tensor(labels)


# ------------------------------------------------------------------------------------------------
# Glyphs: digits from matplotlib's fonts
# ------------------------------------------------------------------------------------------------

GLYPH_FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10", "cmb10", "cmss10", "cmtt10")
GLYPH_CANVAS = 64  # pixels a side on which a font draws a digit, before it is warped to 28


@lru_cache(maxsize=1)
def glyph_masks() -> Tensor:
    """(fonts, 10, 64, 64) fp32 in [0, 1]: each digit of each font, centred by its ink's box."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(f for pattern in GLYPH_FONTS for f in folder.glob(f"{pattern}.ttf"))
    files = [f for f in files if "Display" not in f.name]
    masks = torch.zeros(len(files), 10, GLYPH_CANVAS, GLYPH_CANVAS)
    for row, file in zip(masks, files, strict=True):
        font = ImageFont.truetype(str(file), 48)
        for digit in range(10):
            canvas = Image.new("L", (GLYPH_CANVAS, GLYPH_CANVAS))
            left, top, right, bottom = font.getbbox(str(digit))
            at = ((GLYPH_CANVAS - left - right) / 2, (GLYPH_CANVAS - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(at, str(digit), fill=255, font=font)
            row[digit] = torch.from_numpy(np.array(canvas)).float() / 255
    return masks


def glyphs(n: int, seed: int = 0) -> ImageSet:
    """n digits 28×28, each of a random font, rotation, shear, scale, shift and weight; seeded."""
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
        # grid_sample asks where each output pixel comes from: the inverse of the digit's warp
        warp = torch.stack(
            [cos, shear * cos - sin, uniform(-0.12, 0.12, B),
             sin, shear * sin + cos, uniform(-0.12, 0.12, B)], dim=1,
        ).view(B, 2, 3)  # fmt: skip
        grid = F.affine_grid(warp, [B, 1, 28, 28], align_corners=False)
        soft = F.avg_pool2d(masks[fonts, digits][:, None], 3, stride=1, padding=1)  # blurred edges
        ink = F.grid_sample(soft, grid, align_corners=False)
        weight = uniform(0.25, 0.5, B)[:, None, None, None]  # where the edge is cut: bold to thin
        images.append((((ink - weight) * 5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return ImageSet(torch.cat(images), labels, [str(i) for i in range(10)], "glyphs")
