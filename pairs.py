"""PAIRS: noise, and what a model makes of it: what the next, straighter flow is trained on.

    python pairs.py runs/mnist --out data/mnist-pairs
    python train_mnist.py --pairs data/mnist-pairs --init runs/mnist --out runs/mnist2
    python pairs.py runs/shapes --out data/shapes-pairs --segments 4
    deepspeed train_t2i.py --pairs data/shapes-pairs --init runs/shapes --out runs/shapes4

A folder holds pairs.json, how they were made, and shards 00000.safetensors, …; shard i is a
function of (seed, i) alone and appears whole or not at all. So a killed command goes on where it
was, and what comes out is the same to the byte (on the same kind of device).

Shapes: K segments; states (B, K + 1, C, h, w) from the noise to the data, see rf.reflow_states.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import cpu
import rf
from cache import write_whole
from data_mnist import Batch, Batches, OneHotText, mix_seed

ABOUT = "pairs.json"
HELD = 512  # pairs kept from training, at most a tenth

# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


class Pairs:
    """A folder of pairs: about (pairs.json), len, states and words (a label or a caption) of row i.

    Raises FileNotFoundError if it is none, ValueError if it is not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            raise FileNotFoundError(f"--pairs {folder} holds no {ABOUT}: make it with pairs.py")
        self.about = read_about(self.folder)
        self.files = [self.folder / f"{i:05d}.safetensors" for i in range(n_shards(self.about))]
        missing = sum(not file.exists() for file in self.files)
        if missing:
            raise ValueError(
                f"--pairs {folder} is not finished, {missing} of {len(self.files)} shards are"
                " missing: run its pairs.py command again"
            )
        self.id = f"{zlib.crc32(json.dumps(self.about, sort_keys=True).encode()):08x}"
        self.open = lru_cache(maxsize=None)(self._open)  # mapped into memory, not read
        self.captions = lru_cache(maxsize=64)(self._captions)

    def __len__(self) -> int:
        return self.about["number"]

    def _open(self, shard: int):
        try:
            file = safe_open(self.files[shard], "pt")
            wanted = {"states", "labels"} if self.about["words"] == "labels" else {"states"}
            if set(file.keys()) != wanted:
                raise ValueError(f"it holds {', '.join(file.keys())}")
            return file
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{self.files[shard]} is broken: delete it, run pairs.py") from error

    @property
    def held(self) -> int:
        """How many pairs, the last ones, chapter 2 keeps for the validation loss."""
        return min(HELD, len(self) // 10)

    def coarser(self, states: Tensor, segments: int) -> Tensor:
        """Every so many-th state of (B, K + 1, ...), so that `segments` are left."""
        there = self.about["segments"]
        if segments < 1 or there % segments:
            raise ValueError(f"--segments {segments} must divide the {there} of {self.folder}")
        return states[:, :: there // segments]

    def row(self, i: int) -> tuple[Tensor, str | int]:
        """→ states (K + 1, C, h, w) fp32, and the caption or the label."""
        shard, place = divmod(i, self.about["shard"])
        file = self.open(shard)
        states = file.get_slice("states")[place].float()
        if self.about["words"] == "labels":
            return states, int(file.get_slice("labels")[place])
        return states, self.captions(shard)[place]

    def _captions(self, shard: int) -> list[str]:
        return json.loads(self.open(shard).metadata()["captions"])

    def all(self) -> tuple[Tensor, Tensor]:
        """→ states (N, K + 1, C, h, w) fp16, labels (N,), in memory."""
        parts = [self.open(i) for i in range(len(self.files))]
        return tuple(torch.cat([p.get_tensor(key) for p in parts]) for key in ("states", "labels"))


def read_about(folder: Path) -> dict:
    """pairs.json. ValueError if it is not what pairs.py writes."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        _ = [about[key] for key in ("number", "shard", "segments", "shift", "words", "shape")]
        _ = about["run"]["cfg"], about["prompts"]
        return about
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / ABOUT} is not what pairs.py writes: make the pairs again in another folder"
        ) from error


def n_shards(about: dict) -> int:
    return -(-about["number"] // about["shard"])


class PairBatches(Batches):
    """Chapter 1's batches[step] of pairs: lines with their times, by (seed, step) alone.

    anneal: steps over which the first flow's coupling turns into the pairs' (rf.annealed_noise).
    """

    def __init__(
        self, pairs: Pairs, classes: int, batch_size: int, *, seed: int, distribution: str,
        shift: float, segments: int, anneal: int, device,
    ):  # fmt: skip
        states, labels = pairs.all()
        if int(labels.max()) >= classes:
            raise ValueError(f"{pairs.folder} has label {labels.max()}, the data {classes} classes")
        self.images, self.labels = pairs.coarser(states, segments).to(device), labels.to(device)
        self.batch_size, self.seed, self.null = batch_size, seed, classes
        self.distribution, self.shift, self.anneal = distribution, shift, anneal
        self.generator = torch.Generator(device)
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def __getitem__(self, step: int) -> Batch:
        generator = self.generator.manual_seed(mix_seed(self.seed, "step", step))
        random = {"generator": generator, "device": self.images.device}
        index = self.indices(step)
        u = torch.arange(self.batch_size, device=index.device) + torch.rand(len(index), **random)
        states = self.images[index].float()
        segments = states.shape[1] - 1
        t = rf.segment_time(u / self.batch_size, segments, self.distribution, self.shift)
        data, noise = rf.segment_line(states, t, self.shift)
        if step < self.anneal:
            fresh = torch.randn(noise.shape, **random)
            noise = rf.annealed_noise(noise, fresh, 1 - step / self.anneal)
        return Batch(data, self.labels[index], generator, noise, t)


# ------------------------------------------------------------------------------------------------
# Making
# ------------------------------------------------------------------------------------------------


@dataclass
class Maker:
    """A model and its words: `draw` n labels or captions by a seed, `features` of them."""

    model: rf.Model
    shape: tuple[int, int, int]  # (C, h, w) of what the network sees
    words: str  # "labels" or "captions"
    draw: Callable[[int, int], Tensor | list[str]]
    features: Callable[[Tensor | list[str]], Tensor]
    null_text: Tensor
    settings: dict  # of the run: cfg, shift, …
    weights: Path


def maker_of(args: argparse.Namespace, device) -> Maker:
    """The maker for a run of train_mnist.py or of train_t2i.py."""
    from sample_t2i import find_weights

    weights = find_weights(args.run, args.ema)
    run = json.loads((weights / "config.json").read_text()).get("run")
    if run is None:
        raise ValueError(f"{weights} was not written by a trainer here: its config.json has no run")
    if "text_encoder" in run:
        return captions_maker(args, weights, device)
    if args.prompts:
        raise ValueError(f"--prompts is for runs of train_t2i.py: {args.run} has labels")
    return labels_maker(weights, run, device)


def labels_maker(weights: Path, run: dict, device) -> Maker:
    from mmdit import load_model

    model = load_model(weights, device)
    config = model.config
    classes, side = config.text_dim - 1, config.max_grid * config.patch_size
    text = OneHotText(classes, device)

    def draw(n: int, seed: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(seed).integers(classes, size=n))

    return Maker(
        model, (config.in_channels, side, side), "labels", draw,
        lambda labels: text(labels.to(device)), text.null_text, run, weights,
    )  # fmt: skip


def captions_maker(args: argparse.Namespace, weights: Path, device) -> Maker:
    import shapes
    from sample_t2i import Painter, latent_size

    model, text, image, run, _ = Painter.of_run(weights, device)
    lines = args.prompts.read_text(encoding="utf-8").split("\n") if args.prompts else []
    lines = [line.strip() for line in lines if line.strip()]
    if args.prompts and not lines:
        raise ValueError(f"--prompts {args.prompts} holds no captions: write one on each line")
    if not lines and (run.get("data") or not run.get("shapes")):
        raise ValueError(f"{args.run} was not trained on shapes: give captions with --prompts FILE")
    world = None if lines else shapes.World(*(run[k] for k in shapes.World._fields))

    def draw(n: int, seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        if lines:
            return [lines[i] for i in rng.integers(len(lines), size=n)]
        tags = (*shapes.TAGS, "combined")
        return [shapes.draw_caption(rng, tags, held=False, world=world)[1] for _ in range(n)]

    shape = (image.channels, *latent_size(run["size"], image.factor))
    return Maker(
        model, shape, "captions", draw, lambda captions: text(captions).to(device),
        text([""]).to(device), run, weights,
    )  # fmt: skip


def make(args: argparse.Namespace, device):
    """Write the shards that are not there yet."""
    maker = maker_of(args, device)
    about = {
        "weights": f"{zlib.crc32((maker.weights / 'model.safetensors').read_bytes()):08x}",
        "run": maker.settings, "words": maker.words, "shape": list(maker.shape),
        "number": args.number, "shard": args.shard, "segments": args.segments,
        "steps": args.steps, "solver": args.solver, "seed": args.seed,
        "cfg": maker.settings["cfg"] if args.cfg is None else args.cfg,
        "shift": maker.settings["shift"],
        "prompts": zlib.crc32(args.prompts.read_bytes()) if args.prompts else None,
    }  # fmt: skip
    begin(args.out, about)
    bar = tqdm(total=args.number, unit="pair", unit_scale=True, desc="pairs")
    with bar:
        for shard in range(n_shards(about)):
            rows = min(args.shard, args.number - shard * args.shard)
            file = args.out / f"{shard:05d}.safetensors"
            if file.exists():
                bar.initial += rows  # not this run's doing: the rate leaves it out
                bar.update(rows)
                continue
            write_whole(file, shard_bytes(maker, about, shard, rows, args.batch, device, bar))


def begin(out: Path, about: dict):
    """Write pairs.json, or see that what was begun there is the same. ValueError if it is not.

    A greater number adds shards to those that are there, if they are all full.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / ABOUT
    older = read_about(out) if path.exists() else about
    grown = older["number"] % older["shard"] == 0 and about["number"] > older["number"]
    if about == older | ({"number": about["number"]} if grown else {}):
        write_whole(path, json.dumps(about, indent=1).encode())
        return
    differs = [f"{k} {older.get(k)} there, {v} here" for k, v in about.items() if older.get(k) != v]
    raise ValueError(f"--out {out} holds other pairs ({'; '.join(differs)}): choose another")


def shard_bytes(maker: Maker, about: dict, shard: int, rows: int, batch: int, device, bar) -> bytes:
    """One shard as a safetensors file; noise and words come from (seed, shard) alone."""
    generator = torch.Generator().manual_seed(mix_seed(about["seed"], "pair noise", shard))
    noise = torch.randn(rows, *maker.shape, generator=generator).half()  # as it will be read
    words = maker.draw(rows, mix_seed(about["seed"], "pair words", shard))
    how = {key: about[key] for key in ("segments", "steps", "solver", "cfg", "shift")}
    states = []
    for part in torch.arange(rows).split(batch):
        some = words[part] if maker.words == "labels" else [words[i] for i in part]
        x = noise[part].float().to(device)
        path = rf.reflow_states(
            maker.model, x, maker.features(some), null_text=maker.null_text, **how
        )
        states.append(path.half().cpu())
        bar.update(len(part))
    tensors = {"states": torch.cat(states).contiguous()}
    if maker.words == "labels":
        return save(tensors | {"labels": words})
    return save(tensors, metadata={"captions": json.dumps(words)})


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run of train_mnist.py or train_t2i.py")
    add("--out", type=Path, required=True, help="folder of the pairs")
    add("--number", type=int, default=30_000, help="pairs (default: 30000)")
    add("--segments", type=int, default=1,
        help="pieces kept of each path; divides --steps (default: 1, the pair)")  # fmt: skip
    add("--steps", type=int, default=16, help="solver steps of a path (default: 16)")
    add("--solver", default="rf_solver", help=f"one of {', '.join(rf.SOLVERS)} (rf_solver)")
    add("--cfg", type=float, help="guidance, folded into the pairs (default: the run's)")
    add("--prompts", type=Path, metavar="FILE", help="captions, one a line, instead of shapes'")
    add("--ema", help="which average of a chapter 2 run (default: the narrowest)")
    add("--seed", type=int, default=0, help="of noise and words (default: 0)")
    add("--shard", type=int, default=2000, help="pairs in a file (default: 2000)")
    add("--batch", type=int, default=128, help="paths at a time (default: 128)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    return parser


def launch(args: argparse.Namespace):
    from train_mnist import choose_device

    for key in ("number", "segments", "steps", "shard", "batch"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)} must be at least 1")
    if args.steps % args.segments:
        raise ValueError(f"--steps {args.steps} must be a multiple of --segments {args.segments}")
    if args.solver not in rf.SOLVERS:
        raise ValueError(f"--solver {args.solver!r} must be one of {', '.join(rf.SOLVERS)}")
    if args.prompts and not args.prompts.is_file():
        raise FileNotFoundError(f"--prompts {args.prompts} is not there: give a text file")
    cpu.tune()
    make(args, choose_device(args.device))
    print(f"{args.out} holds {args.number:,} pairs")


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        launch(args)
    except (ValueError, OSError) as error:
        sys.exit(f"pairs.py: {error}")
    except KeyboardInterrupt:
        sys.exit("pairs.py: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
