"""CHAPTER 2: captions → pictures → scores, with any run of either chapter.

    python sample_t2i.py runs/shapes "two red circles above a blue square"
    python sample_t2i.py runs/mnist 3 1 4 --images 8 --gif
    python sample_t2i.py runs/shapes --prompts prompts.txt --cfg 5 --part 0/8
    python sample_t2i.py runs/shapes --score
    python sample_t2i.py runs/shapes --score --against runs/shapes4 --at-steps 1 2 4
    python sample_t2i.py fal/AuraFlow-v0.3 "a cat reading a newspaper" --auraflow
    python sample_t2i.py runs/mine --export diffusers out/mine

RUN is the folder of a run (its newest weights are taken), of one checkpoint, or of exported
weights. What it draws:

    out.png                        a sheet: a row of pictures for each caption
    out_pictures/00003-0001.png    each picture at its own size: caption 3, picture 1, both from 0
    out_pictures/metadata.jsonl    a line for each: file_name, text, and how it was made

With --part 0/8 … 7/8 eight processes share the captions and fill one such folder, without a sheet.
The score asks for the six GenEval tags (2310.11513) with captions that training never saw, and an
exact reader (inputs/shapes.py) says which pictures obey.

Start reading at paint(): captions and noise go in, pictures come out. Pipeline.draw
(common/pipeline.py) encodes the captions, rf.sample follows the velocity, the image encoder
decodes. The noise of a picture depends on --seed and its number alone: the same picture comes at
any batch size, and two runs, or two values of an option, can be compared picture by picture.
"""

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import torch
from torch import Tensor

import rf
from common import pictures
from common.auraflow import check, save_diffusers, save_pipeline
from common.log import write_rows
from common.pipeline import Pipeline, Sampling
from common.retrieval import Gallery, beside_nearest, retrieved
from common.settings import Parted, option, parse
from common.start import (
    MARK,
    PART,
    claim,
    owned,
    program,
    read_prompts,
    write_all,
    write_whole,
)
from inputs.encoders import VAE, HuggingFaceText
from inputs.rows import open_rows
from inputs.shapes import TAGS, World, obeyed, prompts_by_tag, scores

MANY = 200  # pictures of an earlier command that another replaces without being told to
OWNER = ("sample_t2i.py", "--out: the folder")  # of the single pictures, for claim and owned


@dataclass(frozen=True)
class Settings(Parted, Sampling):
    """Sampling (common/pipeline.py) has the options of every program that draws: cfg, steps, …"""

    prompt: list[str] = option([], "one or more captions, in quotes", positional=True)
    prompts: Path | None = option(
        None, "a text file with a caption on each line, or .jsonl", group="what"
    )
    images: int = option(4, "pictures of each caption", least=1)
    size: str | None = option(None, "pixels a side, or HEIGHTxWIDTH (the run's)")
    gif: bool = option(False, "also the way from noise to image, beside --out")
    nearest: bool = option(False, "also each beside the nearest pictures of training")
    data_dir: Path = option(Path("data"), "--nearest, --score: where MNIST and CIFAR-10 lie")
    out: Path = option(Path("out.png"), "the sheet; the single pictures go beside it")
    score: bool = option(False, "score the run on held-out captions", group="or else")
    against: list[str] = option([], "--score: other runs beside it")
    at_steps: list[int] = option([], "--score: at each of these numbers of steps", least=1)
    per_tag: int = option(100, "--score: captions of each tag, or seen and held out", least=1)
    export: list[str] = option([], "write the network as: weights OUT, or diffusers OUT")
    cudagraphs: bool = option(False, "launch the network as a CUDA graph (GPUs)")

    def __post_init__(self):
        super().__post_init__()
        if self.export and (
            len(self.export) != 2 or self.export[0] not in ("weights", "diffusers")
        ):
            raise ValueError(f"--export {' '.join(self.export)} must be weights or diffusers, OUT")
        if self.share.step > 1 and (self.score or self.export or self.gif or self.nearest):
            alone = "--score, --export, --gif and --nearest"
            raise ValueError(f"--part {self.part} shares captions: drop {alone}")
        if self.auraflow and self.export[:1] == ["weights"]:
            raise ValueError("--auraflow is a release and no run of ours: --export diffusers alone")
        if self.nearest and (self.score or self.export):
            raise ValueError("--nearest is for pictures of captions: drop --score or --export")
        if (self.score or self.export) and (self.prompt or self.prompts):
            raise ValueError("--score and --export draw no captions: drop them")
        if self.score and self.export:
            raise ValueError("--score and --export exclude each other")
        if self.score and self.size:
            raise ValueError(
                f"--score reads pictures of the run's own size: drop --size {self.size}"
            )
        if self.at_steps and self.steps:
            raise ValueError("--at-steps takes the place of --steps: drop one")
        if (self.against or self.at_steps) and not self.score:
            raise ValueError("--against and --at-steps need --score")
        pictures.png_path(self.out)
        if self.nearest:
            pictures.png_path(nearest_path(self.out))

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.stem}_pictures")


