"""auraflow.py against diffusers' own class: weights and outputs, both ways, and what is refused."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
from helpers import close
from safetensors.torch import save_file
from test_encoders import tiny_t5, tiny_vae

import rf
from common.auraflow import (
    load_auraflow,
    pipeline_folder,
    save_diffusers,
    save_pipeline,
    to_diffusers,
)
from inputs.encoders import VAE, HuggingFaceText
from mmdit import MMDiT, MMDiTConfig

SMALL = MMDiTConfig(
    dim=64,
    head_dim=32,
    n_layers=3,
    n_double_layers=1,
    text_dim=24,
    max_grid=6,
    base_dim=32,
    residual="auraflow",
)
CONFIGS = [
    SMALL,
    replace(SMALL, dim=96, n_double_layers=2),
    replace(SMALL, n_layers=2, n_double_layers=0),
    replace(SMALL, in_channels=16, max_grid=8, head_dim=16, base_dim=16),
    replace(SMALL, in_channels=3, patch_size=1, max_grid=12),
]


@torch.no_grad()
def ours(config, gain=0.5):
    """No weight is zero, so that every one of them shows in the output."""
    torch.manual_seed(0)
    model = MMDiT(config)
    for p in model.parameters():
        p.normal_(std=gain * p.shape[-1] ** -0.5)
    return model.eval()


def assert_same(model, other):
    assert model.config == other.config
    torch.testing.assert_close(model.state_dict(), other.state_dict(), atol=0, rtol=0)


# --- diffusers' layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 12), (8, 8), (8, 12), (10, 6)])
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_equal_diffusers_and_what_is_written_is_read(tmp_path, config, size):
    """Their gradients are written like weights, and read as ours."""
    model = ours(config)
    to_diffusers(model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load_auraflow(tmp_path), model)
    theirs = AuraFlowTransformer2DModel.from_pretrained(tmp_path)
    x, t = torch.randn(2, config.in_channels, *size), torch.tensor([0.15, 0.999])
    text = torch.randn(2, 7, config.text_dim)
    expected = theirs(x, text, timestep=t, return_dict=False)[0]
    assert expected.std() > 0.05
    close(model(x, t, text), expected, atol=1e-4 * expected.std().item())
    for velocity in (model(x, t, text), expected):
        velocity.square().mean().backward()
    for p in theirs.parameters():
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "gradients")
    read = load_auraflow(tmp_path / "gradients").state_dict()
    for key, p in model.named_parameters():
        assert read[key].any(), key
        close(p.grad, read[key], atol=1e-4 * read[key].abs().max().item())


def test_a_pipelines_folder_is_read_in_any_dtype(tmp_path):
    model, folder = ours(SMALL), tmp_path / "transformer"
    save_diffusers(model, folder)
    variant = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"proj_out.weight": torch.zeros(1)}, variant)  # the release has such a second copy
    assert_same(load_auraflow(tmp_path, dtype=torch.bfloat16), model.bfloat16())


def test_the_released_size():
    """Has the names and shapes of diffusers' defaults."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(residual="auraflow"))
        reference = AuraFlowTransformer2DModel(pos_embed_max_size=4096)
    found, expected = to_diffusers(model).state_dict(), reference.state_dict()
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in expected.items()}


# --- the original keys ---------------------------------------------------------------------------

# diffusers → original, as patterns; two halves of the last modulation are exchanged besides.
ORIGINAL = {
    r"pos_embed\.pos_embed": "positional_encoding",
    r"pos_embed\.proj": "init_x_linear",
    r"context_embedder": "cond_seq_linear",
    r"time_step_proj\.linear_1": "t_embedder.mlp.0",
    r"time_step_proj\.linear_2": "t_embedder.mlp.2",
    r"norm_out\.linear": "modF.1",
    r"proj_out": "final_linear",
    r"joint_transformer_blocks\.(\d+)\.attn\.to_(q|k|v|o)(ut\.0)?": r"double_layers.\1.attn.w2\2",
    r"joint_transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj": r"double_layers.\1.attn.w1\2",
    r"joint_transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_layers.\1.attn.w1o",
    r"joint_transformer_blocks\.(\d+)\.ff_context\.": r"double_layers.\1.mlpC.",
    r"joint_transformer_blocks\.(\d+)\.ff\.": r"double_layers.\1.mlpX.",
    r"joint_transformer_blocks\.(\d+)\.norm1_context\.linear": r"double_layers.\1.modC.1",
    r"joint_transformer_blocks\.(\d+)\.norm1\.linear": r"double_layers.\1.modX.1",
    r"single_transformer_blocks\.(\d+)\.attn\.to_(q|k|v|o)(ut\.0)?": r"single_layers.\1.attn.w1\2",
    r"single_transformer_blocks\.(\d+)\.ff\.": r"single_layers.\1.mlp.",
    r"single_transformer_blocks\.(\d+)\.norm1\.linear": r"single_layers.\1.modCX.1",
    r"\.linear_(\d)\.": r".c_fc\1.",
    r"out_projection": "c_proj",
}


