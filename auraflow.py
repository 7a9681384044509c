"""AuraFlow's weights in and out: its original key names, diffusers' names, and ours.

    model = load_auraflow("AuraFlow/transformer")      a folder or file, in either naming, any dtype
    save_diffusers(model, "out/transformer")           opens with AuraFlowTransformer2DModel
    save_original(model, "out/aura_flow.safetensors")  the keys of fal's release and of ComfyUI

We keep q, k, v and the two halves of the SwiGLU as one matrix each, and unpack patches as (c, p, q)
where AuraFlow has (p, q, c). Everything else is a change of name. Only models with the auraflow
residual, eight registers and an MLP rounded to 256 are AuraFlow's: others refuse with the reason.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdit import MMDiT, MMDiTConfig

NAMINGS = ("diffusers", "original")

# ------------------------------------------------------------------------------------------------
# The key map: our tensor = join(their tensors); their tensors = split(ours)
# ------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How one of our tensors is made of theirs, and theirs of ours."""

    theirs: tuple[str, ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def same(name: str) -> Rule:
    return Rule((name,), lambda x: x, lambda x: (x,))


def stacked(*names: str) -> Rule:
    """Their matrices above each other."""
    return Rule(names, lambda *parts: torch.cat(parts), lambda x: x.chunk(len(names)))


def batched(name: str) -> Rule:
    """Theirs has a leading axis of 1."""
    return Rule((name,), lambda x: x.squeeze(0), lambda x: (x.unsqueeze(0),))


def swapped(name: str) -> Rule:
    """Theirs has the two halves, shift and scale, the other way round."""

    def swap(x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2)[::-1])

    return Rule((name,), swap, lambda x: (swap(x),))


def patches(name: str, config: MMDiTConfig) -> Rule:
    """Rows of the last linear: theirs (p, q, c), ours (c, p, q)."""
    C, p = config.in_channels, config.patch_size

    def join(x: Tensor) -> Tensor:
        return x.view(p, p, C, -1).permute(2, 0, 1, 3).reshape(C * p * p, -1)

    def split(x: Tensor) -> tuple[Tensor]:
        return (x.view(C, p, p, -1).permute(1, 2, 0, 3).reshape(C * p * p, -1),)

    return Rule((name,), join, split)


class StreamNames(NamedTuple):
    """Their names of one Stream's matrices, without ".weight"; {i} is the layer."""

    prefix: str
    modulation: str
    qkv: tuple[str, str, str]
    out: str
    up: tuple[str, str]  # gate, value
    down: str


STREAMS = {
    "diffusers": {
        "image": StreamNames(
            "joint_transformer_blocks.{i}", "norm1.linear", ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.to_out.0", ("ff.linear_1", "ff.linear_2"), "ff.out_projection",
        ),
        "text": StreamNames(
            "joint_transformer_blocks.{i}", "norm1_context.linear",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.to_add_out",
            ("ff_context.linear_1", "ff_context.linear_2"), "ff_context.out_projection",
        ),
        "stream": StreamNames(
            "single_transformer_blocks.{i}", "norm1.linear",
            ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0",
            ("ff.linear_1", "ff.linear_2"), "ff.out_projection",
        ),
    },
    "original": {
        "image": StreamNames(
            "double_layers.{i}", "modX.1", ("attn.w2q", "attn.w2k", "attn.w2v"), "attn.w2o",
            ("mlpX.c_fc1", "mlpX.c_fc2"), "mlpX.c_proj",
        ),
        "text": StreamNames(
            "double_layers.{i}", "modC.1", ("attn.w1q", "attn.w1k", "attn.w1v"), "attn.w1o",
            ("mlpC.c_fc1", "mlpC.c_fc2"), "mlpC.c_proj",
        ),
        "stream": StreamNames(
            "single_layers.{i}", "modCX.1", ("attn.w1q", "attn.w1k", "attn.w1v"), "attn.w1o",
            ("mlp.c_fc1", "mlp.c_fc2"), "mlp.c_proj",
        ),
    },
}  # fmt: skip

# Outside the blocks: ours → diffusers', the original's, and the kind of rule.
REST = {
    "positions": ("pos_embed.pos_embed", "positional_encoding", batched),
    "registers": ("register_tokens", "register_tokens", batched),
    "patch_embed.weight": ("pos_embed.proj.weight", "init_x_linear.weight", same),
    "patch_embed.bias": ("pos_embed.proj.bias", "init_x_linear.bias", same),
    "text_embed.weight": ("context_embedder.weight", "cond_seq_linear.weight", same),
    "time_embed.lift.weight": ("time_step_proj.linear_1.weight", "t_embedder.mlp.0.weight", same),
    "time_embed.lift.bias": ("time_step_proj.linear_1.bias", "t_embedder.mlp.0.bias", same),
    "time_embed.mix.weight": ("time_step_proj.linear_2.weight", "t_embedder.mlp.2.weight", same),
    "time_embed.mix.bias": ("time_step_proj.linear_2.bias", "t_embedder.mlp.2.bias", same),
}


