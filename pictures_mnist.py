"""CHAPTER 1's PICTURES: samples as a grid and as a film, and the loss.

samples.png   a column a class         samples.gif   from noise to image
loss.png      over steps, and of held-out images against t
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rf
from data_mnist import ImageSet, to_bytes, to_unit
from mmdit import MMDiT

T_BINS = 10  # bars of the loss-against-t picture


def draw_pictures(run, held_out: ImageSet, out: Path):
    """samples.png, samples.gif and loss.png, from the averaged weights."""
    args, model = run.args, run.ema_model()
    columns = min(10, len(run.classes))
    labels = torch.arange(10 * columns, device=run.device) % columns  # a column a class
    config, generator = model.config, torch.Generator().manual_seed(args.seed)
    shape = (len(labels), config.in_channels, *held_out.images.shape[2:])
    path = rf.sample(
        model, torch.randn(shape, generator=generator).to(run.device), run.text(labels),
        null_text=run.text.null_text, cfg=args.cfg, steps=args.sample_steps, solver=args.solver,
        shift=args.shift, return_trajectory=True, progress=True,
    )  # fmt: skip
    names = run.classes[:columns]
    save_grid(path[-1], names, out / "samples.png")
    save_gif(path, columns, out / "samples.gif")
    plot_loss(run.log.rows, loss_against_t(run, model, held_out), out / "loss.png")


def grid(images: Tensor, columns: int) -> np.ndarray:
    """(B, C, H, W) in [−1, 1], B = rows·columns → one picture (H, W, 3) uint8."""
    from torchvision.utils import make_grid

    return make_grid(to_bytes(images.cpu()), nrow=columns, padding=1).permute(1, 2, 0).numpy()


def save_grid(images: Tensor, names: list[str], path: Path):
    import matplotlib.pyplot as plt

    picture, width = grid(images, len(names)), images.shape[-1] + 1
    figure, axes = plt.subplots(figsize=(0.7 * len(names) + 0.4, 7.4))
    axes.imshow(picture, interpolation="nearest")
    axes.xaxis.tick_top()
    axes.set_xticks([width * (i + 0.5) for i in range(len(names))], names)
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_frame_on(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def save_gif(path: Tensor, columns: int, file: Path):
    """path (steps + 1, B, C, H, W) from noise to data, as a looping animation."""
    from PIL import Image

    frames = [Image.fromarray(grid(images, columns)) for images in path]
    factor = max(1, round(300 / frames[0].width))
    frames = [
        frame.resize((frame.width * factor, frame.height * factor), Image.NEAREST).quantize(32)
        for frame in frames  # noise does not compress: few colours and no more pixels than needed
    ]
    durations = [120] * (len(frames) - 1) + [2000]  # milliseconds
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def loss_against_t(run, model: MMDiT, held_out: ImageSet) -> list[float]:
    """Mean loss of held-out images in each of T_BINS equal bins of t, from 0 to 1."""
    n = min(1000, len(held_out.labels))
    generator = torch.Generator().manual_seed(run.args.seed)
    data, labels = to_unit(held_out.images[:n]), held_out.labels[:n]
    noise = torch.randn(data.shape, generator=generator)
    t = rf.sample_time(n, distribution="uniform", stratified=True, generator=generator)
    sums, counts = torch.zeros(T_BINS), torch.zeros(T_BINS)
    with torch.no_grad():
        for part in torch.arange(n).split(250):
            x, s, e = (v[part].to(run.device) for v in (data, t, noise))
            losses = rf.rf_loss(model, x, run.text(labels[part].to(run.device)), t=s, noise=e)
            bins = (t[part] * T_BINS).long()
            sums.index_add_(0, bins, losses.cpu())
            counts.index_add_(0, bins, torch.ones(len(part)))
    return (sums / counts).tolist()


def plot_loss(rows: list[tuple], by_t: list[float], path: Path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot([row[0] for row in rows], [row[1] for row in rows])
    left.set(xlabel="step", ylabel="loss", title="while training", yscale="log")
    centres = [(i + 0.5) / T_BINS for i in range(T_BINS)]
    right.bar(centres, by_t, width=0.9 / T_BINS)
    right.set(xlabel="t   (0 = data, 1 = noise)", title="held-out loss against t")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
