"""How good are the digits? A small CNN, trained on the real images, reads the generated ones.

    python -m experiments.digit_score runs/mnist               every solver at 1, 2, 4, … 32 steps
    python -m experiments.digit_score runs/mnist --quick       only the run's own sampler

Two figures for 1,000 class-conditional samples, beside those of 1,000 real images that the CNN has
not seen, which are the ceiling:
    recognised  share that the CNN reads as the class that was asked for
    Fréchet     distance between the Gaussians fitted to the CNN's last features of the samples and
                of the real test set (common/evaluate.py, with our CNN for Inception: compare only
                within one data set)
Writes digit_score.csv and digit_score.png into the run's folder. The CNN is trained once (about a
minute on two cores) and kept in --cache.

Shapes: N images (N, C, S, S) uint8; their features (N, 128) fp32.
"""

from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

import rf
from common.evaluate import frechet_distance
from common.pictures import SIGN, save_figure
from common.pipeline import Sampling
from common.settings import option, parse
from common.start import program, write_whole
from inputs.digits import SOURCES, ImageSet, fingerprint, load_images
from inputs.encoders import to_unit
from inputs.rows import open_rows
from mmdit import checksum

STEPS = (1, 2, 4, 8, 16, 32)
COLUMNS = ("solver", "steps", "evaluations", "recognised", "frechet")
UNSEEN = 5000  # training images that the CNN never sees: the "real" row comes from them

# ------------------------------------------------------------------------------------------------
# The reader
# ------------------------------------------------------------------------------------------------


