"""auraflow.py against diffusers' own class: weights and outputs, both ways, and what is refused."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
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
CONFIGS = {
    "1 double, 2 single": SMALL,
    "2 and 1, wider": replace(SMALL, dim=96, n_double_layers=2),
    "0 and 2": replace(SMALL, n_layers=2, n_double_layers=0),
    "more channels, larger grid": replace(
        SMALL, in_channels=16, max_grid=8, head_dim=16, base_dim=16
    ),
    "patches of one": replace(SMALL, in_channels=3, patch_size=1, max_grid=12),
}


@torch.no_grad()
def randomise(network, seed=0, gain=0.5):
    """No weight is zero, so that every one of them shows in the output."""
    torch.manual_seed(seed)
    for p in network.parameters():
        p.normal_(std=gain * p.shape[-1] ** -0.5)
    return network.eval()


def ours(config, **options):
    return randomise(MMDiT(config), **options)


def batch(config, height, width):
    """x, t, text."""
    torch.manual_seed(1)
    x, t = torch.randn(2, config.in_channels, height, width), torch.tensor([0.15, 0.999])
    return x, t, torch.randn(2, 7, config.text_dim)


def call(reference, x, t, text):
    return reference(x, text, timestep=t, return_dict=False)[0]


@torch.no_grad()
def difference(model, reference, height=8, width=8):
    """Largest difference of the two velocities, in standard deviations."""
    inputs = batch(model.config, height, width)
    expected = call(reference, *inputs)
    assert expected.std() > 0.05
    return (model(*inputs) - expected).abs().max() / expected.std()


def assert_same(model, other):
    assert model.config == other.config
    for (name, a), (other_name, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(a, b), name


# --- diffusers' layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 12), (8, 8), (8, 12), (10, 6)])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_diffusers_both_ways(tmp_path, name, size):
    model = ours(CONFIGS[name])
    save_diffusers(model, tmp_path / "model")
    opened = AuraFlowTransformer2DModel.from_pretrained(tmp_path / "model")
    assert difference(model, opened, *size) < 1e-4
    reference = randomise(opened, seed=1)
    reference.save_pretrained(tmp_path / "theirs")
    assert difference(load_auraflow(tmp_path / "theirs"), reference, *size) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_identity(tmp_path, name):
    model = ours(CONFIGS[name])
    save_diffusers(model, tmp_path)
    assert_same(load_auraflow(tmp_path), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(tmp_path, name):
    """Through the loss that trains. Theirs are written like weights, and read as ours."""
    config = CONFIGS[name]
    model = ours(config)
    reference = to_diffusers(model)
    data, _, text = batch(config, 8, 12)
    for network in (model, lambda *inputs: call(reference, *inputs)):
        t, noise = torch.tensor([0.1, 0.9]), torch.ones_like(data)
        rf.rf_loss(network, data, text, t=t, noise=noise).mean().backward()
    for p in reference.parameters():
        p.data = p.grad
    reference.save_pretrained(tmp_path)
    expected = load_auraflow(tmp_path).state_dict()
    for key, p in model.named_parameters():
        scale = expected[key].abs().max()
        assert scale > 0, key
        assert (p.grad - expected[key]).abs().max() < 1e-4 * scale + 1e-7, key


def test_shards_and_dtype(tmp_path):
    reference = to_diffusers(ours(SMALL))
    folder = tmp_path / "pipe" / "transformer"
    reference.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    variant = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"proj_out.weight": torch.zeros(1)}, variant)  # the release has such a second copy
    model = load_auraflow(tmp_path / "pipe", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = load_auraflow(tmp_path / "pipe")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert difference(full, reference) < 1e-4


def test_the_released_size():
    """6,842,876,928 parameters under the names and shapes of diffusers' defaults."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(residual="auraflow"))
        reference = AuraFlowTransformer2DModel(pos_embed_max_size=4096)
    assert model.n_parameters() == 6_842_876_928
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


def original(model):
    """The weights under fal's names."""
    found = {}
    for name, x in to_diffusers(model).state_dict().items():
        x = torch.cat(x.chunk(2)[::-1]) if name == "norm_out.linear.weight" else x
        for pattern, replacement in ORIGINAL.items():
            name = re.sub(pattern, replacement, name)
        found[name] = x.clone()
    return found


