"""PIPELINE: what was learned, and all that turns captions into pictures with it.

    network, text encoder, image encoder, facts         as in diffusers

The facts say how the network wants to be used: size, guidance, steps, time shift, and which rows it
was trained on. A pipeline comes from the folder of a run of either chapter, from one checkpoint,
from exported weights, or from AuraFlow's release.

Shapes: B batch, T text tokens, E text features, (C, h, w) what the network sees of an image.
"""

import json
import os
import shlex
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

import rf
from common.auraflow import load_auraflow, pipeline_folder
from common.log import LogRow
from common.settings import (
    Checked,
    Count,
    Natural,
    Options,
    flag,
    option,
    read_json,
    rule,
    settle,
)
from common.start import begin, choose_device, intact
from inputs.digits import SOURCES
from inputs.encoders import (
    VAE,
    HuggingFaceText,
    TextFormat,
    image_encoder,
    same_models,
    text_encoder,
)
from inputs.rows import open_rows
from inputs.stored import Facts
from mmdit import MMDiT, MMDiTConfig, checksum, load_model, save_model

# AuraFlow's own pipeline: 1024 pixels, guidance 3.5, 50 Euler steps on a grid shifted by 1.73
AURAFLOW = {"size": 1024, "cfg": 3.5, "cfg_below": 1.0, "steps": 50, "shift": 1.73, "shapes": 0}
AURAFLOW |= {"solver": "euler", "source": "AuraFlow", "rows": "", "models": [], "seed": 0}
HOW = ("cfg", "cfg_below", "steps", "shift", "solver")  # of rf.sample: a run has its own values
FROM_INIT = (  # what a run takes over from the one it starts from
    "preset",
    "patch_size",
    "residual",
    "cfg",
    "cfg_below",
    "size",
    "text_encoder",
    "text_tokens",
    "vae",
)
RUN_FILE = "run.json"  # of a checkpoint of chapter 2

# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------


