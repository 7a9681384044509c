"""CHAPTER 2: prompts → images, and their score.

    python sample_t2i.py runs/shapes "two red circles above a blue square"
    python sample_t2i.py runs/shapes --prompts prompts.txt --gif
    python sample_t2i.py runs/shapes --score shapes --steps 20
    python sample_t2i.py runs/mine --geneval evaluation_metadata.jsonl --out out/geneval
    python sample_t2i.py --auraflow fal/AuraFlow-v0.3 "a cat reading a newspaper"
    python sample_t2i.py runs/mine --export diffusers out/mine

RUN is the folder of a run (its newest checkpoint is taken), of one checkpoint, or of exported
weights. The score asks for the six GenEval tags (2310.11513) with prompts that training never saw,
and an exact reader (shapes.py) says which pictures obey.
"""

import argparse
import json
import sys
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import cpu
import rf
import shapes
from auraflow import (
    load_auraflow,
    pipeline_folder,
    save_diffusers,
    save_original,
    save_pipeline,
)  # fmt: skip
from cache import TextFormat, write_whole
from data_mnist import mix_seed
from encoders import (
    VAE,
    HashText,
    HuggingFaceText,
    Pixels,
    image_encoder,
    pretrained,
    text_encoder,
)
from mmdit import MMDiT, load_model

# AuraFlow's own pipeline: 1024 pixels, guidance 3.5, 50 Euler steps on a grid shifted by 1.73
AURAFLOW = {"size": 1024, "cfg": 3.5, "steps": 50, "shift": 1.73}

# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------


def fixed_noise(n: int, shape: tuple[int, ...], seed: int, first: int = 0) -> Tensor:
    """(n, *shape) fp32 on the CPU; image i ≥ first has a noise of (seed, i) alone."""
    generator = torch.Generator()
    return torch.stack(
        [
            torch.randn(shape, generator=generator.manual_seed(mix_seed(seed, "picture", i)))
            for i in range(first, first + n)
        ]
    )


def draw(
    model: rf.Model, captions: list[str], noise: Tensor, *, text, image, device="cpu", batch=128,
    progress=False, **options,
) -> Tensor:  # fmt: skip
    """captions, noise (B, C, h, w) → pictures (B, 3, H, W) uint8 on the CPU.

    text, image: encoders of encoders.py. options go to rf.sample (cfg, steps, solver, shift); with
    return_trajectory=True (steps + 1, B, 3, H, W), the noise first. batch: images at a time.
    """
    null = text([""]).to(device)
    pictures = []
    for part in tqdm(torch.arange(len(captions)).split(batch), unit="batch", disable=not progress):
        features = text([captions[i] for i in part]).to(device)
        x = rf.sample(model, noise[part].to(device), features, null_text=null, **options)
        if options.get("return_trajectory"):
            pictures.append(torch.stack([image.decode(frame).cpu() for frame in x]))
        else:
            pictures.append(image.decode(x).cpu())
    return torch.cat(pictures, dim=1 if options.get("return_trajectory") else 0)


class Graphed:
    """The network as a CUDA graph, captured once for each shape: a solver step is then one launch
    and a few small operations, not thousands of launches from Python. Static shapes, no gradients.
    """

    WARM_UP = 3  # runs beside the capture, in which libraries choose kernels and take their memory

    def __init__(self, model: rf.Model):
        self.model, self.captured = model, {}

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