def rules(config: MMDiTConfig, naming: str) -> dict[str, Rule]:
    """Our name → Rule, for every tensor of the network."""
    found = {}
    for ours, (diffusers, original, kind) in REST.items():
        found[ours] = kind(diffusers if naming == "diffusers" else original)
    n_single = config.n_layers - config.n_double_layers
    for count, group, parts in (
        (config.n_double_layers, "double_blocks", ("image", "text")),
        (n_single, "single_blocks", ("stream",)),
    ):
        for i in range(count):
            for part in parts:
                names, ours = STREAMS[naming][part], f"{group}.{i}.{part}"
                prefix = names.prefix.format(i=i)

                def full(*shorts, prefix=prefix):
                    return [f"{prefix}.{short}.weight" for short in shorts]

                found[f"{ours}.modulation.weight"] = same(*full(names.modulation))
                found[f"{ours}.qkv.weight"] = stacked(*full(*names.qkv))
                found[f"{ours}.out.weight"] = same(*full(names.out))
                found[f"{ours}.mlp.up.weight"] = stacked(*full(*names.up))
                found[f"{ours}.mlp.down.weight"] = same(*full(names.down))
    if naming == "diffusers":
        found["final_modulation.weight"] = swapped("norm_out.linear.weight")
        found["final.weight"] = patches("proj_out.weight", config)
    else:
        found["final_modulation.weight"] = same("modF.1.weight")
        found["final.weight"] = patches("final_linear.weight", config)
    return found


# ------------------------------------------------------------------------------------------------
# Configuration
# ------------------------------------------------------------------------------------------------


