"""EVALUATION: what a run's averaged weights are asked every so often, on all ranks.

validation   velocity MSE of held-out rows at t = 0, 1/8, …, 7/8 (MLPerf flux1's metric)
pictures     the same captions and noise each time
scores       in the world of shapes: the share of pictures that obey, for each of the six tags

The training loss is no measure of quality: it is mostly the noise that nobody can predict, and it
falls by a few per cent while pictures go from blur to digits. So each evaluation asks fixed
questions. The validation loss can be compared between evaluations and runs on the same rows; the
scores say what the user sees.
"""

from collections.abc import Callable
from math import isnan, nan
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import rf
from common.pipeline import draw, fixed_noise
from inputs.rows import TIMES, Rows
from inputs.shapes import TAGS, obeyed, prompts_by_tag, scores

EVAL_BATCH = 128  # images at a time
COLUMNS, ROWS = 6, 4  # of a sheet of captioned pictures


class Ranks(NamedTuple):
    """Which of how many processes this is; group: of those, for what lies in host memory."""

    rank: int = 0
    count: int = 1
    group: object = None

    def gather(self, value) -> list:
        """The value of every rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


@torch.no_grad()
def validation(model: rf.Model, rows: Rows, settings, device, ranks: Ranks) -> list[float]:
    """The mean loss at each of the eight times; NaN where no held-out row is asked.

    Raises FloatingPointError if a loss is not finite: such weights are never a result.

    settings: segments and shift are those of training. Every rank takes its share of the batches;
    sums and counts are added up at the end, so the result does not depend on the number of ranks.
    """
    sums, counts = torch.zeros(TIMES), torch.zeros(TIMES)
    how = {"segments": settings.segments, "shift": settings.shift}
    total = sum(len(held.rows) for held in rows.held)
    size = min(EVAL_BATCH, max(1, -(-total // ranks.count)))
    parts = [(held, numbers) for held in rows.held for numbers in held.batches(size)]
    for held, numbers in parts[ranks.rank :: ranks.count]:
        batch = rows.draw(numbers, held.seed, held)
        states, text, _, noise = rows.encode(batch, device)
        index = held.t_index(numbers).to(device)
        data, noise = rf.line_at(states, noise, index / TIMES, **how)
        means, _ = rf.validation_loss(model, data, text, index, noise)
        count = torch.bincount(index, minlength=TIMES)
        sums += torch.where(count > 0, means * count, 0).cpu()
        counts += count.cpu()
    parts = ranks.gather(torch.stack([sums, counts]))
    sums, counts = torch.stack(parts).sum(0)
    if not sums.isfinite().all():
        raise FloatingPointError(
            "the validation loss is not finite, the averaged weights have diverged: start again"
            " with a lower --lr"
        )
    return (sums / counts).tolist()


def eval_row(samples: int, by_time: list[float]) -> dict[str, float]:
    """A row of eval.csv: the mean loss of the times that are asked (few rows may miss one), and the
    loss at each time."""
    asked = [loss for loss in by_time if not isnan(loss)]
    row = {"samples": samples, "loss": sum(asked) / len(asked) if asked else nan}
    return row | {f"loss_t{i}/8": loss for i, loss in enumerate(by_time)}


class Asked(NamedTuple):
    """The captions that pictures are drawn of, always the same."""

    captions: list[str]
    text: Callable  # their numbers → text as an encoder's `prepare` gives it
    meanings: list  # of the world of shapes: what scores are made of; else empty
    shown: list[int]  # numbers of the pictures on the sheet


def asked(rows: Rows, per_tag: int) -> Asked:
    """Shapes: per_tag held-out captions of each tag. Words: ten of each. Else held-out captions.

    Captions of prepared rows are not encoded again: their text is stored, and the encoder (a T5 of
    gigabytes) need not be loaded.
    """
    if rows.world is not None:
        meanings = prompts_by_tag(rows.world, per_tag)
        captions = [caption for _, caption in meanings]
        tags = range(len(TAGS))
        shown = [tag * per_tag + i for i in range(min(ROWS, per_tag)) for tag in tags]
    elif rows.words:
        meanings, captions = [], 10 * list(rows.words[:10])
        shown = list(range(len(captions)))
    else:
        held = rows.shown_held()
        numbers = held.shown(COLUMNS * ROWS) if held else []
        captions = held.captions(numbers) if held else []

        def stored(part: list[int]):
            return held.source.read(held.row([numbers[i] for i in part]))[1]

        return Asked(captions, stored, [], list(range(len(numbers))))
    return Asked(captions, lambda p: rows.text.prepare([captions[i] for i in p]), meanings, shown)


def draw_asked(
    model: rf.Model,
    rows: Rows,
    wanted: Asked,
    settings,
    device,
    ranks: Ranks,
    trajectory: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """→ the pictures of `shown`, (1, n, C, H, W) uint8 from all ranks, and the scores or {}.

    trajectory: (steps + 1, n, C, H, W), from the noise on.
    """
    share, found = list(range(ranks.rank, len(wanted.captions), ranks.count)), {}
    if share:
        frames = draw(
            model,
            rows.image,
            fixed_noise(settings.seed, range(len(wanted.captions)), rows.shown_shape())[share],
            lambda part: rows.features(wanted.text([share[i] for i in part]), device),
            rows.null_features(device),
            batch=EVAL_BATCH,
            trajectory=trajectory,
            cfg=settings.cfg,
            cfg_below=settings.cfg_below,
            steps=settings.sample_steps,
            shift=settings.shift,
            solver=settings.solver,
        )
        frames = frames if trajectory else frames[None]  # (F, b, C, H, W)
        obeys = [None] * len(share)
        if wanted.meanings:
            obeys = obeyed(frames[-1], [wanted.meanings[i] for i in share])
        shown = set(wanted.shown)
        for k, (i, obey) in enumerate(zip(share, obeys, strict=True)):
            found[i] = (frames[:, k].clone() if i in shown else None, obey)
    for part in ranks.gather(found):
        found = found | part
    if not found:  # no row was held out
        return torch.zeros(1, 0, 3, 1, 1, dtype=torch.uint8), {}
    pictures = torch.stack([found[i][0] for i in wanted.shown], dim=1)
    obeys = [found[i][1] for i in range(len(found))]
    return pictures, scores(wanted.meanings, obeys) if wanted.meanings else {}
