"""RETRIEVAL: which of all pictures is nearest to a drawing? Two questions are answered by it.

score       the nearest is the picture that was asked for: so a run on any captioned pictures has a
            score, without a network that judges (retrieved)
memory      the nearest pictures of training, beside each drawing (beside_nearest)

Pictures are compared in 8×8 pixels, by the Euclidean distance. There emoji are still apart, while
noise, blur and a shift by one pixel hardly count (docs/emoji.md measures it). Small pictures
forgive where a line runs and are strict about what is there.
"""

from math import inf, nan
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms.functional import resize

from common import pictures as sheets
from inputs.encoders import to_unit
from inputs.sources import Source

BATCH = 128  # pictures at a time
NEAREST = 4  # pictures of training beside a drawing
SIDE = 8  # pixels: pictures are compared when they are as small as this


def small(pictures: Tensor) -> Tensor:
    """uint8 (B, C, H, W) → (B, C·8·8) fp32, means over the parts of a picture."""
    return adaptive_avg_pool2d(to_unit(pictures), SIDE).flatten(1)


class Gallery:
    """All pictures of a run's data: those it has learned from, and those that were held out."""

    def __init__(self, sources: list[Source], image):
        self.image, features, self.captions, held, self.where = image, [], [], [], []
        for source in sources:
            for rows, kept in source.every():
                for part in np.array_split(rows, -(-len(rows) // BATCH) or 1):
                    features.append(small(self.decoded(source, part)))
                    self.captions += source.captions(part)
                    self.where += [(source, row) for row in part]
                    held += [kept] * len(part)
        self.features, self.held = torch.cat(features), torch.tensor(held)

    def decoded(self, source: Source, rows: np.ndarray) -> Tensor:
        """uint8 (B, C, H, W); through the VAE if there is one, as the drawings are."""
        return self.image.decode(self.image.encode(source.read(rows)[0]))

    def pictures(self, numbers: list[int], size: tuple[int, int]) -> Tensor:
        """uint8 (n, C, *size): some may have been of another size."""
        found = (self.where[i] for i in numbers)
        decoded = (self.decoded(source, np.array([row])) for source, row in found)
        return torch.cat([resize(picture, list(size)) for picture in decoded])

    def nearest(self, drawn: Tensor, count: int, learned: bool = False) -> Tensor:
        """Numbers (B, count) of the pictures that are nearest. learned: to be found in training."""
        distances = torch.cdist(small(drawn), self.features)
        if learned:
            distances[:, self.held] = inf
        return distances.topk(min(count, len(self.captions)), largest=False).indices

    def ask(self, number: int, held: bool) -> list[int]:
        """Up to so many of the rows, each of another caption, in an order that a seed decides."""
        first = {}
        for i in np.random.default_rng(0).permutation(len(self.captions)).tolist():
            if bool(self.held[i]) == held:
                first.setdefault(self.captions[i], i)
        return list(first.values())[:number]


def halves(caption: str) -> tuple[str, str]:
    """Of "man: bald: dark skin tone": what it is, and which one, "dark skin tone"."""
    concept, colon, variant = caption.rpartition(": ")
    return (concept, variant) if colon else (caption, "")


def retrieved(gallery: Gallery, drawn: Tensor, asked: list[int]) -> dict[str, float]:
    """Of drawings of the captions of these rows, the share that

    top1, top5    finds the picture asked for first, or among the nearest five
    variant       has the right variant (dark skin tone), of those whose nearest picture has the
                  right concept
    copy          is at least twice as near to a training picture of another caption as that one is
                  to the picture asked for: a near-copy
    Two pictures that are equal count as one. NaN if no caption has a variant.
    """
    captions, features = gallery.captions, gallery.features
    found = gallery.nearest(drawn, 5).tolist()

    def right(i, j):
        return captions[i] == captions[j] or torch.equal(features[i], features[j])

    hits = [[right(i, j) for j in near] for i, near in zip(asked, found, strict=True)]
    variants = []
    for i, (nearest, *_) in zip(asked, found, strict=True):
        (concept, variant), (its, other) = halves(captions[i]), halves(captions[nearest])
        if variant and concept == its:
            variants.append(variant == other)
    copies, learned = [], gallery.nearest(drawn, 1, learned=True).flatten().tolist()
    for i, x, j in zip(asked, small(drawn), learned, strict=True):
        away = (features[i] - features[j]).norm()
        copies.append(not right(i, j) and bool((x - features[j]).norm() < away / 2))
    return {
        "top1": mean(hit[0] for hit in hits),
        "top5": mean(any(hit) for hit in hits),
        "variant": mean(variants) if variants else nan,
        "copy": mean(copies),
    }


def beside_nearest(known: Gallery, drawn: Tensor, captions: list[str], path: Path):
    """A sheet that shows whether the network repeats what it saw: first the drawing, then the
    pictures of training that are nearest to it, each under its caption."""
    shown, said = [], []
    for picture, caption in zip(drawn, captions, strict=True):
        numbers = known.nearest(picture[None], NEAREST, learned=True)[0].tolist()
        shown += [picture[None], known.pictures(numbers, picture.shape[1:])]
        said += [f"drawn: {caption}", *(known.captions[i] for i in numbers)]
    sheets.captioned(torch.cat(shown), said, path, NEAREST + 1)
    print(f"wrote {path}")