# ------------------------------------------------------------------------------------------------
# The network as a CUDA graph
# ------------------------------------------------------------------------------------------------


class Graphed:
    """The network as a CUDA graph, captured once for each shape.

    A forward pass is hundreds of kernels. At small batches Python cannot launch them as fast as the
    GPU runs them, so the GPU waits. A graph records the launches once and repeats them with a
    single one. It repeats them on the same addresses, so inputs are copied into fixed tensors and
    the result is copied out. mmdit.py says what makes the network safe to capture. No gradients.
    """

    WARM_UP = 3  # runs beside the capture, in which libraries choose kernels and take their memory

    def __init__(self, model: rf.Model):
        self.model, self.captured, self.check_size = model, {}, model.check_size

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        shapes = (x.shape, text.shape)
        if shapes not in self.captured:
            self.captured[shapes] = self.capture(x, t, text)
        graph, inputs, velocity = self.captured[shapes]
        for kept, given in zip(inputs, (x, t, text), strict=True):
            kept.copy_(given)
        graph.replay()
        return velocity.clone()  # the next replay writes over it

    def capture(self, *given: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        # A capture must not see one-time work: it would be repeated, or fail.
        inputs, side = [x.clone() for x in given], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                self.model(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            velocity = self.model(*inputs)
        return graph, inputs, velocity


# ------------------------------------------------------------------------------------------------
# What is asked for
# ------------------------------------------------------------------------------------------------


def of_others(folder: Path, metadata: bytes) -> list[Path]:
    """The pictures in the folder, if they are those of another command."""
    file = folder / "metadata.jsonl"
    if file.exists() and file.read_bytes() == metadata:
        return []
    names = (f for f in folder.iterdir() if re.fullmatch(r"\d{5,}-\d{4,}\.png", f.name))
    return [f for f in names if pictures.SIGN in f.read_bytes()]


def paint(pipeline: Pipeline, captions: list[str], args: Settings):
    """--images pictures of each caption: each by itself, as a sheet, and the way to them as a GIF.

    A part draws some of them. They have the names and the noise that they have in the whole.
    """
    part, images = args.share.step > 1, range(args.images)
    numbers = [k * args.images + i for k in range(len(captions))[args.share] for i in images]
    if not numbers:
        print(f"--part {args.part} has none of the {len(captions)} captions")
        return
    recipe = pipeline.recipe(args.seed, args.size, **args.how())
    rows = [
        {"file_name": f"{k:05d}-{i:04d}.png", "text": caption} | recipe
        for k, caption in enumerate(captions)
        for i in images
    ]
    metadata = "".join(json.dumps(row) + "\n" for row in rows).encode()
    rows = [rows[n] for n in numbers]
    each = [row["text"] for row in rows]
    noise = pipeline.noise(args.seed, numbers, args.size)
    h, w = (side * pipeline.image.factor for side in noise.shape[2:])
    if args.gif and max((h + 1) * len(captions), (w + 1) * args.images) >= pictures.GIF_SIDE:
        raise ValueError(f"--gif: {len(each)} pictures of {h}x{w} are too many for one: drop it")
    text = pipeline.text
    text.prepare(captions)  # an unknown word shows before a folder is made
    for caption in captions[args.share]:
        if (length := text.length(caption)) > text.tokens:
            print(f"{caption!r} has {length} tokens, and the run reads {text.tokens}: it is cut")
    known = gallery({args.run: pipeline}, args) if args.nearest else None
    with owned(args.folder, *OWNER, shared=part):
        # A refusal, before hours of drawing, and of what took hours.
        if len(of_others(args.folder, metadata)) > (0 if part else MANY):
            raise ValueError(
                f"{args.folder} holds pictures of another command: choose another --out"
            )
        if part:  # so that the other parts see whose pictures these are
            write_whole(args.folder / "metadata.jsonl", metadata)
        frames = pipeline.draw(each, noise, progress=True, trajectory=args.gif, **args.how())
        final = frames[-1] if args.gif else frames
        drawn = {
            args.folder / row["file_name"]: pictures.encoded(pictures.beside(picture[None]))
            for row, picture in zip(rows, final, strict=True)
        }
        older = of_others(args.folder, metadata)
        if older and part:  # begun meanwhile
            raise ValueError(f"{args.folder} has become that of another command: choose an --out")
        write_all(drawn | {args.folder / "metadata.jsonl": metadata})
        for file in {*older} - drawn.keys():
            file.unlink()
    print(f"wrote {args.folder}")
    if args.gif:
        pictures.film(frames, args.images, args.out.with_suffix(".gif"))
    if args.nearest:
        beside_nearest(known, final, each, nearest_path(args.out))
    if not part:
        pictures.captioned(final, each, args.out, args.images)
        print(f"wrote {args.out}")


def nearest_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}_nearest.png")


def gallery(pipelines: dict[str, Pipeline], args: Settings) -> Gallery:
    """All pictures of the run's data. ValueError if they are not those that it learned from, and
    every run beside it."""
    pipeline = pipelines[args.run]
    names = shlex.split(pipeline.facts["source"])
    rows = open_rows(names, data_dir=args.data_dir, seed=pipeline.facts["seed"])
    for name, each in pipelines.items():
        if each.facts["rows"] != rows.id:
            raise ValueError(f"{' '.join(names)} holds other rows than {name} was trained on")
    return Gallery(rows.sources, pipeline.image)


def score(pipelines: dict[str, Pipeline], args: Settings):
    """The six scores of each run at each number of steps: printed, as a CSV, and the first picture
    of each tag.

    All runs draw the same captions from the same noise, so what differs is the run. With 100
    captions of a tag a score of 0.8 has a standard error of 0.04.
    """
    rows, shown, worlds = [], [], {}
    for name, pipeline in pipelines.items():
        if not pipeline.facts["shapes"]:
            raise ValueError(f"--against {name} was not trained on shapes")
        worlds[name] = World.of(pipeline.facts)
        if worlds[name] != worlds[args.run]:
            raise ValueError(
                f"--against {name}, of {worlds[name]}, must be of the world of {args.run},"
                f" {worlds[args.run]}: score it alone"
            )
    asked = prompts_by_tag(worlds[args.run], args.per_tag)
    captions = [caption for _, caption in asked]
    for name, pipeline in pipelines.items():
        noise = pipeline.noise(args.seed, range(len(asked)))
        for steps in args.at_steps or [args.steps or pipeline.facts["steps"]]:
            how = args.how() | {"steps": steps}
            drawn = pipeline.draw(captions, noise, progress=True, **how)
            found = scores(asked, obeyed(drawn, asked))
            rows.append({"run": name, "steps": steps} | found)
            shown.append(drawn[:: args.per_tag])
            print(f"{name}, {steps} steps")
            for tag, value in found.items():
                print(f"  {tag:14} {value:.3f}")
    table = args.out.with_suffix(".csv")
    write_rows(table, rows)
    beside = [f"{row['run']}, {row['steps']}" for row in rows]
    pictures.sheet(torch.cat(shown), len(TAGS), args.out, captions[:: args.per_tag], beside)


def retrieval(pipelines: dict[str, Pipeline], args: Settings):
    """The score of pictures of one's own, for captions of training and for those held out: is the
    nearest of all pictures the one that was asked for? Printed, as a CSV, and a sheet of drawings.

    Two rows beside them: real pictures moved by one pixel, the ceiling, and what chance would find.
    """
    known = gallery(pipelines, args)
    groups = {name: known.ask(args.per_tag, name == "held") for name in ("seen", "held")}
    groups = {name: asked for name, asked in groups.items() if asked}
    rows = []

    def add(run: str, steps, group: str, found: dict):
        rows.append({"run": run, "steps": steps, "captions": group} | found)
        said = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"{run}{f', {steps} steps' if steps else ''}, {group}: {said}")

    for group, asked in groups.items():
        captions = [known.captions[i] for i in asked]
        for name, pipeline in pipelines.items():
            noise = pipeline.noise(args.seed, range(len(asked)))
            for steps in args.at_steps or [args.steps or pipeline.facts["steps"]]:
                how = args.how() | {"steps": steps}
                drawn = pipeline.draw(captions, noise, progress=True, **how)
                add(name, steps, f"{len(asked)} {group}", retrieved(known, drawn, asked))
                if name == args.run:  # at last those that were held out
                    shown = drawn[:24], captions[:24]
        moved = known.pictures(asked, drawn.shape[2:]).roll(1, dims=3)
        add("real, moved by a pixel", "", f"{len(asked)} {group}", retrieved(known, moved, asked))
    total = len(known.captions)
    chance = {"top1": 1 / total, "top5": 5 / total, "variant": nan, "copy": nan}
    add("chance", "", f"of {total} pictures", chance)
    write_rows(args.out.with_suffix(".csv"), rows)
    pictures.captioned(*shown, args.out)


