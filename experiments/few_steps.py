"""Chapter 2 in few steps: the six scores of guided sampling, and of flows that need no guidance.

    python experiments/few_steps.py runs/shapes runs/shapes4

The first run is sampled with its guidance at 20 steps and at few; the others (reflowed or distilled
on its pairs, see pairs.py) without. A pass is one evaluation of the network for one picture;
guidance takes two a step. What comes out, in the last run's folder: few_steps.csv, and
few_steps.png, the same prompts and noise by each.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules one folder up

import cpu
import shapes
from measure import draw_strip
from sample_t2i import Painter, draw, fixed_noise, latent_size, obeyed, scores, shapes_prompts
from train_mnist import choose_device

COLUMNS = ("run", "cfg", "steps", "passes", *shapes.TAGS, "mean")
SHOWN = 6  # prompts in the picture, one a tag


def score(painter: Painter, name: str, cfg: float, steps: int, args, device):
    """→ a row of the table; the pictures that are shown, (n, 3, H, W) uint8; their prompts."""
    run, image = painter.settings, painter.image
    world = shapes.World(*(run[key] for key in shapes.World._fields))
    prompts = shapes_prompts(world, args.per_tag)
    size = latent_size(run["size"], image.factor)
    noise = fixed_noise(len(prompts), (image.channels, *size), args.seed)
    pictures = draw(
        painter.model, [caption for _, caption in prompts], noise, text=painter.text, image=image,
        device=device, cfg=cfg, steps=steps, shift=run["shift"],
    )  # fmt: skip
    found = scores(prompts, obeyed(pictures, prompts))
    shown = pictures[:: args.per_tag][:SHOWN]
    captions = [caption for _, caption in prompts[:: args.per_tag]]
    passes = steps * (1 if cfg == 1 else 2)
    return (name, cfg, steps, passes, *found.values()), shown, captions


def compare(args: argparse.Namespace) -> list[tuple]:
    device = choose_device(args.device)
    if args.per_tag < 1 or min(args.steps) < 1:
        raise ValueError("--per-tag and --steps must be at least 1")
    painters = {path: Painter.of_run(path, device) for path in (args.run, *args.others)}
    for path, painter in painters.items():
        if painter.settings.get("data") or not painter.settings.get("shapes"):
            raise ValueError(f"{path} was not trained on shapes: there is nothing to score")
    worlds = {tuple(p.settings[key] for key in shapes.World._fields) for p in painters.values()}
    if len(worlds) > 1:
        raise ValueError("these runs live in different worlds (--size, …): score each alone")
    rows, lines = [], []
    print("  ".join(f"{column:>13}" for column in COLUMNS))
    for path, painter in painters.items():
        guided = path == args.run
        for steps in ([20] if guided else []) + args.steps:
            cfg = painter.settings["cfg"] if guided else 1.0
            row, pictures, captions = score(painter, path.name, cfg, steps, args, device)
            rows.append(row)
            lines.append((f"{path.name}, {row[3]} pass{'es' * (row[3] > 1)}", pictures))
            cells = (f"{x:.3f}" if isinstance(x, float) else x for x in row)
            print("  ".join(f"{cell:>13}" for cell in cells), flush=True)
    out = (args.others or [args.run])[-1]
    with open(out / "few_steps.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw_strip(lines, out / "few_steps.png", above=captions)
    print(f"wrote {out}/few_steps.csv and few_steps.png")
    return rows


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the first flow, sampled with its guidance")
    add("others", type=Path, nargs="*", metavar="RUN", help="flows trained on its pairs")
    add("--steps", type=int, nargs="+", default=[1, 2, 4], help="Euler steps (default: 1 2 4)")
    add("--per-tag", type=int, default=300, help="scored prompts of each tag (default: 300)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    args = parser.parse_args(argv)
    cpu.tune()
    try:
        return compare(args)
    except (ValueError, OSError) as error:
        sys.exit(f"few_steps.py: {error}")


if __name__ == "__main__":
    main()