def new_reader(channels: int, size: int, classes: int) -> nn.Sequential:
    """(N, C, S, S) in [−1, 1] → class scores; all but its last layer give the features."""

    layers = []
    for sizes in pairwise((channels, 32, 64, 128)):
        layers += [nn.Conv2d(*sizes, 3, padding=1), nn.BatchNorm2d(sizes[1]), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(128 * (size // 8) ** 2, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, classes))


def reader_for(dataset: ImageSet, seen: Tensor, cache: Path, device, epochs: int = 3):
    """A reader of the images with the numbers `seen`, from the cache if it is there."""
    torch.manual_seed(0)
    reader = new_reader(*dataset.images.shape[1:3], len(dataset.classes)).to(device)
    path = cache / f"{dataset.source}-{fingerprint(dataset)}.safetensors"
    if path.exists():
        try:
            tensors = load_file(path, device=str(device))
            reader.load_state_dict(tensors)
            with safe_open(path, "pt") as file:
                if file.metadata() != {"checksum": f"{checksum(tensors)}"}:
                    raise RuntimeError("its weights have changed")
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"the reader {path} is damaged: delete it") from error
        return reader.eval()
    batch = min(128, len(seen))
    steps = len(seen) // batch
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        order = seen[torch.randperm(len(seen))][: steps * batch]
        for part in tqdm(order.split(batch), desc="training the reader"):
            scores = reader(to_unit(dataset.images[part].to(device)))
            F.cross_entropy(scores, dataset.labels[part].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    cache.mkdir(parents=True, exist_ok=True)
    tensors = reader.state_dict()
    write_whole(path, save(tensors, {"checksum": f"{checksum(tensors)}"}))
    return reader.eval()


# ------------------------------------------------------------------------------------------------
# The two figures
# ------------------------------------------------------------------------------------------------


class Judge:
    """Scores samples. `labels`, their `captions` and `noise` are what it asks for, always the same.

    name, data_dir: as of inputs.digits.load_images. cache: folder of the readers. samples: how many
    are asked, each class equally often. seed: of the noise. `real` is the score of as many unseen
    real images; where there are fewer, their Fréchet distance reads too large.
    """

    def __init__(self, name: str, data_dir: Path, cache: Path, samples: int, device, seed: int = 0):
        training, test = load_images(name, data_dir)
        order = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(0))
        unseen = min(UNSEEN, len(order) // 10)
        self.device = device
        self.reader = reader_for(training, order[unseen:], cache, device)
        self.features, _ = self.read(test.images)
        real = order[:unseen][:samples]
        self.real = self.score(training.images[real], training.labels[real])
        self.labels = torch.arange(samples) % len(test.classes)
        self.captions = [test.classes[k] for k in self.labels]
        generator = torch.Generator().manual_seed(1 + seed)
        self.noise = torch.randn(samples, *test.images.shape[1:], generator=generator)

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images → features, and the class read in each (N,), on the CPU."""
        parts = (to_unit(part.to(self.device)) for part in images.split(500))
        features = torch.cat([self.reader[:-1](part) for part in parts])
        return features.cpu(), self.reader[-1](features).argmax(1).cpu()

    def score(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """images, and the labels (N,) that were asked for → share recognised, Fréchet distance."""
        features, classes = self.read(images)
        recognised = (classes == labels).double().mean().item()
        return recognised, frechet_distance(features, self.features)


# ------------------------------------------------------------------------------------------------
# Table and plot
# ------------------------------------------------------------------------------------------------


def plot(table: pd.DataFrame, path: Path):
    """Both figures against evaluations, a line a solver; the first row is the real images'."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, column in zip(axes, ("recognised", "frechet"), strict=True):
        for solver, rows in table[1:].groupby("solver", sort=False):
            axis.plot(rows.evaluations, rows[column], "o-", label=solver)
        axis.axhline(table[column][0], color="grey", ls="--", label="real images")
        axis.set(xlabel="model evaluations a sample", ylabel=column, xscale="log")
        axis.legend()
    axes[1].set_yscale("log")
    save_figure(figure, path, dpi=100)


@dataclass(frozen=True)
class Settings(Sampling):
    data: str | None = option(None, "whose real images (the run's)")
    data_dir: Path = option(Path("data"), "where they lie")
    samples: int = option(1000, "samples a setting", least=2)
    quick: bool = option(False, "only the run's own sampler, or --solver and --steps; no files")
    cache: Path = option(Path("runs/readers"), "where CNNs are kept")


@program("experiments.digit_score")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    pipeline, table = args.open(), Path(args.run) / "digit_score.csv"
    ours = {table: ",".join(COLUMNS).encode(), table.with_suffix(".png"): SIGN}
    for file, sign in () if args.quick else ours.items():
        if file.exists() and sign not in file.read_bytes():
            raise ValueError(f"{file} would be overwritten: move it away")
    facts = pipeline.facts
    name = args.data or facts["source"]
    if not args.data and name in SOURCES:  # or a damaged test set would be a low score
        known = open_rows([name], data_dir=args.data_dir, seed=facts["seed"]).id
        if facts["rows"] != known:
            raise ValueError(f"{name} holds other images than {args.run} was trained on")
    judge = Judge(name, args.data_dir, args.cache, args.samples, pipeline.device, args.seed)
    rows = [("real", "", "", *judge.real)]
    quick = [(args.solver or facts["solver"], args.steps or facts["steps"])]
    for solver, steps in tqdm(quick if args.quick else list(product(rf.SOLVERS, STEPS))):
        how = args.how() | {"steps": steps, "solver": solver}
        score = judge.score(pipeline.draw(judge.captions, judge.noise, **how), judge.labels)
        evaluations = {"euler": steps, "heun": 2 * steps - 1, "rf_solver": 2 * steps}[solver]
        rows.append((solver, steps, evaluations, *score))
    found = pd.DataFrame(rows, columns=COLUMNS)
    found["frechet_ratio"] = found.frechet / judge.real[1]
    print(found.to_string(index=False, float_format="{:.3f}".format))
    if not args.quick:
        write_whole(table, found.to_csv(index=False).encode())
        plot(found, table.with_suffix(".png"))
        print(f"wrote {args.run}/digit_score.csv and digit_score.png")


if __name__ == "__main__":
    main()
