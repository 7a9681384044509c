"""tools/pairs.py and the rows that its folders are: what is written, what a run takes from them."""

import json

import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, opened, refused
from safetensors import safe_open
from safetensors.torch import save_file

import rf
from inputs.encoders import HashText, Words
from inputs.rows import PairsFolder
from inputs.shapes import World, one_in
from mmdit import load_model
from tools.pairs import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return {name: exported(home / name, f) for name, f in (("digits", DIGITS), ("shapes", SHAPES))}


def make(run, out, *options):
    how = ["--steps", 4, "--number", 25, "--chunk", 10, "--device", "cpu", *options]
    call(main, run, "--out", out, *how)
    return out


def read(out):
    """All states, all captions."""
    states, captions = [], []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            states.append(file.get_tensor("states"))
            captions += json.loads(file.metadata()["captions"])
    return torch.cat(states), captions


@pytest.mark.parametrize("kind", ["digits", "shapes"])
def test_pairs_are_what_the_model_makes_of_the_noise(runs, tmp_path, kind):
    out = make(runs[kind], tmp_path / "pairs", "--segments", 2)
    facts = {"digits": DIGITS, "shapes": SHAPES}[kind]
    states, captions = read(out)
    assert states.dtype == torch.float16 and len(states) == len(captions) == 25
    noise = states[:, 0].float()
    assert abs(noise.std() - 1) < 0.03 and len(noise.unique(dim=0)) == 25
    text = Words(facts["words"]) if kind == "digits" else HashText(tokens=12)
    how = {"null_text": text([""]), "cfg": facts["cfg"], "shift": facts["shift"], "steps": 4}
    how |= {"solver": "rf_solver", "return_trajectory": True}
    path = rf.sample(load_model(runs[kind]), noise, text(captions), **how)
    assert torch.allclose(path[[0, 2, 4]].transpose(0, 1), states.float(), atol=4e-3)
    assert len(set(captions)) > (7 if kind == "digits" else 15)
    if kind == "shapes":
        assert not any(one_in(5, caption) for caption in captions)  # held-out wordings
    other, _ = read(make(runs[kind], tmp_path / "other", "--seed", 1))
    assert not torch.equal(other[0, 0], states[0, 0])


def test_a_command_goes_on_and_a_greater_number_adds_chunks(runs, tmp_path, capsys):
    whole = make(runs["digits"], tmp_path / "whole", "--number", 35)
    out = make(runs["digits"], tmp_path / "pairs", "--number", 20)
    wanted, files = ([*folder.glob("*.safetensors")] for folder in (whole, out))
    assert len(wanted) == 4 and len(files) == 2
    make(runs["digits"], out, "--number", 35)
    old, lost = out / "00000.safetensors", out / "00001.safetensors"
    lost.unlink()
    with pytest.raises(ValueError, match="is not finished, 1 of 4 chunks are missing: run its"):
        PairsFolder(str(out))
    before = old.stat().st_mtime_ns
    make(runs["digits"], out, "--number", 35)
    assert old.stat().st_mtime_ns == before
    for file in wanted:
        assert (out / file.name).read_bytes() == file.read_bytes()
    for number in (30, 40):  # fewer; or the last chunk is not full
        how = ["--out", out, "--steps", 4, "--chunk", 10, "--number", number]
        said = refused(main, capsys, runs["digits"], *how)
        assert f"holds other pairs (number 35 there, {number} here): choose another" in said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cfg", 3], "holds other pairs (settings {'cfg': 1.6,"),
        (["--segments", 2, "--steps", 5], "--steps 5 must be a multiple of --segments 2"),
        (["--solver", "magic"], "--solver 'magic' must be one of euler, heun, rf_solver"),
        (["--number", 0], "--number 0 must be at least 1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "/dev/null"], "--prompts /dev/null holds no captions: one on each line"),
    ],
)
def test_bad_options_end_in_one_line(runs, tmp_path, capsys, options, message):
    out = make(runs["digits"], tmp_path / "pairs")
    before = (out / "pairs.json").read_text()
    how = ["--out", out, "--steps", 4, "--number", 25, "--chunk", 10, *options]
    assert message in refused(main, capsys, runs["digits"], *how)
    assert before == (out / "pairs.json").read_text()


def test_captions_of_ones_own(runs, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\n  a blue ring \n")
    out = make(runs["shapes"], tmp_path / "pairs", "--prompts", prompts)
    assert set(read(out)[1]) == {"a red square", "a blue ring"}
    assert opened(out)[1].world is None  # there is nothing to score
    how = ["--out", tmp_path / "words", "--prompts", prompts]
    said = refused(main, capsys, runs["digits"], *how)
    assert "is no word of this model; it knows: 0, 1, 2" in said
    mute = exported(tmp_path / "mute", SHAPES | {"shapes": 0})
    said = refused(main, capsys, mute, "--out", tmp_path / "none")
    assert "needs captions: give a file with --prompts" in said and not (tmp_path / "none").exists()


def test_a_run_takes_its_settings_from_pairs(runs, tmp_path):
    out = make(runs["shapes"], tmp_path / "pairs", "--segments", 4)
    settings, rows = opened(out, segments=4)
    found = [getattr(settings, key) for key in ("cfg", "time", "shift", "preset", "residual")]
    assert found == [1.0, "u_shaped", 2.0, "tiny", "prenorm"]
    assert rows.world == World(20, 4, 6, 10) and rows.K == 4 and rows.sides() == {(20, 20): 1.0}
    for typed, steps in (({"segments": 4}, 4), ({"time": "start"}, 1), ({}, None)):
        assert rows.step_defaults(typed).get("sample_steps") == steps
    with pytest.raises(ValueError, match=r"--shift 1.0 does not fit --data, which was made with 2"):
        opened(out, shift=1.0)
    batch = rows.draw(range(8), 3)
    states, _, u, noise = rows.encode(batch, "cpu")
    data, start, t = rf.line(states, noise, u, segments=4, shift=2.0, time="uniform")
    x = rf.interpolate(data, start, torch.full((8,), 1.0))  # on the first piece: the noise itself
    first = t > rf.timesteps(4, 2.0)[1]
    assert first.any() and torch.allclose(x[first], states[first, 0], atol=1e-4)


def test_broken_pairs(runs, tmp_path):
    out = make(runs["digits"], tmp_path / "pairs")
    states, folder = read(out)[0], PairsFolder(str(out))
    (out / "00000.safetensors").write_bytes(b"no safetensors")
    save_file({"states": states}, out / "00001.safetensors")  # without captions
    for chunk in (0, 1):
        with pytest.raises(ValueError, match=r"is broken: delete it, and run tools.pairs again"):
            folder.chunk(chunk)
    (out / "pairs.json").write_text((out / "pairs.json").read_text().replace("segments", "parts"))
    with pytest.raises(ValueError, match=r"pairs.json is not what our tools write \('segments'\)"):
        PairsFolder(str(out))