def fixed_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(n, *shape) fp32 on the CPU: picture i has a noise of (seed, i) alone."""
    generators = rf.generators(seed, "picture", numbers)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def draw(
    model: rf.Model,
    image,
    noise: Tensor,
    features: Callable[[list[int]], Tensor],
    null_text: Tensor,
    *,
    batch: int = 128,
    progress: bool = False,
    trajectory: bool = False,
    **how,
) -> Tensor:
    """noise (B, C, h, w) → pictures (B, C, H, W) uint8 on the CPU.

    The one loop that draws, for samplers and for evaluations during training. features: numbers of
    pictures → their text (b, T, E) on the device. how: of rf.sample. batch: pictures at a time.
    trajectory: (steps + 1, B, C, H, W), the noise first.
    """
    pictures, device = [], null_text.device
    parts = torch.arange(len(noise)).split(batch)
    for part in tqdm(parts, unit="batch", disable=not progress):
        text, x = features(part.tolist()), noise[part].to(device)
        x = rf.sample(model, x, text, null_text=null_text, return_trajectory=trajectory, **how)
        if not x.isfinite().all():
            raise FloatingPointError("a picture is not finite: lower --cfg, or look at the weights")
        frames = [image.decode(frame).cpu() for frame in (x if trajectory else x[None])]
        pictures.append(torch.stack(frames))  # (steps + 1 or 1, b, C, H, W)
    pictures = torch.cat(pictures, dim=1)
    return pictures if trajectory else pictures[0]


@dataclass(frozen=True)
class Sampling(Options):
    """Options of every program that draws with a run. None: the run's own value (its facts).

    A model is made for one size, shift and guidance. So a run stores them, and whoever samples
    need not know how it was trained.
    """

    run: str = option(None, "folder of a run, a checkpoint, or exported weights", positional=True)
    auraflow: bool = option(False, "RUN is AuraFlow's pipeline: a folder or hub name")
    cfg: float | None = option(
        None, "guidance: 1 none, above 1 closer to the text (the run's)", least=-100, most=100
    )
    cfg_below: float | None = option(
        None, "guidance at times t up to this alone (the run's)", least=0, most=1
    )
    steps: int | None = option(None, "solver steps from noise to image (the run's)", least=1)
    shift: float | None = option(
        None, "of the sampler's time grid (the run's)", least=0.01, most=100
    )
    solver: str | None = option(None, f"{', '.join(rf.SOLVERS)} (the run's)", choices=rf.SOLVERS)
    ema: float | None = option(
        None, "width of the average, say 0.05 (the narrowest)", least=0.001, most=0.28
    )
    seed: int = option(0, "of the noise", least=0)
    batch: int | None = option(None, "images at a time (128, fewer where they are large)", least=1)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N")

    def open(self, run: str | None = None) -> "Pipeline":
        """The pipeline of RUN, or of another run, on the device.

        Network and text encoder are in bf16 on a GPU, in fp32 elsewhere. The steps of the solver
        and the VAE are in fp32 everywhere.
        """
        device = choose_device(self.device)
        begin(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if self.auraflow:
            return Pipeline.auraflow(run or self.run, device, dtype)
        return Pipeline.open(run or self.run, device, self.ema, dtype)

    def how(self) -> dict:
        """Arguments of Pipeline.draw."""
        return {key: getattr(self, key) for key in (*HOW, "batch")}


@dataclass
class Pipeline:
    """Network, encoders and facts: captions and noise → pictures."""

    model: rf.Model
    text: object  # an encoder of encoders.py
    image: object
    facts: dict
    device: torch.device | str = "cpu"
    origin: str = ""  # which weights, for people

    @classmethod
    def open(
        cls, path: str | Path, device="cpu", ema: float | None = None, dtype=torch.float32
    ) -> "Pipeline":
        """A run, a checkpoint or exported weights. ema: the relative width of the average, if not
        the one that was exported, or the narrowest: any width near the two that are kept. dtype: of
        network and text encoder.

        Raises FileNotFoundError or ValueError if it holds no weights of ours.
        """
        path, facts = Path(path), read_facts(path)
        if ema is None and (path / "model.safetensors").is_file():
            model, origin = load_model(path, device), str(path)
        else:
            model, origin = open_checkpoint(path, ema)
        tokens, words = facts["text_tokens"], facts["words"]
        text = text_encoder(facts["text_encoder"], tokens, device, words, dtype)
        image = image_encoder(facts["vae"], device, facts["channels"])
        same_models(facts["models"], text, image)
        seen = (model.config.text_dim, model.config.in_channels)
        if seen != (text.dim, image.channels):
            raise ValueError(f"{path} is damaged: its facts and its network do not fit each other")
        # Programs that go on with older files compare it: the weights must be the same, too.
        weights = checksum(model.state_dict()) % 2**32
        origin += f" after {facts['samples']} samples (weights {weights:08x})"
        return cls(model.to(device, dtype).eval(), text, image, facts, device, origin)

    @classmethod
    def auraflow(cls, name: str, device, dtype=torch.float32) -> "Pipeline":
        """AuraFlow's release, by hub name or folder. dtype: of network and text encoder."""
        folder = pipeline_folder(name)
        model = load_auraflow(folder, device, dtype)
        text, image = HuggingFaceText(str(folder), 256, device, dtype), VAE(str(folder), device)
        seen = (model.config.text_dim, model.config.in_channels)
        if seen != (text.dim, image.channels):
            raise ValueError(f"{name}: transformer/ does not fit text_encoder/ and vae/ beside it")
        return cls(model, text, image, AURAFLOW, device, name)

    def latent(self, size: int | str | None = None) -> tuple[int, int, int]:
        """(C, h, w) of a picture of 512 or "512x768" pixels. ValueError if it does not fit."""
        size, factor = size or self.facts["size"], self.image.factor
        sides = str(size).split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"--size {size} must be a number of pixels or HEIGHTxWIDTH")
        if any(int(side) % factor for side in sides):
            raise ValueError(f"--size {size} must be a multiple of {factor}, the VAE's factor")
        h, w = int(sides[0]) // factor, int(sides[-1]) // factor
        if hasattr(self.model, "check_size"):  # before a folder is made
            self.model.check_size(h, w)
        return self.image.channels, h, w

    def noise(self, seed: int, numbers: Sequence[int], size: int | str | None = None) -> Tensor:
        """(n, C, h, w) fp32 on the CPU; picture i has a noise of (seed, i) alone."""
        return fixed_noise(seed, numbers, self.latent(size))

    def features(self, captions: list[str]) -> Tensor:
        """(B, T, E) fp32 on the device, rounded as the rows of the run stored them.

        A network that learned on features of 8 bits would see other numbers without that.
        """
        if isinstance(captions, str):  # its letters would be taken
            raise ValueError(f"captions {captions!r:.80} must be a list")
        text_format = self.facts.get("text_format")
        if text_format is None:
            return self.text.expand(self.text.prepare(captions), self.device)
        kept = TextFormat(**text_format)
        return kept.expand(kept.join([kept.pack(f) for f in self.text(captions)]), self.device)

    def how(self, **given) -> dict:
        """Of HOW, for rf.sample; None is the run's own value."""
        return {key: self.facts[key] if given.get(key) is None else given[key] for key in HOW}

    def recipe(self, seed: int, size: int | str | None = None, **given) -> dict:
        """What a picture is made of, apart from its caption and number: JSON values."""
        made = {"seed": seed, "size": list(self.latent(size)), "model": self.origin}
        return self.how(**given) | made

    def draw(
        self,
        captions: list[str],
        noise: Tensor,
        batch=None,
        progress=False,
        trajectory=False,
        **how,
    ) -> Tensor:
        """captions, noise (B, C, h, w) → pictures (B, C, H, W) uint8 on the CPU.

        how: of HOW. batch, progress, trajectory: as in draw above.
        """
        unknown = how.keys() - {*HOW}
        if unknown:
            raise TypeError(f"draw takes {', '.join(HOW)}, not {', '.join(unknown)}")
        if isinstance(captions, str) or len(captions) != len(noise):
            raise ValueError(f"{len(noise)} noises need as many captions, in a list")
        pixels = noise.shape[-1] * noise.shape[-2] * self.image.factor**2
        return draw(
            self.model,
            self.image,
            noise,
            lambda part: self.features([captions[i] for i in part]),
            self.features([""]),
            batch=batch or max(1, min(128, 128 * 256**2 // pixels)),
            progress=progress,
            trajectory=trajectory,
            **self.how(**how),
        )

    def save(self, folder: str | Path):
        """model.safetensors and config.json, which open() reads."""
        save_model(folder, self.model, facts=self.facts)


def run_facts(settings, rows, config: MMDiTConfig, samples: int) -> dict:
    """The facts of a run of either chapter: what its weights need to be used."""
    keys = ("size", "text_encoder", "text_tokens", "vae", "cfg", "cfg_below", "shift", "preset")
    facts = {key: getattr(settings, key) for key in keys}
    facts |= {
        "steps": settings.sample_steps,
        "solver": settings.solver,
        "residual": config.residual,
        "samples": samples,
    }
    facts |= {"patch_size": config.patch_size, "channels": rows.channels, "words": rows.words}
    facts["text_format"] = asdict(rows.text) if isinstance(rows.text, TextFormat) else None
    facts |= {k: getattr(rows.world, k, 0) for k in ("shapes", "colors", "places")}
    facts |= {"rows": rows.id, "models": rows.models, "seed": settings.seed}
    return facts | {"source": shlex.join(map(str, settings.data))}


def drop_export(out: Path):
    """A new checkpoint is newer than the weights that the run exported at an earlier stop."""
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink(missing_ok=True)


def natural_shift(vae: str, size: int) -> float:
    """Of the training times, for latents of pictures with `size` pixels a side: 3 at 1024.

    SD3 (2403.03206) found 3 to be best there, and √(m/n) times as much for m pixels as for n (eq.
    23). Below 1 it would favour times near the data, so it ends there. Pixels have no such rule
    here: 1, and the recipes of shapes have their own.
    """
    return 1.0 if vae == "pixels" else max(1.0, 3 * size / 1024)


def settle_run(
    cls: type, typed: dict, record: dict, device, recipe_of: Callable, stage=None, own=()
) -> tuple:
    """→ the settings and the rows of a run, for both trainers.

    typed: the command line. record: "settings" and "rows" (a checksum) of the run to resume, or {}.
    recipe_of: preset → its defaults. own: further defaults of the trainer's.
    A run that starts from another takes its network and encoders, and its time shift, made fit for
    the new size (natural_shift).
    """
    saved = record.get("settings", {})
    lost = {f.name for f in fields(cls) if not f.metadata["local"]} - saved.keys() if saved else ()
    if lost:
        raise ValueError(f"the run to resume is damaged: its settings lack {', '.join(lost)}")
    out, first = Path(os.path.realpath(typed.get("out", cls.out))), typed.get("init")
    replaced = (out, out.with_name(f"{out.name}.old"))  # move_away
    read = [*typed.get("data", ()), typed.get("data_dir"), first, stage]  # what a run reads
    names = ("shapes", *SOURCES)  # no folders
    for given in (given for given in read if given and given not in names):
        if any(Path(os.path.realpath(given)).is_relative_to(place) for place in replaced):
            raise ValueError(f"{given} lies in --out, which is replaced: choose another --out")
    init = read_facts(first) if first and not saved else {}
    known = saved | typed
    rows = open_rows(
        known.get("data") or shlex.split(init.get("source", cls.DATA)),
        known.get("data_weights", ()),
        data_dir=known.get("data_dir", "data"),
        seed=known.get("seed", 0),
        stage=stage,
    )
    if record and record["rows"] != rows.id:
        raise ValueError(f"the run in {out} was trained on other rows: give its --data")
    older = {key: init[key] for key in FROM_INIT if init}
    defaults = [rows.step_defaults(known), rows.defaults, older, *own]
    preset = next((s["preset"] for s in (known, *defaults) if s.get("preset")), None)
    seen = {"vae": cls.vae, "size": cls.size} | recipe_of(preset) | older | known | rows.facts
    shift = natural_shift(seen["vae"], seen["size"])
    if init:
        older["shift"] = init["shift"] * shift / natural_shift(init["vae"], init["size"])
    elif seen["vae"] != "pixels":
        defaults.append({"shift": shift})
    settings = settle(
        cls,
        typed | {"data": rows.names},
        saved=saved,
        facts=rows.facts,
        defaults=[*defaults, recipe_of(preset)],
    )
    rows = rows.begin(settings, device)
    # What some runs alone may not change when they are resumed.
    reasons = {}
    if 0 in (settings.muon_lr, saved.get("muon_lr")):
        reasons["muon_lr"] = "Muon and AdamW keep different moments"
    if len(rows.streams) > 1:
        reasons["batch_size"] = "the sizes or folders of --data take turns by whole steps"
    for name, reason in reasons.items():
        now = getattr(settings, name)
        if saved.get(name, now) != now:
            raise ValueError(
                f"{flag(name)} {now} differs from the run to resume, which has {saved[name]}, and"
                f" {reason}: drop it, or start another run with --out"
            )
    return settings, rows


# ------------------------------------------------------------------------------------------------
# The averages of chapter 2's checkpoints, from ZeRO's shards
# ------------------------------------------------------------------------------------------------


# Each rank has written a shard: its part of the flat row of each group of parameters, and where
# each parameter begins in it. To open a run no DeepSpeed is needed: the pieces of a parameter, in
# the order of the ranks, are the parameter.


class _Standin:
    """In place of the DeepSpeed classes that its files mention: weights_only=True refuses unknown
    classes, and with stand-ins none of DeepSpeed's code runs, nor need it be installed."""

    def __init__(self, *args):
        pass


STANDINS = [
    (_Standin, f"deepspeed.{name}")
    for name in (
        "utils.tensor_fragment.fragment_address",
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.zero.config.ZeroStageEnum",
    )
]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. What is half written has another name."""
    return sorted(folder.glob("[0-9]" * 12))


def load_shard(file: Path, checked: bool = True) -> dict:
    """One of DeepSpeed's files; tensors stay on disk until they are looked at. checked: or not,
    where that is done already: all of the file is read for it."""
    with torch.serialization.safe_globals(STANDINS):
        file = intact(file) if checked else file
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def rank_of(file: Path) -> int:
    return int(file.name.partition("zero_pp_rank_")[2].partition("_")[0])


def read_averages(checkpoint: Path, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """name of the average → name of the parameter → the whole fp32 average, in host memory."""
    pieces: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    mark = read_record(checkpoint)["mark"]
    for file in sorted(checkpoint.glob("*zero_pp_rank_*_optim_states.pt"), key=rank_of):
        saved = load_shard(file)["optimizer_state_dict"]
        same_checkpoint(file, saved, mark)
        states = saved["base_optimizer_state"]["state"]  # of each group's row, in any order
        for i, places in enumerate(saved["param_slice_mappings"]):
            state = states[i]
            for name in names:
                if name not in state:
                    raise ValueError(f"{checkpoint} holds no average {name}")
                for parameter, at in places.items():
                    part = state[name][at.start : at.start + at.numel]
                    pieces[name].setdefault(parameter, []).append(part)
    whole = next(checkpoint.glob("mp_rank_*"), None)
    if whole is None:
        raise ValueError(f"{checkpoint} is damaged: it lacks its file mp_rank_*")
    shapes = load_shard(whole)["module"]
    return {
        name: {p: torch.cat(parts).view(shapes[p].shape) for p, parts in found.items()}
        for name, found in pieces.items()
    }


def read_record(checkpoint: Path) -> dict:
    """run.json of a checkpoint. ValueError if it is not ours, or of another checkpoint."""
    record = read_json(checkpoint / RUN_FILE, Record)
    if checkpoint.name.isdecimal() and int(checkpoint.name) != record["samples"]:
        raise ValueError(f"{checkpoint} holds the {RUN_FILE} of {record['samples']} samples")
    if record["mark"] != mark_of(record):
        raise ValueError(f"{checkpoint}/{RUN_FILE} has been changed")
    return record


def mark_of(record: dict) -> str:
    """A checksum of run.json."""
    known = json.dumps({key: value for key, value in record.items() if key != "mark"})
    return f"{zlib.crc32(known.encode()):08x}"


def same_checkpoint(file: Path, saved: dict, mark: str):
    """ValueError unless a shard was written together with its run.json, and by this rank."""
    written = saved["base_optimizer_state"]["param_groups"][0].get("mark")
    if written != f"{mark} {rank_of(file)}":
        raise ValueError(f"{file} is of another checkpoint than the {RUN_FILE} beside it")


def newest(path: Path) -> Path:
    """The newest checkpoint of a run, or `path` itself."""
    return (checkpoints(path / "checkpoints") or [path])[-1]


@dataclass(frozen=True)
class Exported(Checked):
    """What we need of config.json or run.json to draw."""

    model: dict
    facts: Facts


@dataclass(frozen=True)
class Record(Exported):
    """What run.json of a checkpoint of chapter 2 must hold."""

    samples: Natural
    step: Natural
    world_size: Count
    settings: dict
    rows: str
    mark: str  # stands in every shard, too: see train_t2i.Run.save
    widths: list[Annotated[float, rule(least=0.001, most=0.28)]]
    log: list[LogRow]
    evals: list[LogRow]


def read_facts(path: str | Path) -> dict:
    """The facts of a run, a checkpoint, or exported weights. FileNotFoundError if it is none."""
    for file in (Path(path) / "config.json", newest(Path(path)) / RUN_FILE):
        if file.is_file():
            return read_json(file, Exported)["facts"]
    raise FileNotFoundError(f"{path} holds no weights: train it first, or give another run")


def open_checkpoint(path: Path, ema: float | None = None) -> tuple[MMDiT, str]:
    """The network with the averaged weights of a run's newest checkpoint, or of `path` itself."""
    folder = newest(path)
    if not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(f"{path} holds no checkpoint: only its exported weights, no --ema")
    record = read_record(folder)
    width = min(record["widths"]) if ema is None else ema
    low, high = min(record["widths"]), max(record["widths"])
    if not low <= width <= high:
        raise ValueError(
            f"--ema {width} must lie between {low} and {high}, the widths that are kept"
        )
    if width in record["widths"]:
        name = rf.average_name(width)
        average = read_averages(folder, [name])[name]
    else:
        kept = checkpoints(folder.resolve().parent) or [folder]
        average = between(kept, record["widths"], record["step"], width)
    try:
        model = MMDiT(MMDiTConfig(**record["model"]))
        model.load_state_dict(average)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} is damaged: weights and network do not fit") from error
    return model, f"{folder}, average {width},"


def between(kept: list[Path], widths: list[float], step: int, width: float) -> dict[str, Tensor]:
    """An average that was never kept, from those of all checkpoints (EDM2, section 3.2).

    All averages are weighted sums of the same weights over time. So a sum of stored averages whose
    weighting is nearest to the wanted one is nearly the wanted average. ValueError if one is of
    another run: then its log does not begin as the others do.
    """
    records = [read_record(folder) for folder in kept]
    logs = [json.dumps(record["log"])[:-1] for record in records]
    for folder, log in zip(kept, logs, strict=True):
        if not max(logs, key=len).startswith(log):
            raise ValueError(f"{folder} is of another run than those beside it: keep one run there")
    snapshots = [(record["step"], w) for record in records for w in widths]
    shares = iter(rf.posthoc_coefficients(snapshots, step, width))
    total: dict[str, Tensor] = {}
    for folder in kept:
        averages = read_averages(folder, [rf.average_name(w) for w in widths])
        for average in averages.values():
            share = float(next(shares))
            for name, tensor in average.items():
                total[name] = total.get(name, 0) + share * tensor
    return total