def check(config: MMDiTConfig):
    """ValueError unless AuraFlow's classes can hold this network."""
    for holds, reason in (
        (config.residual == "auraflow",
         f"residual {config.residual!r} is not AuraFlow's: train with --residual auraflow"),
        (config.n_registers == 8, f"n_registers {config.n_registers} must be 8"),
        (config.n_double_layers < config.n_layers, "the last layers must be single blocks"),
        (config.mlp_dim == -(-int(8 * config.dim / 3) // 256) * 256,
         f"the MLP's hidden width {config.mlp_dim} must be 8/3 dim rounded up to 256:"
         f" mlp_multiple_of is {config.mlp_multiple_of}"),
    ):  # fmt: skip
        if not holds:
            raise ValueError(f"not an AuraFlow network: {reason}")


def to_diffusers_config(config: MMDiTConfig) -> dict:
    """Keyword arguments of diffusers.AuraFlowTransformer2DModel. ValueError: see check."""
    check(config)
    return {
        "sample_size": config.max_grid * config.patch_size, "patch_size": config.patch_size,
        "in_channels": config.in_channels, "out_channels": config.in_channels,
        "num_mmdit_layers": config.n_double_layers,
        "num_single_dit_layers": config.n_layers - config.n_double_layers,
        "attention_head_dim": config.head_dim, "num_attention_heads": config.n_heads,
        "joint_attention_dim": config.text_dim, "caption_projection_dim": config.dim,
        "pos_embed_max_size": config.max_grid**2,
    }  # fmt: skip


def config_of(shapes: Mapping[str, tuple[int, ...]], naming: str, head_dim: int) -> MMDiTConfig:
    """The network that tensors of these names and shapes belong to; head_dim shows in none."""
    rest = {ours: names[NAMINGS.index(naming)] for ours, names in REST.items()}
    layers = {}
    for part, names in STREAMS[naming].items():
        pattern = re.compile(re.escape(names.prefix).replace(r"\{i\}", r"(\d+)") + r"\.")
        layers[part] = len({m.group(1) for name in shapes if (m := pattern.match(name))})
    final = "proj_out.weight" if naming == "diffusers" else "final_linear.weight"
    try:
        _, grid_squared, dim = shapes[rest["positions"]]
        values, text_dim = shapes[final][0], shapes[rest["text_embed.weight"]][1]
        registers = shapes[rest["registers"]][1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"not AuraFlow's weights: {error} is missing or misshapen") from None
    patch = 2 if values % 4 == 0 else 1
    return MMDiTConfig(
        in_channels=values // patch**2, patch_size=patch, dim=dim, head_dim=head_dim,
        n_layers=layers["image"] + layers["stream"], n_double_layers=layers["image"],
        text_dim=text_dim, max_grid=round(grid_squared**0.5), n_registers=registers,
        mlp_multiple_of=256, residual="auraflow", base_dim=head_dim,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# State dicts
# ------------------------------------------------------------------------------------------------


def to_theirs(tensors: Mapping[str, Tensor], config: MMDiTConfig, naming: str) -> dict[str, Tensor]:
    """Our tensors under AuraFlow's names ("diffusers" or "original"). ValueError: see check."""
    check(config)
    found = {}
    for ours, rule in rules(config, naming).items():
        found |= zip(rule.theirs, rule.split(tensors[ours]), strict=True)
    return found


def from_theirs(
    read: Callable[[str], Tensor], names: set[str], config: MMDiTConfig, naming: str
) -> dict[str, Tensor]:
    """Our tensors, made one by one of theirs: read(name) is called once for each of `names`.

    Strict: ValueError if a name is missing, left over, or of another shape than the config's.
    """
    table = rules(config, naming)
    wanted = {name for rule in table.values() for name in rule.theirs}
    if wanted != names:
        raise ValueError(
            f"these are not the weights of this network: missing {sorted(wanted - names)[:3]},"
            f" left over {sorted(names - wanted)[:3]}"
        )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MMDiT(config).named_parameters()}
    found = {}
    for ours, rule in table.items():
        found[ours] = rule.join(*(read(name) for name in rule.theirs))
        if found[ours].shape != shapes[ours]:
            raise ValueError(
                f"{rule.theirs[0]} gives {ours} the shape {tuple(found[ours].shape)}, must be"
                f" {tuple(shapes[ours])}"
            )
    return found


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


class Shards:
    """Tensors by name in one safetensors file or a folder of them, mapped and not yet read."""

    def __init__(self, path: Path, device: str | torch.device, dtype: torch.dtype | None):
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        variants = [file for file in files if ".fp16" in file.name]  # the same weights once more
        files = [file for file in files if file not in variants] or variants
        if not files:
            raise FileNotFoundError(f"{path} is no .safetensors file and no folder with one")
        self.dtype = dtype
        try:
            opened = [safe_open(file, "pt", device=str(device)) for file in files]
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        prefix = "model." if all(name.startswith("model.") for name in where) else ""
        self.where = {name.removeprefix(prefix): (name, file) for name, file in where.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            short: tuple(file.get_slice(name).get_shape())
            for short, (name, file) in self.where.items()
        }

    def read(self, short: str) -> Tensor:
        name, file = self.where[short]
        tensor = file.get_tensor(name)
        return tensor if self.dtype is None else tensor.to(self.dtype)


def load_auraflow(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> MMDiT:
    """AuraFlow's released weights, or an export, as an MMDiT in eval mode.

    path: a safetensors file, a folder of shards, or a pipeline's folder, which has transformer/.
    dtype: of the weights (default: as stored). head_dim: 256 unless a config.json tells. Tensors
    are read one after the other, so that no second copy of the weights is ever held.
    Raises FileNotFoundError or ValueError for what is not AuraFlow's.
    """
    path = Path(path)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    shards = Shards(path, device, dtype)
    naming = "diffusers" if "proj_out.weight" in shards.where else "original"
    if head_dim is None and (path / "config.json").is_file():
        head_dim = json.loads((path / "config.json").read_text()).get("attention_head_dim")
    config = config_of(shards.shapes(), naming, head_dim or 256)
    tensors = from_theirs(shards.read, set(shards.where), config, naming)
    with torch.device("meta"):
        model = MMDiT(config)
    model.load_state_dict(tensors, assign=True)
    index = torch.arange(model.time_embed.N_SINUSOIDS // 2, device=device)
    model.time_embed.register_buffer("index", index, persistent=False)  # was meta, is not stored
    return model.eval()


def save_diffusers(model: MMDiT, folder: str | Path):
    """Write a folder that diffusers.AuraFlowTransformer2DModel.from_pretrained opens."""
    folder = Path(folder)
    config = to_diffusers_config(model.config)
    tensors = to_theirs(model.state_dict(), model.config, "diffusers")
    folder.mkdir(parents=True, exist_ok=True)
    _write(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AuraFlowTransformer2DModel", **config}
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, folder / "config.json")


def save_original(model: MMDiT, path: str | Path):
    """Write one safetensors file in the original keys, which ComfyUI reads at its width of 3072."""
    path = Path(path)
    tensors = to_theirs(model.state_dict(), model.config, "original")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(tensors, path)


def _write(tensors: dict[str, Tensor], path: Path):
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def save_pipeline(model: MMDiT, text, image, folder: str | Path, shift: float):
    """Write a whole diffusers.AuraFlowPipeline: network, encoders, and the sampler's time shift.

    text, image: data_t2i's HuggingFaceText and VAE.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    save_diffusers(model, folder / "transformer")
    text.model.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    image.model.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "AuraFlowPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", type(text.model).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def pipeline_folder(name: str) -> Path:
    """A local folder as it is; a hub name's files, downloaded once. ValueError if neither."""
    if Path(name).is_dir():
        return Path(name)
    parts = ["transformer/*", "text_encoder/*", "tokenizer/*", "vae/*"]
    twice = ["*.bin", "*.fp16*"]  # the same weights once more
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        return Path(snapshot_download(name, allow_patterns=parts, ignore_patterns=twice))
    except ImportError as error:
        raise ValueError(
            f"{name} is no folder, and hub names need huggingface_hub: pip install huggingface_hub"
        ) from error
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no folder and could not be downloaded: {reason}") from error
