"""How fast, measured side by side in one run.

    python experiments/throughput.py data        rows/s of the loader against what training takes

Every number is a median over repeats after a warm-up, with its spread; ratios are of numbers from
one run. Rows also go to a CSV in runs/throughput.
"""

import argparse
import csv
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache import SCHEMA, Cache, TextFormat, write_shard
from data_t2i import KnownText, Prepared, Samples, loader
from mmdit import PRESETS, MMDiT
from report_t2i import PEAK_TFLOPS

MFU = 0.55  # share of the peak that a training step is taken to reach: the demand, not a claim
GPU = "H100"
GPU_PRESETS = ("0.2b", "1b", "auraflow-6.8b")


def machine() -> str:
    """The device and the versions that a number belongs to."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{cpu_name()}, {os.cpu_count()} cores"
    return f"{device}; PyTorch {torch.__version__}, Python {platform.python_version()}"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(rows: list[dict], path: Path):
    """The rows as a table on the screen, and as a CSV."""
    columns = list(rows[0])
    cells = [columns, *([_text(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(machine())
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
        file.write(f"# {machine()}\n")
    print(f"wrote {path}")


def _text(value) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# data: is the loader ever the slower one?
# ------------------------------------------------------------------------------------------------


def demand(preset: str, size: int, tokens: int) -> float:
    """Images/s that one GPU takes at MFU of its dense bf16 peak: training is three forwards."""
    config = replace(PRESETS[preset], max_grid=size // 16, text_dim=2048)
    with torch.device("meta"):
        model = MMDiT(config)
    flops = 3 * model.flops_per_image(size // 8, size // 8, tokens)
    return MFU * PEAK_TFLOPS[GPU] * 1e12 / flops


def made_up_cache(folder: Path, size: int, form: TextFormat, length: int, rows: int) -> Cache:
    """Latents and features of the real sizes, random; four shards."""
    rng, shards = np.random.default_rng(0), []
    (folder / "shards").mkdir(parents=True)
    for k in range(4):
        made = []
        for i in range(rows // 4):
            features = torch.zeros(form.tokens, form.dim)
            features[:length] = torch.randn(length, form.dim) * 0.1
            moments = rng.standard_normal((2, 4, size // 8, size // 8)).astype(np.float16)
            made.append(
                {"row": k * rows // 4 + i, "image": moments.tobytes(), "captions": ["made up"],
                 "text": [form.pack(features)]}
            )  # fmt: skip
        shards.append(write_shard(folder, f"shards/{k}.arrow", "train", (size, size), made))
    manifest = {
        "schema": SCHEMA, "text_format": form._asdict(), "null_text": "", "size": size,
        "shards": [s._asdict() for s in shards], "captions": [{"column": "text", "weight": 1.0}],
        "image": {"kind": "moments", "channels": 4, "factor": 8}, "text_encoder": "made up",
        "vae": "made up", "text_tokens": form.tokens,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Cache(folder)


class LatentShape:
    """Stands for the VAE: the loader only asks for the latents' shape."""

    channels, factor, random = 4, 8, True


def rows_per_second(cache: Cache, workers: int, batch: int, repeats: int) -> list[float]:
    source = Prepared([cache], batch, seed=0)
    samples = Samples(source, KnownText(cache), LatentShape(), seed=0)
    batches = loader(
        samples, seen=0, micro_batch=batch, rank=0, world_size=1, workers=workers,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    most = 4 + 3 * workers  # started, and what the workers made ahead is used up
    for _ in islice(batches, most):
        pass
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in islice(batches, most):
            pass
        rates.append(most * batch / (time.perf_counter() - start))
    return rates


def data(args: argparse.Namespace):
    """Rows/s by workers, bits of the text and length of the caption, against the presets' need."""
    torch.set_num_threads(1)  # as in a worker
    needs = {preset: demand(preset, args.size, args.tokens) for preset in GPU_PRESETS}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in (16, 8):
            for length in (args.length, args.tokens):
                form = TextFormat(args.tokens, 2048, bits)
                place = Path(folder) / f"{bits} {length}"
                cache = made_up_cache(place, args.size, form, length, 1024)
                for workers in args.workers:
                    rates = rows_per_second(cache, workers, 32, args.repeats)
                    row = {
                        "text_bits": bits, "caption_tokens": length, "workers": workers,
                        "rows_per_s": float(np.median(rates)),
                        "spread": float(np.ptp(rates) / np.median(rates)),
                    }  # fmt: skip
                    row |= {f"x_{p}": row["rows_per_s"] / need for p, need in needs.items()}
                    found.append(row)
    print(
        f"{args.size}² pixels, {args.tokens} text tokens; a {GPU} at {MFU:.0%} MFU takes images/s:"
    )
    print("  " + ", ".join(f"{preset} {need:.0f}" for preset, need in needs.items()))
    print("x_preset: rows/s over that")
    report(found, args.out / "data.csv")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("data", help=data.__doc__)
    part.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    part.add_argument("--tokens", type=int, default=256, help="text tokens (default: 256)")
    part.add_argument("--length", type=int, default=64, help="tokens of a usual caption (64)")
    part.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    part.add_argument("--repeats", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder")
    args = parser.parse_args(argv)
    {"data": data}[args.command](args)


if __name__ == "__main__":
    main()