def written(model):
    """The weights under diffusers' names, apart from each other in memory."""
    return {name: x.clone() for name, x in to_diffusers(model).state_dict().items()}


def original(model):
    """The weights under fal's names."""
    found = {}
    for name, x in written(model).items():
        x = torch.cat(x.chunk(2)[::-1]) if name == "norm_out.linear.weight" else x
        for pattern, replacement in ORIGINAL.items():
            name = re.sub(pattern, replacement, name)
        found[name] = x
    return found


@pytest.mark.parametrize("config", CONFIGS)
def test_original_keys_are_read(tmp_path, config):
    """With the release's prefix."""
    model, file = ours(config), tmp_path / "aura.safetensors"
    save_file({f"model.{key}": x for key, x in original(model).items()}, file)
    assert_same(load_auraflow(file, head_dim=config.head_dim), model)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"n_registers": 4}, "n_registers 4 must be 8"),
        ({"n_layers": 1}, "the last layers must be single"),
        ({"mlp_multiple_of": 32}, "the MLP's hidden width 192 must be 256"),
    ],
)
def test_other_networks_are_not_written(tmp_path, change, reason):
    with pytest.raises(ValueError, match=f"^not an AuraFlow network: {reason}.*$"):
        save_diffusers(MMDiT(replace(SMALL, **change)), tmp_path)
    assert not list(tmp_path.iterdir())


KEY = "single_transformer_blocks.0.attn.to_k.weight"


@pytest.mark.parametrize(
    "naming, change, reason",
    [
        (written, {"proj_out.weight": torch.zeros(16)}, "is missing or misshapen"),
        (written, {KEY: None}, rf"missing \['{KEY}'\], left over \[\]"),
        (written, {"more": torch.zeros(2)}, r"missing \[\], left over \['more'\]"),
        (written, {KEY: torch.zeros(32, 64)}, "size mismatch for single_blocks.0.stream.qkv"),
        (original, {"init_x_linear.bias": None}, "'init_x_linear.bias' is missing"),
        (original, {"modF.1.weight": None}, r"missing \['norm_out.linear.weight'\]"),
        (original, {"extra": torch.zeros(2)}, r"left over \['extra'\]"),
    ],
)
def test_other_weights_are_not_read(tmp_path, naming, change, reason):
    state = naming(ours(SMALL)) | change
    save_file({key: x for key, x in state.items() if x is not None}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path}.*{reason}.*$"):
        load_auraflow(tmp_path, head_dim=32)


def test_other_files_are_not_read(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file and no folder with one"):
        load_auraflow(tmp_path)
    with pytest.raises(ValueError, match="is no folder and could not be downloaded"):
        pipeline_folder(str(file))
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_auraflow(tmp_path)
    save_file(original(ours(SMALL)), file)
    with pytest.raises(ValueError, match="head_dim = 256 must divide dim=64"):
        load_auraflow(tmp_path)
    for command, library in (
        (lambda: pipeline_folder("fal/AuraFlow"), "huggingface_hub"),
        (lambda: load_auraflow(tmp_path), "diffusers"),
        (lambda: save_diffusers(ours(SMALL), tmp_path), "diffusers"),
    ):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ValueError, match=f"pip install {library}"):
            command()


# --- a whole pipeline ----------------------------------------------------------------------------


def test_a_pipeline_draws_the_same_in_diffusers(tmp_path):
    """With a text encoder and a VAE, both tiny and real, on latents of 8 x 8."""
    text = HuggingFaceText(tiny_t5(tmp_path / "text"), 256)
    image = VAE(tiny_vae(tmp_path / "vae"))
    config = replace(SMALL, in_channels=image.channels, text_dim=text.dim, max_grid=4)
    model = ours(config, gain=1.5)
    save_pipeline(model, text, image, tmp_path / "pipe", shift=1.73)
    pipe = AuraFlowPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    captions = ["red " * 200, "a ring " * 100]  # long: a few words among 256 hardly show
    noise = torch.randn(1, image.channels, 8, 8).repeat(2, 1, 1, 1)
    options = {"null_text": text([""]), "cfg": 3.0, "steps": 8, "shift": 1.73}
    drawn = image.decode(rf.sample(model, noise, text(captions), **options)).float()
    assert (drawn[0] - drawn[1]).abs().max() > 2  # the prompt matters
    sigmas = [1 - i / 8 for i in range(8)]
    theirs = pipe(captions, latents=noise, guidance_scale=3.0, sigmas=sigmas, output_type="np")
    assert abs(theirs.images.transpose(0, 3, 1, 2) * 255 - drawn.numpy()).max() <= 2
    assert_same(load_auraflow(pipeline_folder(str(tmp_path / "pipe"))), model)
