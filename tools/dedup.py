"""DEDUP: images that are nearly alike, by the cosine of their embeddings.

    python -m tools.dedup SOURCE --out dups.parquet
    python -m tools.prepare SOURCE --out data/my --with dups.parquet

An image that lies in the data many times is learned by heart, and the model then draws it for
captions that merely resemble its own. LavenderFlow's data was cleaned this way.
The columns of the file: row, drop, repeats (the earlier row that stays), cosine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from common.settings import option, parse
from common.start import check_free, choose_device, program
from inputs.encoders import pretrained
from tools.prepare import Reading, open_source, pictures, write_table

BLOCK = 4096  # rows compared at a time


def pixels(images: list[Image.Image]) -> Tensor:
    """Tiny pictures without their mean, (B, 192): finds copies, scaled or recoded."""
    small = torch.tensor(np.stack([image.resize((8, 8)) for image in images])).float().flatten(1)
    centred = small - small.mean(1, keepdim=True)
    # Of one grey nothing would be left: each has a direction of its own, a wave.
    waves = (small * torch.arange(small.shape[1])).cos()
    return torch.where(centred.any(1, keepdim=True), centred, waves)


def image_features(name: str, device: torch.device):
    """→ a function: images → the features of a model of transformers, (B, E)."""
    model, processor = pretrained(name, device, "--model", "AutoModel")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    features = getattr(model.to(dtype), "get_image_features", model)

    @torch.no_grad()
    def embed(images: list[Image.Image]) -> Tensor:
        inputs = processor(images=images, return_tensors="pt")["pixel_values"]
        found = features(pixel_values=inputs.to(device, dtype))
        if isinstance(found, Tensor):
            return found
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state.mean(1) if pooled is None else pooled

    return embed


def duplicates(vectors: Tensor, threshold: float) -> dict[int, tuple[int, float]]:
    """Rows to drop → (the earlier row each of them repeats, cosine). vectors: (N, E), unit length.

    A row goes if an earlier one that stays is at least so near, up to rounding. Exact; the time
    grows with N².
    """
    threshold -= 1e-5
    found, blocks = {}, vectors.split(BLOCK)
    for i, block in enumerate(blocks):
        for j, earlier in enumerate(blocks[: i + 1]):
            cosines = block @ earlier.T
            if i == j:
                cosines = cosines.tril(-1)  # a row is compared with earlier ones
            rows = (cosines >= threshold).any(dim=1).nonzero()[:, 0]
            for row, near in zip((rows + i * BLOCK).tolist(), cosines[rows].cpu(), strict=True):
                others = (near >= threshold).nonzero()[:, 0].tolist() if row not in found else []
                for other in others:
                    if other + j * BLOCK not in found:
                        found[row] = (other + j * BLOCK, near[other].item())
                        break
    return found


@dataclass(frozen=True)
class Settings(Reading):
    model: str = option("pixels", "pixels, or name or folder of a CLIP, SigLIP or DINO")
    threshold: float = option(
        0.95, "cosine from which on an image repeats another", above=0, most=1
    )


@program("tools.dedup")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    check_free(args.out)
    device = choose_device(args.device)
    source = open_source(args)
    embed = pixels if args.model == "pixels" else image_features(args.model, device)
    rows, crcs, vectors = [], [], []
    for batch in pictures(source, args):
        numbers, files, images = zip(*batch, strict=True)
        rows += numbers
        crcs += files
        vectors.append(normalize(embed(list(images)).float(), dim=1))
    if not rows:
        raise ValueError(f"SOURCE {args.source} has no image that can be read")
    gone = duplicates(torch.cat(vectors), args.threshold)
    found = [gone.get(i) for i in range(len(rows))]
    table = {
        "row": rows,
        "image_crc32": crcs,
        "drop": [f is not None for f in found],
        "repeats": [f and rows[f[0]] for f in found],
        "cosine": [f and f[1] for f in found],
    }
    write_table(args.out, table, source.id)
    print(f"{args.out}: {len(gone):,} of {len(rows):,} images repeat an earlier one")


if __name__ == "__main__":
    main()
