"""auraflow.py against diffusers' own class: weights and outputs, both ways, and what is refused."""

import os
import re
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from test_encoders import tiny_t5, tiny_vae

import auraflow
import rf
import sample_t2i
from encoders import VAE, HuggingFaceText, Pixels
from mmdit import MMDiT, MMDiTConfig, save_model

SMALL = MMDiTConfig(
    dim=64, head_dim=32, n_layers=3, n_double_layers=1, text_dim=24, max_grid=6, base_dim=32,
    residual="auraflow",
)  # fmt: skip
CONFIGS = {
    "1 double, 2 single": SMALL,
    "2 and 1, wider": replace(SMALL, dim=96, n_double_layers=2),
    "0 and 2": replace(SMALL, n_layers=2, n_double_layers=0),
    "more channels, larger grid": replace(SMALL, in_channels=16, max_grid=8, head_dim=16),
}


def ours(config, seed=0, gain=0.5):
    """A model in which no weight is zero, so that every one of them shows in the output."""
    torch.manual_seed(seed)
    model = MMDiT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=gain * p.shape[-1] ** -0.5)
    return model.eval()


def theirs(config, seed=0):
    torch.manual_seed(seed)
    model = AuraFlowTransformer2DModel(**auraflow.to_diffusers_config(config))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 * p.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def difference(model, reference, H, W):
    config = model.config
    x, t = torch.randn(2, config.in_channels, H, W), torch.tensor([0.15, 0.999])
    text = torch.randn(2, 7, config.text_dim)
    expected = reference(
        hidden_states=x, encoder_hidden_states=text, timestep=t, return_dict=False
    )[0]
    assert expected.std() > 0.05
    return (model(x, t, text) - expected).abs().max() / expected.std()


@pytest.mark.parametrize("size", [(12, 12), (8, 8), (8, 12), (10, 6)])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_diffusers_both_ways(tmp_path, name, size):
    config = CONFIGS[name]
    reference = theirs(config)
    reference.save_pretrained(tmp_path / "theirs")
    model = auraflow.load_auraflow(tmp_path / "theirs")
    assert replace(model.config, base_dim=config.base_dim) == config
    assert difference(model, reference, *size) < 1e-4
    mine = ours(config)
    auraflow.save_diffusers(mine, tmp_path / "mine")
    opened = AuraFlowTransformer2DModel.from_pretrained(tmp_path / "mine")
    assert difference(mine, opened, *size) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(tmp_path, name):
    """Through the loss that trains: every weight's gradient, theirs renamed into ours."""
    config = CONFIGS[name]
    mine, reference = ours(config), theirs(config)
    state = auraflow.to_theirs(mine.state_dict(), config, "diffusers")
    reference.load_state_dict(state)
    data, noise = torch.randn(2, 3, config.in_channels, 8, 12)
    t, text = torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 7, config.text_dim)

    def call(x, t, text):
        return reference(x, text, timestep=t, return_dict=False)[0]

    for network in (mine, call):
        rf.rf_loss(network, data, text, t=t, noise=noise).mean().backward()
    found = {key: p.grad for key, p in reference.named_parameters()}
    missing = {key for key, grad in found.items() if grad is None}
    assert all("add_q_proj" in key or "context" in key or "to_add_out" in key for key in missing)
    found = {k: torch.zeros_like(reference.get_parameter(k)) if k in missing else g
             for k, g in found.items()}  # fmt: skip
    found |= {key: torch.zeros_like(v) for key, v in state.items() if key not in found}
    expected = auraflow.from_theirs(found.__getitem__, set(found), config, "diffusers")
    for key, p in mine.named_parameters():
        scale = expected[key].abs().max() + 1e-6
        assert (p.grad - expected[key]).abs().max() < 1e-4 * scale + 1e-7, key


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("naming", auraflow.NAMINGS)
def test_there_and_back(name, naming):
    config = CONFIGS[name]
    state = ours(config).state_dict()
    there = auraflow.to_theirs(state, config, naming)
    back = auraflow.from_theirs(there.__getitem__, set(there), config, naming)
    assert back.keys() == state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def test_original_keys_hold_the_same_network(tmp_path):
    """The original naming differs from diffusers' in names and in the order of two halves."""
    model = ours(SMALL)
    auraflow.save_original(model, tmp_path / "aura.safetensors")
    state = load_file(tmp_path / "aura.safetensors")
    D = SMALL.dim
    assert state["double_layers.0.attn.w2q.weight"].equal(
        model.double_blocks[0].image.qkv.weight[:D]
    )
    assert state["double_layers.0.attn.w1v.weight"].equal(
        model.double_blocks[0].text.qkv.weight[2 * D :]
    )
    assert state["modF.1.weight"].equal(model.final_modulation.weight)
    again = auraflow.load_auraflow(tmp_path / "aura.safetensors", head_dim=32)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([0.3]), torch.randn(1, 5, 24)
    with torch.no_grad():
        assert torch.equal(model(x, t, text), again(x, t, text))
    # the released file has a prefix
    save_file({f"model.{k}": v for k, v in state.items()}, tmp_path / "prefixed.safetensors")
    prefixed = auraflow.load_auraflow(tmp_path / "prefixed.safetensors", head_dim=32)
    assert prefixed.final.weight.equal(model.final.weight)


