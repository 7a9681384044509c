"""sample_t2i.py: finding weights, drawing, scoring, and the command line."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import rf
import sample_t2i
import shapes
from encoders import HashText, Pixels
from mmdit import PRESETS, MMDiT, save_model
from sample_t2i import draw, find_weights, fixed_noise, obeyed, scores, shapes_prompts
from shapes import World

RUN = {
    "text_encoder": "hash", "text_tokens": 12, "vae": "pixels", "size": 20, "shapes": 4,
    "colors": 6, "places": 10, "cfg": 2.0, "shift": 2.0,
}  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    """A run with two checkpoints of random weights, each with two averages."""
    torch.manual_seed(0)
    model = MMDiT(PRESETS["tiny"])
    torch.nn.init.normal_(model.final.weight, std=0.02)
    for samples in (40, 80):
        for width in ("0.05", "0.10"):
            folder = tmp_path / "run" / "checkpoints" / f"{samples:012d}" / f"ema_{width}"
            save_model(folder, model, run=RUN | {"samples_seen": samples})
    return tmp_path / "run"


def main(*args):
    sample_t2i.main([str(a) for a in args])


# --- drawing -------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_place_alone():
    a = fixed_noise(5, (3, 4, 4), seed=0)
    assert torch.equal(a[:2], fixed_noise(2, (3, 4, 4), seed=0))
    assert not torch.equal(a, fixed_noise(5, (3, 4, 4), seed=1))
    assert a.flatten(1).unique(dim=0).shape[0] == 5 and abs(a.std() - 1) < 0.15


def test_draw_follows_the_flow_in_batches_of_any_size():
    """On the field v = (x − c)/t every path ends in c: here a grey that the caption tells."""
    text = HashText(8, 4)
    greys = {"dark": -0.5, "light": 0.5, "": 0.0}
    features = text(list(greys))

    def model(x, t, words):
        near = (words[:, None] - features[None]).flatten(2).norm(dim=2).argmin(1)
        grey = torch.tensor(list(greys.values()))[near]
        return (x - grey[:, None, None, None]) / t[:, None, None, None]

    captions = ["dark", "light", "light", "dark", "dark"]
    noise = fixed_noise(5, (3, 4, 4), seed=0)
    options = {"text": text, "image": Pixels(), "steps": 4}
    pictures = draw(model, captions, noise, batch=2, **options)
    expected = Pixels().decode(torch.tensor([greys[c] for c in captions]))
    assert pictures.dtype == torch.uint8
    assert (pictures == expected[:, None, None, None]).all()
    guided = draw(model, captions, noise, cfg=1.5, **options)  # 0 + 1.5·(grey − 0)
    expected = Pixels().decode(1.5 * torch.tensor([greys[c] for c in captions]))
    assert (guided == expected[:, None, None, None]).all()
    path = draw(model, captions, noise, batch=2, return_trajectory=True, **options)
    assert path.shape == (5, 5, 3, 4, 4) and torch.equal(path[-1], pictures)


# --- score ---------------------------------------------------------------------------------------


def test_true_pictures_score_one_and_exchanged_ones_do_not():
    world = World(20, 4, 6, 10)
    prompts = shapes_prompts(world, 20)
    assert [m.tag for m, _ in prompts[::20]] == list(shapes.TAGS)
    assert all(shapes.held_out(*prompt) for prompt in prompts)
    rng = np.random.default_rng(0)
    pictures = torch.stack(
        [
            torch.from_numpy(shapes.render(shapes.draw_scene(m, rng, world), 20, rng))
            for m, _ in prompts
        ]
    )
    result = scores(prompts, obeyed(pictures, prompts))
    assert list(result) == [*shapes.TAGS, "mean"] and result["mean"] > 0.98
    exchanged = scores(prompts, obeyed(pictures.roll(20, 0), prompts))  # another tag's pictures
    assert exchanged["mean"] < 0.25


def test_the_mean_is_of_the_six_tags():
    prompts = shapes_prompts(World(20, 4, 6, 10), 2)
    obeys = [True, True, True, False] + [False] * 8
    result = scores(prompts, obeys)
    assert result["single_object"] == 1 and result["two_object"] == 0.5
    assert result["mean"] == pytest.approx(1.5 / 6)


# --- weights -------------------------------------------------------------------------------------


def test_a_run_means_its_newest_narrowest_average(weights):
    newest = weights / "checkpoints" / f"{80:012d}"
    assert find_weights(weights) == newest / "ema_0.05"
    assert find_weights(weights, "0.10") == newest / "ema_0.10"
    assert find_weights(newest) == newest / "ema_0.05"
    assert find_weights(newest / "ema_0.10") == newest / "ema_0.10"
    with pytest.raises(FileNotFoundError, match=r"no weights ema_0.2: it holds ema_0.05"):
        find_weights(weights, "0.2")
    with pytest.raises(FileNotFoundError, match="train one first"):
        find_weights(weights / "nowhere")


# --- command line --------------------------------------------------------------------------------


def test_prompts_become_pictures_the_same_twice(weights, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\n two stars \n")
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--prompts", prompts, "--steps", 2, "--images", 2, "--gif"]
    main(weights, "a red circle", *options, "--out", first)
    main(weights, "a red circle", *options, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    main(weights, "a red circle", *options, "--out", second, "--seed", 1)
    assert first.read_bytes() != second.read_bytes()
    with Image.open(first.with_suffix(".gif")) as gif:
        assert gif.n_frames == 3
    assert str(first) in capsys.readouterr().out


def test_the_score_is_printed_for_each_tag(weights, tmp_path, capsys):
    out = tmp_path / "score.png"
    main(weights, "--score", "shapes", "--per-tag", 2, "--steps", 1, "--out", out)
    said = capsys.readouterr().out
    assert all(tag in said for tag in (*shapes.TAGS, "mean")) and out.exists()


@pytest.mark.parametrize(
    "args, match",
    [
        ([], "no prompt given: write one in quotes, or give --prompts FILE"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is not there"),
        (["a ring", "--steps", "0"], "--steps 0 must be at least 1"),
        (["a ring", "--solver", "rk45"], "--solver 'rk45' must be one of euler, heun"),
        (["a ring", "--ema", "0.3"], "no weights ema_0.3"),
    ],
)
def test_wrong_input_ends_in_one_line(weights, args, match):
    with pytest.raises(SystemExit) as caught:
        main(weights, *args)
    assert match in caught.value.code and "\n" not in caught.value.code


def test_weights_of_another_script_are_refused(tmp_path):
    model = MMDiT(PRESETS["tiny"])
    save_model(tmp_path, model)
    with pytest.raises(SystemExit, match=r"was not written by train_t2i.py"):
        main(tmp_path, "a ring")
    assert json.loads((tmp_path / "config.json").read_text())["model"] == asdict(model.config)
    assert rf.SOLVERS
