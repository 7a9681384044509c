"""How good are the digits? A small CNN, trained on the real images, reads the generated ones.

    python experiments/digit_score.py runs/mnist               every solver at 1, 2, 4, … 32 steps
    python experiments/digit_score.py runs/mnist --quick       only the run's own sampler

Two figures for 1,000 class-conditional samples, beside those of 1,000 real images that the CNN has
not seen, which are the ceiling:
    recognised  share that the CNN reads as the class that was asked for
    Fréchet     distance between the Gaussians fitted to the CNN's last features of the samples and
                of the real test set: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)  (Heusel et al. 2017,
                1706.08500, with our CNN for Inception: compare only within one data set)
Writes digit_score.csv and digit_score.png into the run's folder. The CNN is trained once (about a
minute on two cores) and kept in --cache.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules one folder up

import rf
from data_mnist import (
    ImageSet,
    OneHotText,
    fingerprint,
    load_images,
    to_bytes,
    to_unit,
)
from mmdit import MMDiT, load_model
from train_mnist import choose_device

UNSEEN = 5000  # training images that the CNN never sees: the "real" row comes from them
COLUMNS = ("solver", "steps", "evaluations", "recognised", "frechet", "frechet_ratio")

# ------------------------------------------------------------------------------------------------
# The reader
# ------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """(B, C, S, S) in [−1, 1] → features (B, 128) → class scores: three convolutions, one layer."""

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__()

        def stage(fan_in: int, fan_out: int):
            return [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]

        self.features = nn.Sequential(
            *stage(channels, 32), nn.MaxPool2d(2),
            *stage(32, 64), nn.MaxPool2d(2),
            *stage(64, 128), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128 * (size // 8) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))


def reader_for(dataset: ImageSet, cache: Path, device: torch.device, epochs: int = 3) -> Reader:
    """A Reader of the data set's training images but the unseen ones, from the cache if there."""
    seen = shuffled(dataset)[n_unseen(dataset) :]
    n_seen = len(seen)
    _, channels, size, _ = dataset.images.shape
    torch.manual_seed(0)
    reader = Reader(channels, size, len(dataset.classes)).to(device)
    path = cache / f"reader-{dataset.source}-{fingerprint(dataset)}.safetensors"
    if path.exists():
        reader.load_state_dict(load_file(path, device=str(device)))
        return reader.eval()
    batch_size = min(128, n_seen)
    total = epochs * (n_seen // batch_size)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    with tqdm(total=total, desc="training the reader", unit="step") as bar:
        for _ in range(epochs):
            order = seen[torch.randperm(n_seen)]
            for part in order[: total // epochs * batch_size].split(batch_size):
                x = to_unit(dataset.images[part].to(device))
                loss = F.cross_entropy(reader(x), dataset.labels[part].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    cache.mkdir(parents=True, exist_ok=True)
    save_file(reader.state_dict(), path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return reader.eval()


def shuffled(dataset: ImageSet) -> Tensor:
    """The order in which the first n_unseen images are kept from the reader."""
    return torch.randperm(len(dataset.labels), generator=torch.Generator().manual_seed(0))


def n_unseen(dataset: ImageSet) -> int:
    return min(UNSEEN, len(dataset.labels) // 10)


# ------------------------------------------------------------------------------------------------
# The two figures
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(reader: Reader, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 images → features (N, 128) and the class read in each (N,), on the CPU."""
    features, classes = [], []
    for part in images.split(500):
        f = reader.features(to_unit(part.to(device)))
        features.append(f.cpu())
        classes.append(reader.classify(f).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of features, (N, D) and (M, D); in float64."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (Σ_a Σ_b)^½ through the symmetric Σ_a^½ Σ_b Σ_a^½, which has the same eigenvalues
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


def draw(
    model: MMDiT, text: OneHotText, n: int, size: tuple[int, int], device, batch: int = 250, **how
) -> tuple[Tensor, Tensor]:
    """n samples (N, C, H, W) uint8 and the classes asked for, each class equally often; seeded."""
    labels = torch.arange(n) % text.null
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(n, model.config.in_channels, *size, generator=generator)
    parts = [
        rf.sample(model, e.to(device), text(y.to(device)), null_text=text.null_text, **how)
        for e, y in zip(noise.split(batch), labels.split(batch), strict=True)
    ]
    return to_bytes(torch.cat(parts).cpu()), labels


# ------------------------------------------------------------------------------------------------
# Table and plot
# ------------------------------------------------------------------------------------------------


def plot(rows: list[tuple], real: tuple[float, float], path: Path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for solver in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == solver]
        evaluations = [row[2] for row in mine]
        left.plot(evaluations, [100 * row[3] for row in mine], "o-", label=solver)
        right.plot(evaluations, [row[4] for row in mine], "o-", label=solver)
    left.axhline(100 * real[0], color="grey", ls="--", label="real images")
    right.axhline(real[1], color="grey", ls="--", label="real images")
    left.set(ylabel="recognised as the class asked for (%)", xscale="log")
    right.set(ylabel="Fréchet distance to the test set", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set_xlabel("model evaluations a sample")
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that train_mnist.py wrote")
    parser.add_argument("--data-dir", type=Path, help="(default: where the run had it)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="samples a setting (default: 1000)"
    )
    parser.add_argument("--solvers", nargs="+", default=list(rf.SOLVERS), choices=rf.SOLVERS)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--cfg", type=float, help="guidance (default: the run's)")
    parser.add_argument("--quick", action="store_true", help="only the run's own sampler")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/readers"), help="where CNNs are kept"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, mps or cuda")
    args = parser.parse_args(argv)
    try:
        rows = score(args)
    except (ValueError, OSError) as error:
        sys.exit(f"digit_score.py: {error}")
    return rows


def score(args: argparse.Namespace) -> list[tuple]:
    device = choose_device(args.device)
    model = load_model(args.run, device)
    run = json.loads((args.run / "config.json").read_text()).get("run")
    if run is None:
        raise ValueError(f"{args.run} is no run of train_mnist.py: its config.json has no 'run'")
    if args.samples < 2:
        raise ValueError(f"--samples {args.samples} must be at least 2")
    training, test = load_images(
        run["dataset"], args.data_dir or run["data_dir"], size=run["size"], seed=run["seed"]
    )
    reader = reader_for(training, args.cache, device)
    test_features, test_read = read(reader, test.images, device)
    accuracy = (test_read == test.labels).double().mean().item()
    unseen = shuffled(training)[: min(n_unseen(training), args.samples)]
    if len(unseen) < args.samples:
        print(f"only {len(unseen)} unseen real images: their Fréchet distance reads too large")
    real_features, real_read = read(reader, training.images[unseen], device)
    real_share = (real_read == training.labels[unseen]).double().mean().item()
    real = (real_share, frechet_distance(real_features, test_features))
    print(f"the reader is right on {accuracy:.2%} of the test set")
    print(f"{'':>10} {'steps':>5} {'evals':>5} {'recognised':>10} {'Fréchet':>8} {'/ real':>6}")
    print(f"{'real':>10} {'':>5} {'':>5} {real[0]:>10.1%} {real[1]:>8.2f} {1:>6.2f}")

    settings = [(s, n) for s in args.solvers for n in args.steps]
    if args.quick:
        settings = [(run["solver"], run["sample_steps"])]
    cfg = run["cfg"] if args.cfg is None else args.cfg
    text, rows = OneHotText(len(training.classes), device), []
    for solver, steps in settings:
        started = time.time()
        how = {"solver": solver, "steps": steps, "cfg": cfg, "shift": run["shift"]}
        images, asked = draw(model, text, args.samples, test.images.shape[2:], device, **how)
        features, classes = read(reader, images, device)
        recognised = (classes == asked).double().mean().item()
        distance = frechet_distance(features, test_features)
        evaluations = {"euler": steps, "heun": 2 * steps - 1, "rf_solver": 2 * steps}[solver]
        rows.append((solver, steps, evaluations, recognised, distance, distance / real[1]))
        print(
            f"{solver:>10} {steps:>5} {evaluations:>5} {recognised:>10.1%} {distance:>8.2f}"
            f" {distance / real[1]:>6.2f}   ({time.time() - started:.0f} s)", flush=True
        )  # fmt: skip
    if not args.quick:
        with open(args.run / "digit_score.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, ("real", "", "", *real, 1.0), *rows])
        plot(rows, real, args.run / "digit_score.png")
        print(f"wrote {args.run}/digit_score.csv and digit_score.png")
    return rows


if __name__ == "__main__":
    main()
