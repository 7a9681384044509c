"""PAIRS: Pipeline → Rows. Noise, and what a model makes of it: for the next, straighter flow.

    python -m tools.pairs runs/mnist --out data/mnist-pairs
    python train_mnist.py --data data/mnist-pairs --init runs/mnist --out runs/mnist2
    python -m tools.pairs runs/shapes --out data/shapes-pairs --segments 4
    deepspeed train_t2i.py --data data/shapes-pairs --init runs/shapes --out runs/shapes4

A folder holds pairs.json, how they were made, and chunks 00000.safetensors, …; chunk i is a
function of (seed, i) alone and appears whole or not at all. So a killed command goes on where it
was, and what comes out is the same to the byte (on the same kind of device). With --part 0/8 … 7/8
eight processes share the chunks of one folder.

Shapes: K segments; states (B, K + 1, C, h, w) from the noise to the data, see rf.reflow_states.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

import rf
from common.pipeline import HOW, Pipeline, Sampling
from common.settings import Parted, option, parse, read_json
from common.start import claim, mark, program, read_prompts, sweep, write_whole
from inputs.shapes import TRAINED, World, draw_caption
from inputs.stored import SCHEMA, PairsHeader, pairs_check, read_pairs

WORDS, NOISE = "pair words", "pair noise"  # purposes of seeds


def captions_of(pipeline: Pipeline, lines: list[str], n: int, seed: int) -> list[str]:
    """n captions by a seed: lines of the file, words of the model, or of its world of shapes.

    A second flow learns the first one only for captions that it is shown, so they should be like
    those of the first training.
    """
    rng, facts = np.random.default_rng(seed), pipeline.facts
    known = lines or facts["words"]
    if known:
        return [known[i] for i in rng.integers(len(known), size=n)]
    if not facts["shapes"]:
        raise ValueError(f"{pipeline.origin} needs captions: give a file with --prompts")
    world = World.of(facts)
    return [draw_caption(rng, TRAINED, held=False, world=world)[1] for _ in range(n)]


def chunk_bytes(pipeline: Pipeline, about: dict, lines: list[str], i: int, batch: int, bar):
    """Chunk i as a safetensors file; noise and captions come from (seed, i) alone."""
    settings = about["settings"]
    rows = min(about["chunk"], about["number"] - i * about["chunk"])
    noise = torch.randn(
        rows, *about["shape"], generator=rf.generators(settings["seed"], NOISE, [i])[0]
    )
    noise = noise.half()  # rounded before the path is computed: it will be read like this
    captions = captions_of(pipeline, lines, rows, rf.mix_seed(settings["seed"], WORDS, i))
    how = {key: settings[key] for key in HOW}
    null_text, states = pipeline.features([""]), []
    for part in torch.arange(rows).split(batch):
        text = pipeline.features([captions[k] for k in part])
        x = noise[part].float().to(pipeline.device)
        path = rf.reflow_states(
            pipeline.model, x, text, null_text=null_text, segments=about["segments"], **how
        )
        states.append(path.half().cpu())
        bar.update(len(part))
    states = torch.cat(states)
    check = pairs_check(about, i, states, captions)
    return save(
        {"states": states},
        metadata={"about": json.dumps({"captions": captions, "check": check})},
    )


def begin_folder(out: Path, about: dict):
    """Write pairs.json, or see that what was begun there is the same. ValueError if it is not.

    A greater number adds chunks to those that are there, if they are all full.
    """
    path = out / "pairs.json"
    begun = any(out.glob("*.safetensors"))
    if begun and not path.exists():
        raise ValueError(
            f"--out {out} holds pairs, but no {path.name} that says how made: delete it"
        )
    older = read_json(path, PairsHeader) if begun else about
    grown = older["number"] % older["chunk"] == 0 and about["number"] > older["number"]
    if about != older | ({"number": about["number"]} if grown else {}):
        differs = [
            f"{k} {older.get(k)} there, {v} here" for k, v in about.items() if older.get(k) != v
        ]
        raise ValueError(f"--out {out} holds other pairs ({'; '.join(differs)}): choose another")
    mark(out, "tools.pairs")
    write_whole(path, json.dumps(about, indent=1).encode())


def whole(file: Path, about: dict) -> bool:
    """Whether a chunk is there as it was written; a broken one is made again."""
    try:
        read_pairs(file, about)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Settings(Parted, Sampling):
    out: Path = option(None, "folder of the pairs", group="pairs")
    number: int = option(30_000, "pairs", least=1)
    segments: int = option(1, "pieces kept of each path", least=1)
    steps: int = option(16, "solver steps of a path", least=1)
    solver: str = option("rf_solver", ", ".join(rf.SOLVERS), choices=rf.SOLVERS)
    prompts: Path | None = option(None, "captions, one a line, instead of the run's")
    chunk: int = option(2000, "pairs in a file", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.steps % self.segments:
            raise ValueError(
                f"--steps {self.steps} must be a multiple of --segments {self.segments}"
            )


@program("tools.pairs")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    rows = read_prompts(args.prompts, "--prompts") if args.prompts else []
    lines = [row["prompt"] for row in rows]
    claim(args.out, "tools.pairs")
    pipeline = args.open()
    facts = pipeline.facts | ({"shapes": 0} if lines else {})  # given captions cannot be scored
    settings = pipeline.how(**args.how()) | {"seed": args.seed, "origin": pipeline.origin}
    about = {
        "schema": SCHEMA,
        "facts": facts,
        "settings": settings | {"prompts": zlib.crc32("\n".join(lines).encode())},
        "number": args.number,
        "chunk": args.chunk,
        "segments": args.segments,
        "shape": list(pipeline.latent()),
    }
    about = json.loads(json.dumps(about))  # as it will be read
    captions_of(pipeline, lines, 1, 0)  # before anything is written, as the next
    pipeline.text.prepare(lines)
    begin_folder(args.out, about)
    files = [args.out / f"{i:05d}.safetensors" for i in range(-(-args.number // args.chunk))]
    total = args.number // args.share.step
    with tqdm(total=total, unit="pair", unit_scale=True, desc="pairs") as bar:
        for file in files[args.share]:
            i = int(file.stem)
            if whole(file, about):
                rows = min(args.chunk, args.number - i * args.chunk)
                bar.initial = rows + getattr(bar, "initial", 0)  # the speed leaves it out
                bar.update(rows)
            else:
                content = chunk_bytes(pipeline, about, lines, i, args.batch or 128, bar)
                if read_json(args.out / "pairs.json") | {"number": args.number} != about:
                    raise ValueError(f"--out {args.out} was begun anew with others: choose another")
                write_whole(file, content)
    if not all(file.exists() for file in files):
        print(f"this part is done; {args.out} is ready when all parts are")
        return
    sweep(args.out)
    print(f"{args.out} holds {args.number:,} pairs")


if __name__ == "__main__":
    main()
