"""AURAFLOW: its released weights in, ours out.

    model = load_auraflow("AuraFlow/transformer")   a folder or file, in either naming, any dtype
    save_diffusers(model, "out/transformer")        opens with AuraFlowTransformer2DModel
    save_pipeline(model, text, image, "out", 1.73)  opens with AuraFlowPipeline

The network is the same as ours with residual="auraflow", eight registers and an MLP rounded to 256;
any other network is refused with the reason. Weights come in two namings: diffusers' and the
original one of fal's first release. KEYS maps ours to diffusers'; the original names are renamed by
diffusers. Weights are written in diffusers' layout only, which ComfyUI reads too.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.settings import read_json
from common.start import line_of
from mmdit import MMDiT, MMDiTConfig

# ------------------------------------------------------------------------------------------------
# The key map
# ------------------------------------------------------------------------------------------------

# Ours, diffusers', and what * stands for: the parts lie above each other in our matrix, because q,
# k and v, and the two inputs of the SwiGLU, are one product here. # is the number of the layer.
KEYS = """
positions                                pos_embed.pos_embed
registers                                register_tokens
patch_embed.weight                       pos_embed.proj.weight
patch_embed.bias                         pos_embed.proj.bias
text_embed.weight                        context_embedder.weight
time_embed.lift.weight                   time_step_proj.linear_1.weight
time_embed.lift.bias                     time_step_proj.linear_1.bias
time_embed.mix.weight                    time_step_proj.linear_2.weight
time_embed.mix.bias                      time_step_proj.linear_2.bias
double_blocks.#.image.modulation.weight  joint_transformer_blocks.#.norm1.linear.weight
double_blocks.#.image.qkv.weight         joint_transformer_blocks.#.attn.to_*.weight        q k v
double_blocks.#.image.out.weight         joint_transformer_blocks.#.attn.to_out.0.weight
double_blocks.#.image.mlp.up.weight      joint_transformer_blocks.#.ff.linear_*.weight      1 2
double_blocks.#.image.mlp.down.weight    joint_transformer_blocks.#.ff.out_projection.weight
double_blocks.#.text.modulation.weight   joint_transformer_blocks.#.norm1_context.linear.weight
double_blocks.#.text.qkv.weight          joint_transformer_blocks.#.attn.add_*_proj.weight  q k v
double_blocks.#.text.out.weight          joint_transformer_blocks.#.attn.to_add_out.weight
double_blocks.#.text.mlp.up.weight       joint_transformer_blocks.#.ff_context.linear_*.weight 1 2
double_blocks.#.text.mlp.down.weight     joint_transformer_blocks.#.ff_context.out_projection.weight
single_blocks.#.stream.modulation.weight single_transformer_blocks.#.norm1.linear.weight
single_blocks.#.stream.qkv.weight        single_transformer_blocks.#.attn.to_*.weight       q k v
single_blocks.#.stream.out.weight        single_transformer_blocks.#.attn.to_out.0.weight
single_blocks.#.stream.mlp.up.weight     single_transformer_blocks.#.ff.linear_*.weight     1 2
single_blocks.#.stream.mlp.down.weight   single_transformer_blocks.#.ff.out_projection.weight
final_modulation.weight                  norm_out.linear.weight
final.weight                             proj_out.weight
"""
TABLE = {line.split()[0]: line.split()[1:] for line in KEYS.strip().splitlines()}


def theirs(name: str) -> list[str]:
    """Our name → diffusers' names of the parts, the uppermost first."""
    layer = "".join(re.findall(r"\.(\d+)\.", name))
    pattern, *parts = TABLE[re.sub(r"\d+", "#", name)]
    return [pattern.replace("#", layer).replace("*", part) for part in parts or [""]]