@pytest.mark.parametrize("prefix", ["", "model."])  # the release has the second
@pytest.mark.parametrize("name", ["1 double, 2 single", "2 and 1, wider", "0 and 2"])
def test_original_keys_are_read(tmp_path, name, prefix):
    model = ours(CONFIGS[name])
    state, D = original(model), model.config.dim
    assert not [key for key in state if "transformer_blocks" in key or "ff" in key]
    if model.double_blocks:
        block, layer = model.double_blocks[0], "double_layers.0.attn"
        assert torch.equal(state[f"{layer}.w2q.weight"], block.image.qkv.weight[:D])
        assert torch.equal(state[f"{layer}.w1v.weight"], block.text.qkv.weight[2 * D :])
    assert torch.equal(state["modF.1.weight"], model.final_modulation.weight)
    save_file({prefix + key: x for key, x in state.items()}, tmp_path / "aura.safetensors")
    assert_same(load_auraflow(tmp_path / "aura.safetensors", head_dim=32), model)
    half = load_auraflow(tmp_path, dtype=torch.bfloat16, head_dim=32)
    assert torch.equal(half.final.weight, model.final.weight.bfloat16())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"residual": "prenorm"}, "residual 'prenorm' is not AuraFlow's: train with --residual"),
        ({"n_registers": 4}, "n_registers 4 must be 8"),
        ({"n_layers": 1}, "the last layers must be single"),
        ({"mlp_multiple_of": 32}, "hidden width 192 must be 256"),
    ],
)
def test_other_networks_are_not_written(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        save_diffusers(MMDiT(replace(SMALL, **change)), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


KEY = "single_transformer_blocks.0.attn.to_k.weight"


@pytest.mark.parametrize(
    "naming, change, reason",
    [
        (None, {}, "'positional_encoding' is missing or misshapen"),
        (None, {"proj_out.weight": torch.zeros(2)}, "'pos_embed.pos_embed' is missing"),
        ("diffusers", {"proj_out.weight": torch.zeros(16)}, "is missing or misshapen"),
        ("diffusers", {KEY: None}, rf"missing \['{KEY}'\], left over \[\]"),
        ("diffusers", {"more": torch.zeros(2)}, r"missing \[\], left over \['more'\]"),
        ("diffusers", {KEY: torch.zeros(32, 64)}, "size mismatch for single_blocks.0.stream.qkv"),
        ("diffusers", {"register_tokens": torch.zeros(1, 4, 64)}, "size mismatch for registers"),
        ("original", {"init_x_linear.bias": None}, "'init_x_linear.bias' is missing"),
        ("original", {"modF.1.weight": None}, r"missing \['norm_out.linear.weight'\]"),
        ("original", {"final_linear.weight": None}, "'proj_out.weight' is missing"),
        ("original", {"extra": torch.zeros(2)}, r"left over \['extra'\]"),
    ],
)
def test_other_weights_are_not_read(tmp_path, naming, change, reason):
    model = ours(SMALL)
    state = to_diffusers(model).state_dict() if naming == "diffusers" else {}
    state = original(model) if naming == "original" else state
    state = {key: x.clone() for key, x in (state | change).items() if x is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=reason) as caught:
        load_auraflow(tmp_path, head_dim=32)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_other_files_are_not_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file and no folder with one"):
        load_auraflow(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_auraflow(tmp_path)
    save_file(original(ours(SMALL)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="head_dim = 256 must divide dim=64"):
        load_auraflow(tmp_path)
    assert pipeline_folder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="is no folder and could not be downloaded"):
        pipeline_folder(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        pipeline_folder("fal/AuraFlow")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for command in (lambda: load_auraflow(tmp_path), lambda: save_diffusers(ours(SMALL), tmp_path)):
        with pytest.raises(ValueError, match="need diffusers: pip install diffusers"):
            command()


# --- a whole pipeline ----------------------------------------------------------------------------


def test_a_pipeline_draws_the_same_in_diffusers(tmp_path):
    """With a text encoder and a VAE, both tiny and real, on latents of 8 x 8."""
    text = HuggingFaceText(tiny_t5(tmp_path / "text"), 256)
    image = VAE(tiny_vae(tmp_path / "vae"))
    config = replace(SMALL, in_channels=image.channels, text_dim=text.dim, max_grid=4)
    model = ours(config, gain=1.5)
    save_pipeline(model, text, image, tmp_path / "pipe", shift=1.73)
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["scheduler"]
    pipe = AuraFlowPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    captions = ["red " * 200, "a ring " * 100]  # long: a few words among 256 hardly show
    noise = torch.randn(2, image.channels, 8, 8)

    def draw(captions):
        options = {"null_text": text([""]), "cfg": 3.0, "steps": 8, "shift": 1.73}
        return image.decode(rf.sample(model, noise, text(captions), **options)).float()

    side = 8 * image.factor
    pictures = pipe(
        captions,
        latents=noise,
        guidance_scale=3.0,
        num_inference_steps=8,
        sigmas=[1 - i / 8 for i in range(8)],
        output_type="np",
        height=side,
        width=side,
    ).images
    drawn = draw(captions)
    assert drawn.std() > 5  # there is something to compare
    assert (torch.tensor(pictures).permute(0, 3, 1, 2) * 255 - drawn).abs().max() <= 2
    assert (draw(captions[::-1]) - drawn).abs().max() > 2  # and the prompt matters to it
    assert_same(load_auraflow(pipeline_folder(str(tmp_path / "pipe"))), model)
