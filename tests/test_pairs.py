"""tools/pairs.py and the rows that its folders are: what is written, what a run takes from them."""

import json
import re
import shutil

import pytest
import torch
from helpers import DIGITS, SHAPES, call, close, exported, opened, refused
from safetensors import safe_open
from safetensors.torch import save_file

import rf
from common.evaluate import asked
from inputs.encoders import HashText, Words
from inputs.shapes import World, one_in
from inputs.stored import PairsFolder
from mmdit import load_model
from tools import pairs
from tools.pairs import main

HOW = ["--steps", 4, "--number", 25, "--chunk", 10, "--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three runs; of the last nobody knows the captions."""
    home = tmp_path_factory.mktemp("home")
    for name, facts in (("digits", DIGITS), ("shapes", SHAPES), ("mute", SHAPES | {"shapes": 0})):
        exported(home / name, facts)
    return home


def make(run, out, *options):
    call(main, run, "--out", out, *HOW, *options)
    return out


def read(out):
    """All states, all captions."""
    states, captions = [], []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            states.append(file.get_tensor("states"))
            captions += json.loads(file.metadata()["about"])["captions"]
    return torch.cat(states), captions


@pytest.mark.parametrize("kind, facts", [("digits", DIGITS), ("shapes", SHAPES)])
def test_pairs_are_what_the_model_makes_of_the_noise(home, tmp_path, kind, facts):
    states, captions = read(make(home / kind, tmp_path / "pairs", "--segments", 2))
    assert states.dtype == torch.float16 and len(states) == len(captions) == 25
    noise = states[:, 0].float()
    assert abs(noise.std() - 1) < 0.03 and len(noise.unique(dim=0)) == 25
    text = Words(facts["words"]) if kind == "digits" else HashText(tokens=12)
    how = {"steps": 4, "solver": "rf_solver", "cfg": facts["cfg"], "shift": facts["shift"]}
    how |= {"null_text": text([""]), "return_trajectory": True}
    path = rf.sample(load_model(home / kind), noise, text(captions), **how)
    close(path[[0, 2, 4]].transpose(0, 1), states, atol=4e-3)
    held = sum(one_in(5, caption) for caption in captions)  # held-out wordings
    assert len(set(captions)) > 7 and (kind == "digits" or not held)
    other, words = read(make(home / kind, tmp_path / "other", "--seed", 1))
    assert not torch.equal(other[0, 0], states[0, 0]) and words != captions


def test_a_command_goes_on_and_a_greater_number_adds_chunks(home, tmp_path, capsys):
    whole = make(home / "digits", tmp_path / "whole", "--number", 35)
    out = make(home / "digits", tmp_path / "pairs", "--number", 20)
    first = out / "00000.safetensors"
    before = first.stat().st_mtime_ns
    make(home / "digits", out, "--number", 35)
    assert first.stat().st_mtime_ns == before
    first.write_bytes(first.read_bytes()[:-9])  # cut: it is made again
    (out / "00001.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"is not finished, .* 3 chunks are there, must be 4: run its"
    ):
        PairsFolder(str(out))
    make(home / "digits", out, "--number", 35)
    wanted, found = ({f.name: f.read_bytes() for f in x.iterdir()} for x in (whole, out))
    assert found == wanted and len(found) == 6
    (tmp_path / "none").mkdir()  # refused before its first chunk: it blocks no corrected command
    for name in ("made_by.txt", "pairs.json"):
        shutil.copy(out / name, tmp_path / "none")
    make(home / "digits", tmp_path / "none", "--number", 7, "--cfg", 3)
    for options, other in (
        (["--number", 30], "number 35 there, 30 here"),
        (["--number", 40], "number 35 there, 40 here"),  # the last chunk is not full
        (["--cfg", 3], "settings {'cfg': 1.6,"),
    ):
        said = refused(main, capsys, home / "digits", "--out", out, *HOW, *options)
        assert f"holds other pairs ({other}" in said


def test_parts_make_the_chunks_of_one_folder(home, tmp_path, capsys):
    whole = make(home / "digits", tmp_path / "whole", "--number", 45)
    out = tmp_path / "parts"
    for part, chunks in (("1/2", [1, 3]), ("0/2", [0, 1, 2, 3, 4])):
        make(home / "digits", out, "--number", 45, "--part", part)
        assert sorted(int(f.stem) for f in out.glob("*.safetensors")) == chunks
    done = "this part is done; .*parts is ready when all parts are\n.*parts holds 45 pairs\n$"
    assert re.search(done, capsys.readouterr().out)
    wanted, found = ({f.name: f.read_bytes() for f in x.iterdir()} for x in (whole, out))
    assert found == wanted and len(found) == 7
    other = ["--number", 45, "--part", "0/2", "--seed", 1, "--out", out]
    assert "holds other pairs" in refused(main, capsys, home / "digits", *HOW, *other)


@pytest.mark.parametrize(
    "run, options, message",
    [
        ("digits", "--part 1/1", "--part 1/1 must be i/n with 0 ≤ i < n, such as 0/2 and 1/2"),
        ("digits", "--segments 2 --steps 5", "--steps 5 must be a multiple of --segments 2"),
        ("digits", "--solver magic", "--solver 'magic' must be one of euler, heun, rf_solver"),
        ("digits", "--prompts nowhere.txt", "nowhere.txt"),
        ("digits", "--prompts /dev/null", "--prompts /dev/null is empty: write one on each"),
        ("mute", "", "needs captions: give a file with --prompts"),
    ],
)
def test_bad_options_end_in_one_line(home, tmp_path, capsys, run, options, message):
    said = refused(main, capsys, home / run, "--out", tmp_path / "out", *options.split())
    assert message in said and not (tmp_path / "out").exists()


def test_pairs_that_another_process_began_anew_are_left_to_it(home, tmp_path, capsys, monkeypatch):
    def other(*args):
        file = tmp_path / "pairs.json"
        file.write_text(file.read_text().replace('"cfg": 3', '"cfg": 4'))
        return b"mine"

    monkeypatch.setattr(pairs, "chunk_bytes", other)
    said = refused(main, capsys, home / "digits", "--out", tmp_path, *HOW, "--cfg", 3)
    assert "was begun anew with others" in said and not list(tmp_path.glob("*.safetensors"))


def test_captions_of_ones_own(home, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\n  a blue ring \n")
    out = make(home / "shapes", tmp_path / "pairs", "--prompts", prompts)
    assert set(read(out)[1]) == {"a red square", "a blue ring"}
    rows = opened(out)[1]
    assert rows.world is None  # there is nothing to score
    held = rows.held[0]
    assert sorted(asked(rows, 1).captions) == sorted(held.captions([0, 1]))
    how = ["--out", tmp_path / "out", "--prompts", prompts]
    said = refused(main, capsys, home / "digits", *how)
    assert "is no word of this model; it knows: 0, 1, 2" in said


def test_a_run_takes_its_settings_from_pairs(home, tmp_path):
    out = make(home / "shapes", tmp_path / "pairs", "--segments", 4)
    settings, rows = opened(out, segments=4)
    found = [getattr(settings, key) for key in ("cfg", "time", "shift", "preset", "residual")]
    assert found == [1.0, "u_shaped", 2.0, "tiny", "prenorm"]
    assert rows.world == World(20, 4, 6, 10) and rows.K == 4 and rows.sides() == {(20, 20): 1.0}
    for typed, steps in (({"segments": 4}, 4), ({"time": "start"}, 1), ({}, None)):
        assert rows.step_defaults(typed).get("sample_steps") == steps


@pytest.mark.parametrize(
    "number, message",
    [
        (10, "its number has changed: 3 chunks are there, must be 1"),
        (24, "00002.safetensors is broken"),
    ],
)
def test_a_number_that_was_changed_is_refused(home, tmp_path, number, message):
    out = make(home / "digits", tmp_path / "pairs")
    about = json.loads((out / "pairs.json").read_text())
    (out / "pairs.json").write_text(json.dumps(about | {"number": number}))
    with pytest.raises(ValueError, match=message):
        PairsFolder(str(out))


def test_states_of_another_type_are_refused(home, tmp_path):
    out = make(home / "digits", tmp_path / "pairs")
    file = out / "00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F16"', b'"I16"'))
    with pytest.raises(ValueError, match=r"is broken \(it holds torch.int16\)"):
        PairsFolder(str(out)).chunk(0)


def test_broken_pairs_say_what_to_do(home, tmp_path):
    out = make(home / "digits", tmp_path / "pairs")
    (out / "00000.safetensors").write_bytes(b"no safetensors")
    save_file({"states": torch.zeros(10)}, out / "00001.safetensors")  # without captions
    for chunk in (0, 1):
        with pytest.raises(ValueError, match=r"is broken .*: run tools.pairs again"):
            PairsFolder(str(out)).chunk(chunk)