def picture_grid(pictures: Tensor, columns: int, side: int = 96):
    """(B, 3, H, W) uint8 → a PIL image, row by row; small pictures are enlarged to about `side`."""
    from PIL import Image
    from torchvision.utils import make_grid

    array = make_grid(pictures, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    factor = max(1, round(side / pictures.shape[-1]))
    grid = Image.fromarray(array)
    return grid.resize((grid.width * factor, grid.height * factor), Image.NEAREST)


def captioned_grid(pictures: Tensor, captions: list[str], path: Path, columns: int = 6):
    """The pictures with their prompts above them, as a PNG."""
    import matplotlib.pyplot as plt

    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 2.05 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(textwrap.fill(caption, 26), fontsize=7, parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# Score
# ------------------------------------------------------------------------------------------------


def shapes_prompts(world: shapes.World, n: int) -> list[tuple[shapes.Meaning, str]]:
    """n held-out prompts of each of the six tags, tag after tag."""
    return [prompt for tag in shapes.TAGS for prompt in shapes.prompts(tag, n, world=world)]


def obeyed(pictures: Tensor, prompts: list[tuple[shapes.Meaning, str]]) -> list[bool]:
    """Whether each picture (3, H, W) uint8 obeys its prompt, by the exact reader."""
    return [
        shapes.obeys(meaning, shapes.detect(picture.numpy()))
        for picture, (meaning, _) in zip(pictures, prompts, strict=True)
    ]


def scores(prompts: list[tuple[shapes.Meaning, str]], obeys: list[bool]) -> dict[str, float]:
    """The share of obedient pictures of each tag, and the mean of the six."""
    by_tag = {
        tag: [o for (meaning, _), o in zip(prompts, obeys, strict=True) if meaning.tag == tag]
        for tag in shapes.TAGS
    }
    result = {tag: sum(values) / len(values) for tag, values in by_tag.items()}
    return result | {"mean": sum(result.values()) / len(result)}


# ------------------------------------------------------------------------------------------------
# A run's weights
# ------------------------------------------------------------------------------------------------


def find_weights(path: Path, ema: str | None = None) -> Path:
    """The folder of weights that RUN means: itself, or the newest checkpoint's narrowest average.

    Raises FileNotFoundError if there is none.
    """
    if (path / "model.safetensors").is_file():
        return path
    checkpoints = sorted((path / "checkpoints").glob("[0-9]" * 12))
    folder = checkpoints[-1] if checkpoints else path
    averages = sorted(p for p in folder.glob("ema_*") if (p / "model.safetensors").is_file())
    wanted = [p for p in averages if ema in (None, p.name.removeprefix("ema_"))]
    if not wanted:
        have = f"it holds {', '.join(p.name for p in averages)}" if averages else "train one first"
        raise FileNotFoundError(f"{path} holds no weights{f' ema_{ema}' if ema else ''}: {have}")
    return wanted[0]


def run_settings(folder: Path) -> dict:
    """What the run was told whose weights lie in this folder."""
    config = json.loads((folder / "config.json").read_text())
    if "run" not in config or "text_encoder" not in config["run"]:
        raise ValueError(f"{folder} was not written by train_t2i.py: its config.json has no run")
    return config["run"]


def load_run(path: Path, device, ema: str | None = None) -> tuple[MMDiT, dict]:
    """The model of a run, and the settings it was trained with."""
    folder = find_weights(path, ema)
    return load_model(folder, device), run_settings(folder)


class AsStored(NamedTuple):
    """A text encoder whose features are rounded as a cache rounds them: as the model saw them."""

    encoder: HashText | HuggingFaceText
    format: TextFormat

    def __call__(self, captions: list[str]) -> Tensor:
        stored = [self.format.read(self.format.pack(f)) for f in self.encoder(captions)]
        return self.format.expand(self.format.join(stored))


class Painter(NamedTuple):
    """All that turns prompts into pictures; `settings` are those of the run."""

    model: MMDiT | Graphed
    text: HashText | HuggingFaceText
    image: Pixels | VAE
    settings: dict
    origin: str  # which weights

    @classmethod
    def of_run(cls, path: Path, device, ema: str | None = None) -> "Painter":
        model, run = load_run(path, device, ema)
        text = text_encoder(run["text_encoder"], tokens=run["text_tokens"], device=device)
        if run.get("text_format"):
            text = AsStored(text, TextFormat(**run["text_format"]))
        origin = f"{find_weights(path, ema)} after {run.get('samples_seen')} samples"
        return cls(
            model,
            text,
            image_encoder(run["vae"], device),
            {"steps": run.get("sample_steps", 20)} | run,
            origin,
        )

    @classmethod
    def of_auraflow(cls, name: str, device) -> "Painter":
        """AuraFlow's own pipeline, by hub name or folder; network and text in bf16 on a GPU."""
        folder = pipeline_folder(name)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = load_auraflow(folder, device, dtype)
        text = HuggingFaceText(str(folder), 256, device, dtype)
        return cls(model, text, VAE(str(folder), device), AURAFLOW, name)


def export(painter: Painter, naming: str, out: Path):
    """Write the network for others: "diffusers" a folder, "auraflow" one file (auraflow.py).

    With a real text encoder and VAE the diffusers folder is a whole pipeline.
    """
    model, text, image, settings, _ = painter
    text = getattr(text, "encoder", text)
    if naming == "auraflow":
        save_original(model, out)
    elif isinstance(text, HashText) or isinstance(image, Pixels):
        save_diffusers(model, out)
    else:
        save_pipeline(model, text, image, out, settings["shift"])


# ------------------------------------------------------------------------------------------------
# Prompts rewritten, and GenEval's folders
# ------------------------------------------------------------------------------------------------


class Enhancer:
    """A local instruction model that writes prompts out, as AuraFlow's release does with its own.

    Models like the long captions they were trained on. Greedy: a prompt is always rewritten alike.
    """

    ASK = (
        "Rewrite this prompt for an image generator as one detailed sentence. Keep every object,"
        " number, colour and position it names. Answer with the sentence alone."
    )

    def __init__(self, name: str, device):
        self.device = device
        self.model, self.tokenizer = pretrained(
            name, device, "--enhance", "AutoModelForCausalLM", "AutoTokenizer"
        )

    @torch.no_grad()
    def __call__(self, prompt: str) -> str:
        asked = f"{self.ASK}\n\n{prompt}"
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": asked}]
            asked = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
        inputs = self.tokenizer(asked, return_tensors="pt").to(self.device)
        tokens = self.model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=128,
            do_sample=False, pad_token_id=self.tokenizer.pad_token_id or 0,
        )  # fmt: skip
        said = self.tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], True)
        return " ".join(said.split()) or prompt