def reorder(name: str, x: Tensor, outer: int) -> Tensor:
    """The rows of two matrices stand in another order: ours ↔ theirs.

    Last modulation: ours (shift, scale), theirs (scale, shift). Last linear: a row is a value of a
    patch, ours (c, p, q), theirs (p, q, c); outer: how many values the outer index of x takes.
    """
    if name == "final_modulation.weight":
        return x.roll(len(x) // 2, 0)
    if name == "final.weight":
        return x.unflatten(0, (outer, -1)).transpose(0, 1).flatten(0, 1)
    return x


def check(config: MMDiTConfig):
    """ValueError unless AuraFlow's classes can hold this network."""
    mlp_dim = replace(config, mlp_multiple_of=256).mlp_dim
    for holds, reason in (
        (
            config.residual == "auraflow",
            f"residual {config.residual!r} is not AuraFlow's: train with --residual auraflow",
        ),
        (config.predicts == "velocity", f"it predicts the {config.predicts}, must the velocity"),
        (config.n_registers == 8, f"n_registers {config.n_registers} must be 8"),
        (config.n_double_layers < config.n_layers, "the last layers must be single blocks"),
        (
            config.mlp_dim == mlp_dim,
            f"the MLP's hidden width {config.mlp_dim} must be {mlp_dim}, 8/3 dim rounded up to 256",
        ),
    ):
        if not holds:
            raise ValueError(f"not an AuraFlow network: {reason}")


# ------------------------------------------------------------------------------------------------
# In
# ------------------------------------------------------------------------------------------------


def diffusers():
    """The library. ValueError if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("AuraFlow's layouts need diffusers: pip install diffusers") from error
    return diffusers


def stored(path: Path, device: str | torch.device) -> dict:
    """name → tensor of a safetensors file or a folder of them, read when it is sliced: x[:]."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = [f for f in files if ".fp16" not in f.name] or files  # the same weights once more
    if not files:
        raise FileNotFoundError(f"{path} is no .safetensors file and no folder with one")
    try:
        opened = [safe_open(file, "pt", device=str(device)) for file in files]
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    # the names of fal's release begin with "model."
    return {name.removeprefix("model."): f.get_slice(name) for f in opened for name in f.keys()}  # noqa: SIM118


def renamed(tensors: dict) -> dict[str, Tensor]:
    """Tensors under the original names → under diffusers'. KeyError if one is missing.

    This is from_single_file's own converter. from_single_file itself passes over names that it does
    not know, and makes the network first, a second copy. Here unknown names stay, to be refused.
    """
    diffusers()
    from diffusers.loaders.single_file_utils import (
        convert_auraflow_transformer_checkpoint_to_diffusers as convert,
    )

    tensors = {name: x[:] for name, x in tensors.items()}
    found = convert(tensors)
    found |= tensors  # the converter has taken out what it knows
    return {name: x for name, x in found.items() if x is not None}


def load_auraflow(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> MMDiT:
    """AuraFlow's released weights, or an export, as an MMDiT in eval mode.

    path: a safetensors file, a folder of shards, or a pipeline's folder, which has transformer/.
    dtype: of the weights (default: as stored). A config.json beside them says how large patches
    and heads are; without one, they are the release's: 2, and 256 unless head_dim is given.
    In diffusers' naming, tensors are read one after another and no second copy is held.
    Raises FileNotFoundError or ValueError for what is not AuraFlow's.
    """
    path = Path(path)
    path = path / "transformer" if (path / "transformer").is_dir() else path
    tensors = stored(path, device)
    beside = path / "config.json"
    said = read_json(beside) if beside.is_file() else {}
    head_dim = head_dim or said.get("attention_head_dim", 256)
    try:
        if "proj_out.weight" not in tensors:
            tensors = renamed(tensors)
        _, cells, dim = tensors["pos_embed.pos_embed"][:].shape
        _, text_dim = tensors["context_embedder.weight"][:].shape
        values, _ = tensors["proj_out.weight"][:].shape
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold AuraFlow's weights: {error} is missing or misshapen"
        ) from None

    def layers(prefix: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})

    n_double = layers("joint_transformer_blocks.")
    patch = said.get("patch_size", 2 if values % 4 == 0 else 1)
    if type(patch) is not int or patch < 1 or values % patch**2:
        raise ValueError(f"{beside} says patch_size {patch!r}, the weights have {values} values")
    config = MMDiTConfig(
        in_channels=values // patch**2,
        patch_size=patch,
        dim=dim,
        head_dim=head_dim,
        n_layers=n_double + layers("single_transformer_blocks."),
        n_double_layers=n_double,
        text_dim=text_dim,
        max_grid=round(cells**0.5),
        residual="auraflow",
        base_dim=head_dim,
    )
    check(config)
    with torch.device("meta"):
        model = MMDiT(config)
    names = {name: theirs(name) for name, _ in model.named_parameters()}
    wanted = {part for parts in names.values() for part in parts}
    if wanted != tensors.keys():
        raise ValueError(
            f"{path} does not hold this network: missing {sorted(wanted - tensors.keys())[:3]},"
            f" left over {sorted(tensors.keys() - wanted)[:3]}"
        )
    state = {}
    for name, parts in names.items():
        x = torch.cat([tensors[part][:].to(dtype=dtype) for part in parts])
        x = x.squeeze(0) if "." not in name else x  # positions, registers: theirs are (1, n, D)
        state[name] = reorder(name, x, patch**2)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: {line_of(error, -1)}") from error
    # a buffer that is not stored, so it is still without memory
    model.time_embed.index = torch.arange(model.time_embed.N_SINUSOIDS // 2, device=device)
    return model.eval()


def pipeline_folder(name: str) -> Path:
    """A local folder as it is; a hub name's files, downloaded once. ValueError if neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ValueError(
            f"{name} is no folder, and hub names need huggingface_hub: pip install huggingface_hub"
        ) from error
    parts = ["transformer/*", "text_encoder/*", "tokenizer/*", "vae/*"]
    twice = ["*.bin", "*.fp16*"]  # the same weights once more
    try:
        return Path(snapshot_download(name, allow_patterns=parts, ignore_patterns=twice))
    except (OSError, HFValidationError) as error:
        reason = line_of(error)
        raise ValueError(f"{name} is no folder and could not be downloaded: {reason}") from error


# ------------------------------------------------------------------------------------------------
# Out
# ------------------------------------------------------------------------------------------------


def to_diffusers(model: MMDiT):
    """The same network as diffusers' AuraFlowTransformer2DModel, in eval mode.

    It shares the memory of the weights, all but those of `reorder`. ValueError: see check.
    """
    config = model.config
    check(config)
    tensors = {}
    for name, x in model.state_dict().items():
        x = x[None] if "." not in name else x
        parts = theirs(name)
        tensors |= zip(parts, reorder(name, x, config.in_channels).chunk(len(parts)), strict=True)
    with torch.device("meta"):
        network = diffusers().AuraFlowTransformer2DModel(
            sample_size=config.max_grid * config.patch_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            num_mmdit_layers=config.n_double_layers,
            num_single_dit_layers=config.n_layers - config.n_double_layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.n_heads,
            joint_attention_dim=config.text_dim,
            caption_projection_dim=config.dim,
            pos_embed_max_size=config.max_grid**2,
        )
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def save_diffusers(model: MMDiT, folder: str | Path):
    """Write a folder that diffusers.AuraFlowTransformer2DModel.from_pretrained opens."""
    to_diffusers(model).save_pretrained(folder)


def save_pipeline(model: MMDiT, text, image, folder: str | Path, shift: float):
    """Write a whole diffusers.AuraFlowPipeline: network, encoders, and the sampler's time shift.

    text, image: HuggingFaceText and VAE of inputs/encoders.py.
    """
    network = to_diffusers(model)
    scheduler = diffusers().FlowMatchEulerDiscreteScheduler(shift=shift)
    diffusers().AuraFlowPipeline(
        text.tokenizer, text.model, image.model, network, scheduler
    ).save_pretrained(folder)
