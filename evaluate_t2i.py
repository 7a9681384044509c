"""CHAPTER 2's EVALUATION: what a run's averaged weights are asked every so often, on all ranks.

    validation loss   velocity MSE of held-out samples at t = 0, 1/8, …, 7/8 (rf.validation_loss)
    pictures          the same prompts each time, in samples.png and a row of progress.png
    scores            shapes only: the share of pictures that obey, for each of the six tags

Shapes: B batch, T text tokens, E text features, (C, h, w) what the network sees of an image.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import report_t2i as report
import rf
import shapes
from cache import Cache
from data_t2i import HeldOut, KnownText, PairSamples, Samples, Shuffled, encode
from pairs import Pairs
from sample_t2i import captioned_grid, draw, fixed_noise, obeyed, scores, shapes_prompts

VALIDATION_SAMPLES = 512  # of shapes: 64 at each of eight times
EVAL_BATCH = 128  # images at a time
COLUMNS, ROWS = 6, 4  # of samples.png; the first two rows are a row of progress.png


def world_of(args: Namespace) -> shapes.World:
    return shapes.World(args.size, args.shapes, args.colors, args.places).checked()


class ShapesExam:
    """Held-out samples and prompts of the world of shapes."""

    scored, count = True, VALIDATION_SAMPLES

    def __init__(self, args: Namespace, text, image):
        world = world_of(args)
        source = Shuffled(shapes.Shapes(world, args.seed, held=True), args.seed)
        self.samples = Samples(source, text, image, seed=args.seed, dropout=0.0, shift=args.shift)
        self.prompts = shapes_prompts(world, args.eval_prompts)
        self.captions = [caption for _, caption in self.prompts]
        side = args.size // image.factor
        self.latent = (image.channels, side, side)
        rows = min(ROWS, args.eval_prompts)
        tags = range(len(shapes.TAGS))
        self.shown = [t * args.eval_prompts + i for i in range(rows) for t in tags]

    def batches(self, size: int) -> list[list[int]]:
        return [list(range(i, min(i + size, self.count))) for i in range(0, self.count, size)]

    def t_index(self, positions: list[int]) -> Tensor:
        return torch.tensor(positions) % 8

    def obeyed(self, pictures: Tensor, numbers: list[int]) -> list[bool]:
        return obeyed(pictures, [self.prompts[i] for i in numbers])

    def scores(self, obeys: list[bool]) -> dict[str, float]:
        return scores(self.prompts, obeys)


class ShapesPairsExam(ShapesExam):
    """Held-out pairs for the loss, for the scores the same prompts as ever."""

    def __init__(self, args: Namespace, text, image, pairs: Pairs):
        super().__init__(args, text, image)
        self.count = pairs.held
        self.samples = PairSamples(pairs, text, seed=args.seed, segments=args.segments, held=True)


class CaptionPairsExam:
    """Held-out pairs whose captions nobody can score: their loss, and pictures of some."""

    scored, t_index = False, ShapesExam.t_index
    batches = ShapesExam.batches

    def __init__(self, args: Namespace, text, image, pairs: Pairs):
        self.count = pairs.held
        self.samples = PairSamples(pairs, text, seed=args.seed, segments=args.segments, held=True)
        first = len(pairs) - pairs.held
        captions = [pairs.row(first + i)[1] for i in range(min(pairs.held, COLUMNS * ROWS))]
        self.captions, self.shown = captions, list(range(len(captions)))
        self.latent = tuple(pairs.about["shape"])


class CacheExam:
    """Validation rows of caches; the prompts are captions of the most frequent bucket's rows."""

    scored = False

    def __init__(self, args: Namespace, text: KnownText, image, caches: list[Cache]):
        self.held = HeldOut(caches)
        seed = caches[0].manifest["noise_seed"]  # the data's, so that all runs are asked the same
        self.samples = Samples(self.held, text, image, seed=seed, dropout=0.0, shift=args.shift)
        buckets = Counter(shard.bucket for _, shard, _ in self.held.rows)
        bucket = buckets.most_common(1)[0][0] if buckets else None
        pairs = [
            self.held.caption(position)
            for position, (_, shard, _) in enumerate(self.held.rows)
            if shard.bucket == bucket
        ]
        text.known.update(pairs)
        captions = [caption for caption, _ in pairs]
        different = list(dict.fromkeys(captions))  # each once, then whatever comes
        self.captions = (different + captions)[: min(len(captions), COLUMNS * ROWS)]
        self.latent = caches[0].latent(bucket) if bucket else None
        self.shown = list(range(len(self.captions)))
        self.batches, self.t_index = self.held.batches, self.held.t_index


class Examiner:
    """Asks an exam of a model, each rank its share."""

    def __init__(self, exam, args: Namespace, text, image, device, group):
        self.exam, self.args, self.text, self.image = exam, args, text, image
        self.device, self.group = device, group  # group: for what lies in host memory
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def __call__(self, model: rf.Model, seen: int) -> tuple[list[float], dict[str, float]]:
        """→ the loss at eight times, the scores. Rank 0 draws the pictures into --out."""
        return self.validation_loss(model), self.draw(model, seen)

    def validation_loss(self, model: rf.Model) -> list[float]:
        exam = self.exam
        total = sum(map(len, exam.batches(EVAL_BATCH)))
        batches = exam.batches(min(EVAL_BATCH, -(-total // self.world_size) or 1))
        table = torch.zeros(2, 8)  # sums, counts
        for positions in batches[self.rank :: self.world_size]:
            batch = exam.samples.__getitems__(positions)
            data, text, _, noise = encode(batch, self.image, self.text, self.device)
            index = exam.t_index(positions)
            means, _ = rf.validation_loss(model, data, text, index.to(data.device), noise)
            counts = torch.bincount(index, minlength=8)
            table += torch.stack([means.nan_to_num().cpu() * counts, counts])
        dist.all_reduce(table, group=self.group)
        return (table[0] / table[1]).tolist()

    def draw(self, model: rf.Model, seen: int) -> dict[str, float]:
        exam, args = self.exam, self.args
        mine = list(range(self.rank, len(exam.captions), self.world_size))
        pictures, obeys = [], [None] * len(mine)
        if mine:
            noise = fixed_noise(len(exam.captions), exam.latent, args.seed)[mine]
            pictures = draw(
                model, [exam.captions[i] for i in mine], noise, text=self.text, image=self.image,
                device=self.device, batch=EVAL_BATCH, cfg=args.cfg, steps=args.sample_steps,
                shift=args.shift,
            )  # fmt: skip
            obeys = exam.obeyed(pictures, mine) if exam.scored else obeys
        shown, found = set(exam.shown), {}
        mine = zip(mine, obeys, pictures, strict=True)
        share = {i: (obeyed, p.clone() if i in shown else None) for i, obeyed, p in mine}
        for part in gather(share, self.group):
            found |= part
        if self.rank == 0 and shown:
            grid = torch.stack([found[i][1] for i in exam.shown])
            self.save(grid, [exam.captions[i] for i in exam.shown], args.out, seen)
        return exam.scores([found[i][0] for i in range(len(found))]) if exam.scored else {}

    @staticmethod
    def save(grid: Tensor, captions: list[str], out: Path, seen: int):
        captioned_grid(grid, captions, out / "samples.png", COLUMNS)
        report.save_strip(grid[: 2 * COLUMNS], out / "strips" / f"{seen:012d}.png")
        report.plot_progress(out / "strips", captions[: 2 * COLUMNS], out / "progress.png")


def gather(value, group) -> list:
    """The value of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
