"""EVALUATION: what a run's averaged weights are asked every so often, on all ranks.

validation   velocity MSE of held-out rows at t = 0, 1/8, …, 7/8 (MLPerf flux1's metric)
pictures     the same captions and noise each time
scores       in the world of shapes: the share of pictures that obey, for each of the six tags;
             of images of one's own, with --judge: two figures in the features of a CLIP model

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
from torch.nn.functional import cosine_similarity

import rf
from common.pipeline import draw, fixed_noise
from inputs.encoders import pretrained
from inputs.rows import Rows
from inputs.shapes import TAGS, obeyed, prompts_by_tag, scores
from inputs.sources import TIMES, Text

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


# ------------------------------------------------------------------------------------------------
# Scores of pictures that no program can read exactly
# ------------------------------------------------------------------------------------------------


class Judge:
    """A CLIP model of transformers, by hub name or folder: pictures and captions → features (B, D).

    It was trained on photographs with captions, so that the features of a picture and of its
    caption point the same way (Radford et al. 2021, 2103.00020). Ours are not of unit length.
    """

    def __init__(self, name: str, device: torch.device | str):
        how = {"use_safetensors": True}  # no pickles
        model, self.prepare = pretrained(name, device, "--judge", "AutoModel", **how)
        if model.config.model_type != "clip":
            raise ValueError(f"--judge {name} is a {model.config.model_type!r} model, must be clip")
        self.model, self.device = model.float().requires_grad_(False), device

    def look(self, pictures: Tensor) -> Tensor:
        """pictures: (B, 3, H, W) uint8; scaled, and cropped to the square that CLIP sees."""
        pixels = self.prepare(images=list(pictures), return_tensors="pt").to(self.device)
        return self.model.get_image_features(**pixels).pooler_output

    def read(self, captions: list[str]) -> Tensor:
        """A caption ends after the 77 tokens that CLIP reads."""
        most = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        words = self.prepare(text=captions, **how).to(self.device)
        return self.model.get_text_features(**words).pooler_output


def judged(features: Tensor) -> dict[str, float]:
    """CLIP's features of drawn pictures, their captions and real pictures, (N, 3, D) → two figures.

    clip_score    mean of 100 · max(0, cos(picture, caption)): is it what was asked for?
                  (CLIPScore, Hessel et al. 2021, 2104.08718, with 100 for their factor 2.5)
    clip_frechet  Fréchet distance of the drawn pictures from the real ones: FID's formula. FID
                  itself has Inception's features, which follow people's judgement less well
                  (2203.06026, 2401.09603) and would need a second model: its values are others.
                  Few pictures give a large distance: N of them span at most N − 1 of D
                  directions. So it can be compared only at the same number of pictures.
    """
    drawn, text, real = features.unbind(1)
    cosines = cosine_similarity(drawn, text).clamp(min=0)
    return {
        "clip_score": 100 * cosines.mean().item(),
        "clip_frechet": frechet_distance(drawn, real),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to two sets of features, (N, D) and (M, D); in float64.

        ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)           (Heusel et al. 2017, 1706.08500)

    ValueError if there is nothing to fit: LAPACK would crash the program on NaN.
    """
    if min(len(a), len(b)) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{len(a)} and {len(b)} features must be finite, and at least two each")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (Σ_a Σ_b)^½ is the sum of the roots of the eigenvalues of Σ_a Σ_b, which are real and ≥ 0
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """The captions that pictures are drawn of, always the same."""

    captions: list[str]
    text: Callable  # their numbers → text as an encoder's `prepare` gives it
    meanings: list  # of the world of shapes: what scores are made of; else empty
    shown: list[int]  # numbers of the pictures on the sheet
    judge: Callable | None = None  # pictures, their numbers → features that `judged` takes


def asked(rows: Rows, per_tag: int, judge: Judge | None = None, number: int = 0) -> Asked:
    """Shapes: per_tag held-out captions of each tag. Words: ten of each. Else held-out captions, as
    many as a sheet shows, or `number` of them for a judge.

    Captions of prepared rows are not encoded again: their text is stored, and the encoder (a T5 of
    gigabytes) need not be loaded.
    """
    if judge and (rows.world or rows.words):
        raise ValueError("--judge is for images of your own (tools.prepare): drop it")
    if rows.world is not None:
        meanings = prompts_by_tag(rows.world, per_tag)
        captions = [caption for _, caption in meanings]
        tags = range(len(TAGS))
        shown = [tag * per_tag + i for i in range(min(ROWS, per_tag)) for tag in tags]
    elif rows.words:
        meanings, captions = [], 10 * list(rows.words[:10])
        shown = list(range(len(captions)))
    else:
        held, sheet = rows.shown_held(), COLUMNS * ROWS
        numbers = held.shown(number if judge else sheet) if held else []
        captions = held.captions(numbers) if held else []
        if judge and len(numbers) < 2:
            raise ValueError(
                f"--judge needs at least 2 held-out rows, not {len(numbers)}: prepare again with"
                " --validation"
            )

        def stored(part: list[int]) -> tuple[Tensor, Text]:
            return held.source.read(held.row([numbers[i] for i in part]))

        def features(drawn: Tensor, part: list[int]) -> Tensor:
            # Real pictures are decoded, too: what a VAE loses does not count.
            real = rows.image.decode(rows.states(stored(part)[0])[:, -1])
            text = judge.read([captions[i] for i in part])
            return torch.stack([judge.look(drawn), text, judge.look(real)], dim=1).cpu()

        shown = list(range(len(numbers)))[:sheet]
        return Asked(captions, lambda part: stored(part)[1], [], shown, judge and features)
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
        marks = [None] * len(share)
        if wanted.meanings:
            marks = obeyed(frames[-1], [wanted.meanings[i] for i in share])
        elif wanted.judge:
            marks = []
            for first in range(0, len(share), EVAL_BATCH):
                part = slice(first, first + EVAL_BATCH)
                marks += map(torch.clone, wanted.judge(frames[-1][part], share[part]))
        shown = set(wanted.shown)
        for k, (i, mark) in enumerate(zip(share, marks, strict=True)):
            found[i] = (frames[:, k].clone() if i in shown else None, mark)
    for part in ranks.gather(found):
        found = found | part
    if not found:  # no row was held out
        return torch.zeros(1, 0, 3, 1, 1, dtype=torch.uint8), {}
    pictures = torch.stack([found[i][0] for i in wanted.shown], dim=1)
    marks = [found[i][1] for i in range(len(found))]
    if wanted.judge:
        return pictures, judged(torch.stack(marks))
    return pictures, scores(wanted.meanings, marks) if wanted.meanings else {}
