"""sample_t2i.py: the command line, from captions to pictures, scores and exports."""

import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, records, refused
from PIL import Image
from safetensors.torch import load_file
from test_encoders import tiny_t5, tiny_vae

import rf
from common.auraflow import load_auraflow
from common.pipeline import Pipeline
from inputs.shapes import TAGS
from mmdit import MMDiT, MMDiTConfig
from sample_t2i import Graphed, main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Exported weights of several runs."""
    home = tmp_path_factory.mktemp("home")
    exported(home / "shapes", SHAPES)
    exported(home / "other", SHAPES | {"steps": 3, "shapes": 6, "colors": 10, "places": 20})
    exported(home / "digits", DIGITS)
    return home


def test_captions_become_pictures_the_same_twice(home, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n two stars for $10 \n")
    outs = [tmp_path / f"{name}.png" for name in "abcd"]
    how = [home / "shapes", "a red circle", "--prompts", prompts, "--steps", 2, "--images", 2]
    changes = [[], [], ["--seed", 1], ["--cfg", 1]]
    for out, change in zip(outs, changes, strict=True):
        call(main, *how, "--gif", "--out", out, *change)
    first, again, *others = [out.with_suffix(".gif").read_bytes() for out in outs]
    assert first == again and first not in others
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    with Image.open(outs[0].with_suffix(".gif")) as gif, Image.open(outs[0]) as sheet:
        width, height = gif.size  # three rows of two pictures of 20 pixels, each with its frame
        assert gif.n_frames == 3 and width / height == 43 / 64
        assert sheet.height > sheet.width
    assert str(outs[0]) in capsys.readouterr().out
    call(main, home / "digits", 3, 1, 4, "--images", 1, "--out", outs[0])
    call(
        main, home / "shapes", "a ring", "--images", 1, "--size", "12x20", "--gif", "--out", outs[1]
    )
    with Image.open(outs[1].with_suffix(".gif")) as gif:
        assert gif.width > gif.height


def test_runs_are_scored_at_several_numbers_of_steps(home, tmp_path, capsys):
    out = tmp_path / "score.png"
    how = ["--score", "--against", home / "other", "--per-tag", 2, "--out", out]
    call(main, home / "shapes", *how, "--at-steps", 1, 2)
    rows = records(out.with_suffix(".csv"))
    wanted = [(str(home / name), n) for name in ("shapes", "other") for n in "12"]
    assert [(row["run"], row["steps"]) for row in rows] == wanted
    for row in rows:
        assert float(row["mean"]) == pytest.approx(sum(float(row[tag]) for tag in TAGS) / 6)
    said = capsys.readouterr().out
    assert all(tag in said for tag in (*TAGS, "mean")) and f"{home}/other, 2 steps" in said
    assert out.exists()
    call(main, home / "shapes", *how)  # each its own number of steps, written anew
    assert [row["steps"] for row in records(out.with_suffix(".csv"))] == ["2", "3"]


def test_the_network_is_exported(home, tmp_path):
    call(main, home / "shapes", "--export", "weights", tmp_path / "weights")
    files = [folder / "model.safetensors" for folder in (home / "shapes", tmp_path / "weights")]
    ours, copy = map(load_file, files)
    assert all(torch.equal(copy[name], tensor) for name, tensor in ours.items())
    facts = SHAPES | {"residual": "auraflow", "patch_size": 2}
    run = exported(tmp_path / "run", facts)
    call(main, run, "--export", "diffusers", tmp_path / "diffusers")
    again = load_auraflow(tmp_path / "diffusers").state_dict()
    for name, tensor in Pipeline.open(run).model.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_a_whole_pipeline_goes_out_and_comes_in(tmp_path):
    """Text encoder, VAE and network; what comes in is drawn as it went out."""
    encoders = {"vae": tiny_vae(tmp_path / "vae"), "text_encoder": tiny_t5(tmp_path / "t5")}
    encoders |= {"text_tokens": 256, "residual": "auraflow", "patch_size": 2, "size": 16}
    run = exported(tmp_path / "run", SHAPES | encoders)
    call(main, run, "--export", "diffusers", tmp_path / "pipeline")
    how = ["--size", 16, "--steps", 2, "--cfg", 2, "--shift", 1, "--images", 1]
    call(main, run, "a red ring", *how, "--out", tmp_path / "a.png")
    call(main, tmp_path / "pipeline", "--auraflow", "a red ring", *how, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "args, message",
    [
        (["shapes"], "no caption given: write one in quotes, or give --prompts FILE"),
        (["shapes", "--prompts", "nowhere.txt"], "--prompts nowhere.txt is not there: give a text"),
        (["shapes", "a ring", "--steps", 0], "--steps 0 must be at least 1"),
        (["shapes", "a ring", "--solver", "rk45"], "--solver 'rk45' must be one of euler, heun"),
        (["shapes", "a ring", "--ema", 0.3], "holds no checkpoint: only its exported weights"),
        (["nowhere", "a ring"], "holds no weights: train it first, or give another run"),
        (["digits", "ten"], "'ten' is no word of this model; it knows: 0, 1, 2"),
        (["digits", "--score"], "digits was not trained on shapes"),
        (["shapes", "--export", "gguf", "x"], "--export gguf x must be weights or diffusers, OUT"),
        (["shapes", "--export", "weights"], "--export weights must be weights or diffusers, OUT"),
        (["shapes", "--export", "diffusers", "x"], "residual 'prenorm' is not AuraFlow's"),
        (["shapes", "a ring", "--cudagraphs"], "--cudagraphs needs a CUDA device, not cpu"),
    ],
)
def test_wrong_input_ends_in_one_line(home, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    run, *rest = args
    assert message in refused(main, capsys, home / run, *rest, "--device", "cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_graph_draws_what_the_network_draws():
    sizes = {"dim": 64, "head_dim": 32, "n_layers": 2, "n_double_layers": 1, "text_dim": 8}
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**sizes, max_grid=4, base_dim=64)).to("cuda").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    graphed = Graphed(model)
    for batch in (2, 3, 2):  # two shapes, and one of them again
        noise = torch.randn(batch, 4, 8, 8, device="cuda")
        text = torch.randn(batch, 5, 8, device="cuda")
        how = {"null_text": torch.zeros_like(text[:1]), "cfg": 2.0, "steps": 4, "solver": "heun"}
        drawn = rf.sample(graphed, noise, text, **how)
        assert torch.allclose(drawn, rf.sample(model, noise, text, **how), atol=1e-4)
    assert len(graphed.captured) == 2