def export(pipeline: Pipeline, form: str, out: Path):
    """The network for others. "weights": ours. "diffusers": AuraFlow's, and with a real text
    encoder and VAE a whole pipeline."""
    text, image = pipeline.text, pipeline.image
    if form == "weights":
        pipeline.save(out)
    elif isinstance(text, HuggingFaceText) and isinstance(image, VAE):
        save_pipeline(pipeline.model, text, image, out, pipeline.facts["shift"])
    else:
        save_diffusers(pipeline.model, out)


def export_whole(pipeline: Pipeline, form: str, out: Path):
    """As export, but what is killed meanwhile leaves only what the next export deletes."""
    with owned(out, "sample_t2i.py --export", "--export"):
        part = out / PART
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            export(pipeline, form, part)
            # The .json that says what the others are comes last.
            for path in sorted(part.iterdir(), key=lambda path: path.suffix == ".json"):
                os.replace(path, out / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def read_captions(args: Settings) -> list[str]:
    """The captions of the command line, then those of --prompts."""
    captions = [caption for caption in args.prompt if caption.strip()]
    rows = read_prompts(args.prompts, "--prompts") if args.prompts else []
    captions += [row["prompt"] for row in rows]
    if not captions:
        raise ValueError("no caption given: write one in quotes, or give --prompts FILE")
    return captions


@program("sample_t2i.py")
def main(argv: list[str] | None = None):
    args = Settings(**parse(Settings, argv, __doc__))
    if args.export:
        args = replace(args, device="cpu")  # in fp32: GPUs draw with rounded weights
        out = Path(args.export[1])
        claim(out, "sample_t2i.py --export", "--export")
        if out.is_dir() and any(f.name != MARK and f.name[0] != "." for f in out.iterdir()):
            raise ValueError(f"--export {out} holds an export already: choose a new folder")
    elif not args.score:
        captions = read_captions(args)  # a mistake shows before a large model is loaded
        claim(args.folder, *OWNER)
    pipelines = {name: args.open(name) for name in (args.run, *args.against)}
    pipeline = pipelines[args.run]
    if args.export:
        form, out = args.export
        if form == "diffusers":
            check(pipeline.model.config)  # before a folder is made
        export_whole(pipeline, form, Path(out))
        print(f"wrote {out}")
        return
    if args.cudagraphs and pipeline.device.type != "cuda":
        raise ValueError(f"--cudagraphs needs a CUDA device, not {pipeline.device}: drop it")
    # The flow takes any callable for its model, so a graph goes in the network's place.
    for each in pipelines.values() if args.cudagraphs else ():
        each.model = Graphed(each.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside = args.out.with_suffix(".csv" if args.score else ".gif")
    held = beside.read_bytes() if (args.score or args.gif) and beside.exists() else b""
    tables = (b"run,steps,single_object,", b"run,steps,captions,top1,")
    if held and not (held.startswith(tables) if args.score else pictures.SIGN in held):
        raise ValueError(f"{beside} would be overwritten: move it away, or give another --out")
    if args.score:
        (score if pipeline.facts["shapes"] else retrieval)(pipelines, args)
        print(f"wrote {args.out}")
    else:
        paint(pipeline, captions, args)


if __name__ == "__main__":
    main()