def enhance(prompts: list[str], name: str | None, device) -> list[str]:
    """The prompts, rewritten by the model `name` if there is one."""
    if name is None:
        return prompts
    enhancer = Enhancer(name, device)
    return [enhancer(prompt) for prompt in tqdm(prompts, unit="prompt", desc="rewriting")]


def read_metadata(path: Path) -> list[dict]:
    """GenEval's evaluation_metadata.jsonl: an object with a prompt on each line."""
    if not path.is_file():
        raise FileNotFoundError(f"--geneval {path} is not there: give evaluation_metadata.jsonl")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except ValueError as error:
        raise ValueError(f"--geneval {path} is not JSON lines: {error}") from error
    wrong = next((i for i, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)), 0)
    if wrong or not rows:
        raise ValueError(f"--geneval {path}: line {wrong or 1} has no prompt")
    return rows


def geneval(painter: "Painter", rows: list[dict], prompts: list[str], out: Path, images: int,
            seed: int, size: tuple[int, int], options: dict):  # fmt: skip
    """The evaluator's layout: out/00000/metadata.jsonl and samples/0000.png …, a folder a prompt.

    What is there already is not drawn again; an image's noise depends on (seed, its place) alone.
    """
    from torchvision.io import encode_png

    told = {key: options[key] for key in ("cfg", "steps", "shift", "solver")}
    told |= {"seed": seed, "size": list(size), "images": images, "model": painter.origin}
    told["prompts"] = zlib.crc32(json.dumps([rows, prompts]).encode())
    begun = out / "settings.json"
    if begun.exists() and json.loads(begun.read_text()) != told:
        raise ValueError(f"--out {out} was begun with {begun.read_text()}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(begun, json.dumps(told).encode())
    noise_shape = (painter.image.channels, *size)
    missing = []
    for k, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        folder = out / f"{k:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metadata.jsonl", json.dumps(row).encode())
        if prompt != row["prompt"]:
            write_whole(folder / "enhanced.txt", prompt.encode())
        files = [folder / "samples" / f"{i:04d}.png" for i in range(images)]
        missing += [(f, k * images + i) for i, f in enumerate(files) if not f.exists()]
    batch = options.pop("batch")
    bar = tqdm(total=len(rows) * images, initial=len(rows) * images - len(missing), unit="image")
    with bar:
        for some in (missing[i : i + batch] for i in range(0, len(missing), batch)):
            captions = [prompts[number // images] for _, number in some]
            noise = torch.cat([fixed_noise(1, noise_shape, seed, first=n) for _, n in some])
            pictures = draw(painter.model, captions, noise, batch=batch, **options)
            for (file, _), picture in zip(some, pictures, strict=True):
                write_whole(file, encode_png(picture).numpy().tobytes())
            bar.update(len(some))


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="folder of a run, a checkpoint, or exported weights")
    add("prompt", nargs="*", help="one or more prompts, in quotes")
    add("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    add("--auraflow", metavar="NAME", help="AuraFlow's pipeline, folder or hub name, for RUN")
    add("--enhance", metavar="MODEL", help="rewrite prompts with a local instruction model")
    add("--geneval", type=Path, metavar="METADATA.jsonl",
        help="draw GenEval's prompts into --out, a folder in the evaluator's layout")  # fmt: skip
    add("--export", nargs=2, metavar=("FORMAT", "OUT"),
        help="write: diffusers (a folder) or auraflow (one file, original keys)")  # fmt: skip
    add("--score", choices=["shapes"], help="score held-out prompts instead of drawing given ones")
    add("--per-tag", type=int, default=100, help="scored prompts of each tag (default: 100)")
    add("--images", type=int, default=4, help="pictures of each prompt (default: 4)")
    add("--cfg", type=float, help="guidance: 1 none, above 1 closer to the prompt (default: run's)")
    add("--steps", type=int, help="solver steps from noise to image (default: the run's)")
    add("--size", help="side of the picture in pixels, or HEIGHTxWIDTH (default: the run's)")
    add("--solver", default="euler", help=f"one of {', '.join(rf.SOLVERS)} (default: euler)")
    add("--shift", type=float, help="of the sampler's time grid (default: the run's)")
    add("--ema", help="which average, say 0.05 or 0.10 (default: the narrowest)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--batch", type=int, default=128, help="images at a time (default: 128)")
    add("--cudagraphs", action="store_true", help="launch the network as a CUDA graph (GPUs)")
    add("--device", default="auto", help="auto, cpu, mps or cuda (default: auto)")
    add("--out", type=Path, default=Path("out.png"), help="the picture (default: out.png)")
    add("--gif", action="store_true", help="also the way from noise to image, beside --out")
    return parser


def read_prompts(args: argparse.Namespace) -> list[str]:
    captions = list(args.prompt)
    if args.auraflow and args.run:  # there is no RUN: the first word group is a prompt
        captions.insert(0, args.run)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise FileNotFoundError(
                f"--prompts {args.prompts} is not there: give a text file, a prompt on each line"
            )
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        captions += [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError("no prompt given: write one in quotes, or give --prompts FILE")
    return captions


def latent_size(size: int | str, factor: int) -> tuple[int, int]:
    """512 or "512x768" in pixels → the latent's rows and columns. ValueError if it does not fit."""
    sides = str(size).split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--size {size} must be a number of pixels or HEIGHTxWIDTH")
    for side in map(int, sides):
        if side % factor:
            raise ValueError(f"--size {size} must be a multiple of {factor}, the VAE's factor")
    return int(sides[0]) // factor, int(sides[-1]) // factor


def check(args: argparse.Namespace):
    """Reject what cannot work before anything is loaded."""
    for key in ("steps", "images", "per_tag", "batch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    if args.solver not in rf.SOLVERS:
        raise ValueError(f"--solver {args.solver!r} must be one of {', '.join(rf.SOLVERS)}")
    if args.export and args.export[0] not in ("diffusers", "auraflow"):
        raise ValueError(f"--export {args.export[0]!r} must be diffusers or auraflow")
    if not (args.run or args.auraflow):
        raise ValueError("no RUN given: the folder of a run, or --auraflow NAME")
    if args.geneval and args.out.suffix:
        raise ValueError(f"--geneval writes many files: give a folder as --out, not {args.out}")


def launch(args: argparse.Namespace):
    from train_mnist import choose_device

    check(args)
    cpu.tune()
    device = choose_device(args.device)
    if args.cudagraphs and device.type != "cuda":
        raise ValueError(f"--cudagraphs needs a CUDA device, this is {device}: drop it")
    rows = read_metadata(args.geneval) if args.geneval else []
    prompts = [row["prompt"] for row in rows]
    if not (args.geneval or args.score or args.export):
        prompts = read_prompts(args)
    if args.auraflow:
        painter = Painter.of_auraflow(args.auraflow, device)
    else:
        painter = Painter.of_run(Path(args.run), device, args.ema)
    if args.export:
        export(painter, args.export[0], Path(args.export[1]))
        print(f"wrote {args.export[1]}")
        return
    if args.cudagraphs:
        painter = painter._replace(model=Graphed(painter.model))
    _, text, image, run, _ = painter
    if args.score and (run.get("data") or not run.get("shapes")):
        raise ValueError(f"--score shapes: {args.run or args.auraflow} was not trained on shapes")
    size = latent_size(args.size or run["size"], image.factor)
    options = {
        "text": text, "image": image, "device": device, "batch": args.batch, "solver": args.solver,
    } | {
        key: run[key] if getattr(args, key) is None else getattr(args, key)
        for key in ("cfg", "steps", "shift")
    }  # fmt: skip
    rewritten = enhance(prompts, args.enhance, device)
    if args.score:
        score(painter, args, size, options)
    elif args.geneval:
        geneval(painter, rows, rewritten, args.out, args.images, args.seed, size, options)
    else:
        paint(painter, args, rewritten, size, options)
        if args.enhance:
            pairs = zip(prompts, rewritten, strict=True)
            text = json.dumps([{"prompt": a, "enhanced": b} for a, b in pairs], indent=1)
            write_whole(args.out.with_suffix(".json"), text.encode())
    print(f"wrote {args.out}")


def score(painter: Painter, args: argparse.Namespace, size: tuple[int, int], options: dict):
    """The six scores, printed, and a grid of the first pictures of each tag."""
    run, image = painter.settings, painter.image
    world = shapes.World(run["size"], run["shapes"], run["colors"], run["places"])
    prompts = shapes_prompts(world, args.per_tag)
    captions = [caption for _, caption in prompts]
    noise = fixed_noise(len(prompts), (image.channels, *size), args.seed)
    pictures = draw(painter.model, captions, noise, progress=True, **options)
    for tag, value in scores(prompts, obeyed(pictures, prompts)).items():
        print(f"{tag:14} {value:.3f}")
    shown = [t * args.per_tag + i for i in range(min(4, args.per_tag)) for t in range(6)]
    captioned_grid(pictures[shown], [captions[i] for i in shown], args.out)


def paint(painter: Painter, args, captions: list[str], size: tuple[int, int], options: dict):
    """--images pictures of each caption, as a grid, and the way to them as a GIF."""
    from pictures_mnist import save_gif

    each = [caption for caption in captions for _ in range(args.images)]
    noise = fixed_noise(len(each), (painter.image.channels, *size), args.seed)
    pictures = draw(
        painter.model, each, noise, progress=True, return_trajectory=args.gif, **options
    )
    if args.gif:
        save_gif(pictures.float() / 127.5 - 1, args.images, args.out.with_suffix(".gif"))
        pictures = pictures[-1]
    captioned_grid(pictures, each, args.out, columns=args.images)


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        launch(args)
    except (ValueError, OSError) as error:
        sys.exit(f"sample_t2i.py: {error}")


if __name__ == "__main__":
    main()
