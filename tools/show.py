"""SHOW: what is in any rows, and a sheet of their pictures with their captions.

python -m tools.show data/my
python -m tools.show shapes --out shapes.png

Look before training: most failed runs have wrong data, and a sheet of pictures with their captions
shows it in a second. The pictures come through the same code that feeds the network.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train_t2i
from common import pictures
from common.pipeline import settle_run
from common.settings import Options, option, parse
from common.start import choose_device, program


@dataclass(frozen=True)
class Settings(Options):
    data: str = option(None, "what a trainer's --data takes", positional=True)
    data_dir: Path = option(Path("data"), "where mnist and cifar10 lie")
    rows: int = option(24, "pictures on the sheet", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")
    out: Path = option(Path("show.png"), "the sheet")


@program("tools.show")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    pictures.png_path(args.out)
    device = choose_device(args.device)
    typed = {"data": [args.data], "data_dir": args.data_dir, "batch_size": args.rows}
    typed["preset"] = "tiny"  # pairs would choose that of their run, of either chapter
    settings, rows = settle_run(train_t2i.Settings, typed, {}, device, train_t2i.recipe_of)
    for fact in ("size", "text_encoder", "text_tokens", "vae"):
        print(f"{fact:14} {getattr(settings, fact)}")
    print(f"points of path {rows.K + 1}")
    for stream, share in zip(rows.streams, rows.shares, strict=True):
        h, w = stream.bucket
        print(f"{h:5} x {w:<5} {stream.order.rows:12,} rows to train on, {share:.1%} of the steps")
    print(f"held out      {sum(len(held.rows) for held in rows.held):12,} rows")
    stream = rows.streams[int(np.argmax(rows.shares))]
    numbers = stream.order(range(args.rows))
    stored, text = stream.source.read(numbers)
    lengths = rows.features(text, device).any(2).sum(1).cpu().numpy()
    spread = ", ".join(f"{q:.0%} {np.quantile(lengths, q):.0f}" for q in (0.05, 0.5, 0.95))
    print(f"caption tokens {spread}")
    states = rows.states(stored.to(device))
    captions = stream.source.captions(numbers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.captioned(rows.image.decode(states[:, -1]).cpu(), captions, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