def test_shards_and_dtype(tmp_path):
    reference = theirs(SMALL)
    reference.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 2
    variant = tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"proj_out.weight": torch.zeros(1)}, variant)  # the release has such a second copy
    model = auraflow.load_auraflow(tmp_path / "pipe", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = auraflow.load_auraflow(tmp_path / "pipe")
    assert difference(full, reference, 8, 8) < 1e-4


def test_the_released_size():
    """6,842,876,928 parameters under diffusers' very names and shapes."""
    config = MMDiTConfig(residual="auraflow")
    with torch.device("meta"):
        model = MMDiT(config)
        reference = AuraFlowTransformer2DModel(pos_embed_max_size=4096)
    assert model.n_parameters() == 6_842_876_928
    mine = auraflow.to_theirs(model.state_dict(), config, "diffusers")
    expected = {name: tuple(p.shape) for name, p in reference.state_dict().items()}
    assert {name: tuple(p.shape) for name, p in mine.items()} == expected
    found = auraflow.config_of(expected, "diffusers", 256)
    assert replace(found, base_dim=config.base_dim) == config


def test_what_is_refused(tmp_path):
    for change, reason in (
        ({"residual": "prenorm"}, "residual 'prenorm' is not AuraFlow's"),
        ({"n_registers": 4}, "n_registers 4 must be 8"),
        ({"n_layers": 1}, "last layers must be single"),
        ({"mlp_multiple_of": 32}, "mlp_multiple_of is 32"),
    ):
        model = MMDiT(replace(SMALL, **change))
        with pytest.raises(ValueError, match=reason):
            auraflow.save_diffusers(model, tmp_path / "out")
        with pytest.raises(ValueError, match=reason):
            auraflow.save_original(model, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        auraflow.load_auraflow(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not AuraFlow's weights"):
        auraflow.load_auraflow(tmp_path)
    state = auraflow.to_theirs(ours(SMALL).state_dict(), SMALL, "diffusers")
    del state["single_transformer_blocks.0.attn.to_k.weight"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"missing \['single_transformer_blocks.0.attn.to_k"):
        auraflow.load_auraflow(tmp_path, head_dim=32)
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        auraflow.load_auraflow(tmp_path)


# --- whole pipelines -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run's weights with a text encoder and a VAE, both tiny and real, in latents of 8 x 8."""
    text, vae = tiny_t5(tmp_path / "text"), tiny_vae(tmp_path / "vae")
    encoder, image = HuggingFaceText(text, 256), VAE(vae)
    config = replace(SMALL, in_channels=image.channels, text_dim=encoder.dim, max_grid=4)
    settings = {
        "text_encoder": text, "text_tokens": 256, "vae": vae, "size": 8 * image.factor, "shapes": 4,
        "colors": 6, "places": 8, "cfg": 3.0, "shift": 1.73,
    }  # fmt: skip
    save_model(tmp_path / "run", ours(config, gain=1.5), run=settings)
    return tmp_path / "run"


PROMPT, OTHER = "red " * 200, "a ring " * 100  # long: a few words among 256 hardly show


def test_an_export_is_a_pipeline_that_draws_the_same(run, tmp_path):
    sample_t2i.main([str(run), "--export", "diffusers", str(tmp_path / "pipe")])
    pipe = AuraFlowPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    painter = sample_t2i.Painter.of_run(run, torch.device("cpu"))
    side = painter.settings["size"] // painter.image.factor
    noise = sample_t2i.fixed_noise(2, (painter.image.channels, side, side), seed=0)
    options = {"text": painter.text, "image": painter.image, "cfg": 3.0, "steps": 8, "shift": 1.73}
    mine = sample_t2i.draw(painter.model, [PROMPT, OTHER], noise, **options)
    pictures = pipe(
        [PROMPT, OTHER], latents=noise, guidance_scale=3.0, num_inference_steps=8,
        sigmas=[1 - i / 8 for i in range(8)], output_type="np", height=side * painter.image.factor,
        width=side * painter.image.factor,
    ).images  # fmt: skip
    theirs = torch.tensor(pictures).permute(0, 3, 1, 2) * 255
    assert mine.float().std() > 5  # there is something to compare
    assert (theirs - mine).abs().max() <= 2
    other = sample_t2i.draw(painter.model, [OTHER, PROMPT], noise, **options)
    assert (other.float() - mine.float()).abs().max() > 2  # and the prompt matters to it


def test_auraflow_draws_from_a_pipelines_folder(run, tmp_path, capsys):
    """--auraflow on an export: the same picture as the run that was exported."""
    sample_t2i.main([str(run), "--export", "diffusers", str(tmp_path / "pipe")])
    options = ["--steps", "3", "--size", "16", "--images", "1", "--cfg", "3", "--shift", "1.73"]
    for source, out in (([str(run)], "a.png"), (["--auraflow", str(tmp_path / "pipe")], "b.png")):
        sample_t2i.main([*source, PROMPT, *options, "--out", str(tmp_path / out)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample_t2i.main([str(run), "--export", "auraflow", str(tmp_path / "aura.safetensors")])
    again = auraflow.load_auraflow(tmp_path / "aura.safetensors", head_dim=32)
    assert again.final.weight.equal(auraflow.load_auraflow(tmp_path / "pipe").final.weight)


def test_wrong_commands_end_in_one_line(run, tmp_path):
    for arguments, reason in (
        ([], "no RUN given"),
        ([run, "--export", "onnx", "x"], "--export 'onnx' must be diffusers or auraflow"),
        ([run, PROMPT, "--size", "big"], "--size big must be a number of pixels"),
        ([run, PROMPT, "--size", "16x15"], "must be a multiple of 2, the VAE's factor"),
        (["--auraflow", tmp_path / "none", PROMPT], "is no folder and could not be downloaded"),
        (["--auraflow", tmp_path, PROMPT], "no .safetensors file"),
    ):
        with pytest.raises(SystemExit, match=re.escape(reason)) as caught:
            sample_t2i.main([str(a) for a in arguments])
        assert "\n" not in str(caught.value)


def test_the_trainers_auraflow_residual_can_be_exported():
    import options_t2i
    import train_t2i
    from encoders import HashText, Pixels

    for preset in options_t2i.RECIPES:
        args = train_t2i.build_parser().parse_args(["--preset", preset, "--residual", "auraflow"])
        train_t2i.resolve(args, None)
        auraflow.check(
            train_t2i.model_config(args, HashText(tokens=12), Pixels(), [(args.size, args.size)])
        )


@torch.no_grad()
def drawn_by_diffusers(folder, captions, noise, text, cfg, steps, shift):
    """Their network, their scheduler, and guidance as their pipeline does it."""
    network = AuraFlowTransformer2DModel.from_pretrained(folder)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    features = torch.cat([text([""]).expand(len(captions), -1, -1), text(captions)])
    x = noise
    for t in scheduler.timesteps:
        time = (t / 1000).expand(2 * len(captions))
        v = network(torch.cat([x, x]), features, timestep=time).sample
        empty, right = v.chunk(2)
        x = scheduler.step(empty + cfg * (right - empty), t, x).prev_sample
    return Pixels().decode(x)


@pytest.mark.slow
def test_a_trained_model_draws_the_same_in_diffusers(tmp_path):
    """AURAFLOW_SAMPLES=100000 trains for minutes instead of seconds."""
    from test_train_t2i import train

    samples = int(os.environ.get("AURAFLOW_SAMPLES", 6400))
    out = train(
        tmp_path / "run", "--residual", "auraflow", "--samples", samples, "--batch-size", 64,
        "--eval-every-samples", samples, "--save-every-samples", samples, "--lr", 2e-3,
    )  # fmt: skip
    sample_t2i.main([str(out), "--export", "diffusers", str(tmp_path / "out")])
    painter = sample_t2i.Painter.of_run(out, torch.device("cpu"))
    captions = ["a red circle", "a blue square above a green triangle", "two yellow squares"] * 4
    noise = sample_t2i.fixed_noise(len(captions), (3, 20, 20), seed=0)
    options = {"cfg": 3.0, "steps": 20, "shift": 2.0}
    mine = sample_t2i.draw(
        painter.model, captions, noise, text=painter.text, image=painter.image, **options
    )
    theirs = drawn_by_diffusers(tmp_path / "out", captions, noise, painter.text, **options)
    assert mine.float().std() > 10
    difference = (mine.int() - theirs.int()).abs().max().item()
    print(f"largest difference {difference} of 255 after {samples} samples")
    assert difference < 2
