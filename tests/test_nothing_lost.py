"""What was there before a command that fails, or is killed, is there afterwards, byte for byte."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from helpers import DIGITS, call, exported, full_disk, opened, refused, t2i
from test_digits import write_mnist
from test_pairs import make
from test_prepare import pictures
from test_prepare import run as prepared

import sample_t2i
import train_mnist
from common import start
from common.evaluate import Ranks, validation
from mmdit import PRESETS, MMDiT, save_model
from tools import geneval, pairs, prepare

ROOT = Path(__file__).parents[1]
QUICK = {
    "mnist": "--device cpu --steps 4 --batch-size 2 --preset digits-narrow --sample-steps 1",
    "t2i": "--threads 1 --samples 8 --batch-size 2 --eval-prompts 1 --sample-steps 1",
}
TRAINERS = {"mnist": train_mnist.main, "t2i": t2i}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of each program, and one of somebody else's."""
    home = tmp_path_factory.mktemp("home")
    write_mnist(home)
    for name, main in TRAINERS.items():
        call(main, *options(name, home, home / name))
    exported(home / "first", DIGITS)
    prepared(pictures(home / "source", 12), home / "data", "--chunk-rows", 6)
    make(home / "first", home / "pairs")
    (home / "prompts.jsonl").write_text('{"prompt": "1"}')
    how = ["--images", 1, "--steps", 1]
    call(geneval.main, home / "first", home / "prompts.jsonl", "--out", home / "geneval", *how)
    call(sample_t2i.main, home / "first", "--export", "weights", home / "export")
    (home / "other").mkdir()
    (home / "other" / "samples.png").write_bytes(b"mine")
    return home


def options(name, home, out, *more):
    return [*QUICK[name].split(), "--data", "mnist", "--data-dir", home, "--out", out, *more]


def content(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- a mistake is found before anything is deleted -----------------------------------------------


@pytest.mark.parametrize(
    "trainer, mistake",
    [
        ("mnist", "--patch-size 5"),
        ("mnist", "--init {}/t2i"),
        ("mnist", "--init nowhere"),
        ("mnist", "--data shapes --size 13"),
        ("mnist", "--seed 18446744073709551616"),
        ("mnist", "--lr nan"),
        ("mnist", "--data nowhere"),
        ("mnist", "--batch-size 2000000"),
        ("t2i", "--micro-batch 3"),
        ("t2i", "--init {}/mnist"),
        ("t2i", "--seed 18446744073709551616"),
        ("t2i", "--ds-config nowhere"),
        ("t2i", "--data {}/source"),
    ],
)
def test_an_option_that_cannot_be_leaves_the_run(home, tmp_path, capsys, trainer, mistake):
    out = shutil.copytree(home / trainer, tmp_path / "run")
    before = content(out)
    given = options(trainer, home, out, "--overwrite", *mistake.format(home).split())
    refused(TRAINERS[trainer], capsys, *given)
    assert content(out) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_is_replaced_stays_beside_the_new_one(home, tmp_path, trainer):
    out = shutil.copytree(home / trainer, tmp_path / "run")
    before = content(out)
    call(TRAINERS[trainer], *options(trainer, home, out, "--overwrite", "--seed", 1))
    assert content(tmp_path / "run.old") == before != content(out)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_full_disk_leaves_the_run(home, tmp_path, capsys, trainer):
    out = shutil.copytree(home / trainer, tmp_path / "run")
    before = content(out)
    with full_disk(tmp_path / "run.old"):
        said = refused(TRAINERS[trainer], capsys, *options(trainer, home, out, "--overwrite"))
    assert "could not be written" in said
    assert content(tmp_path / "run.old") == before
    assert not list(out.glob(".*")) and not list(out.glob("**/*partial*"))


def test_a_full_disk_leaves_a_picture(home, tmp_path, capsys):
    out = tmp_path / "out.png"
    call(sample_t2i.main, home / "first", 3, "--out", out, "--images", 2)
    before = out.read_bytes()
    with full_disk(tmp_path):
        how = [home / "first", *9 * ["3"], "--out", out, "--images", 9]
        assert f"{out} could not be written" in refused(sample_t2i.main, capsys, *how)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


# --- every folder belongs to one program ---------------------------------------------------------

WRITERS = {
    "mnist": lambda home, out: (train_mnist.main, options("mnist", home, out, "--overwrite")),
    "t2i": lambda home, out: (t2i, options("t2i", home, out, "--overwrite")),
    "data": lambda home, out: (prepare.main, [home / "source", "--out", out]),
    "pairs": lambda home, out: (pairs.main, [home / "first", "--out", out]),
    "geneval": lambda home, out: (
        geneval.main,
        [home / "first", home / "prompts.jsonl", "--out", out],
    ),
    "export": lambda home, out: (
        sample_t2i.main,
        [home / "first", "--export", "weights", out],
    ),
}


@pytest.mark.parametrize("owner", [*WRITERS, "other", "file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_program_writes_into_the_folder_of_another(home, tmp_path, capsys, writer, owner):
    if writer == owner:
        return
    if owner == "file":
        (tmp_path / "out").write_bytes(b"mine")
    else:
        shutil.copytree(home / owner, tmp_path / "out")
    before = content(tmp_path)
    main, given = WRITERS[writer](home, tmp_path / "out")
    said = refused(main, capsys, *given)
    assert "a new or an empty folder" in said or "is a file, must be a folder" in said
    assert content(tmp_path) == before


def test_two_processes_do_not_train_in_one_folder(home, tmp_path, capsys):
    out = shutil.copytree(home / "mnist", tmp_path / "run")
    with start.owned(out, "train_mnist.py"):
        for how in ("--overwrite", "--resume"):
            said = refused(train_mnist.main, capsys, *options("mnist", home, out, how))
            assert f"--out {out} is in use by another process" in said
    call(train_mnist.main, *options("mnist", home, out, "--resume"))


@pytest.mark.slow
def test_two_processes_make_one_folder_of_pairs_or_chunks(home, tmp_path):
    """Both do the same work; the end is what one alone would have made."""
    how = ["--number", "40", "--chunk", "5", "--steps", "2"]
    for module, given in {
        "tools.pairs": [home / "first", *how],
        "tools.prepare": [home / "source", "--size", "16", "--chunk-rows", "2"],
    }.items():
        outs = [tmp_path / f"{module}{i}" for i in (0, 1, 1)]
        command = [sys.executable, "-m", module, *map(str, given), "--out"]
        both = [subprocess.Popen([*command, out], cwd=ROOT) for out in outs]
        assert [process.wait() for process in both] == [0, 0, 0]
        assert content(outs[0]) == content(outs[1])


# --- a network that is not finite is no result ---------------------------------------------------


def test_weights_that_are_not_finite_are_never_a_result(tmp_path):
    model = MMDiT(PRESETS["tiny"])
    settings, rows = opened("shapes")
    with torch.no_grad():
        model.final.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="averaged weights have diverged"):
        validation(model, rows, settings, "cpu", Ranks())
    with pytest.raises(FloatingPointError, match="not finite are not written"):
        save_model(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


# --- kills, and what vanishes --------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_moments():
    kills.main(["--kills", "3", "--each", "3"])


def test_a_chunk_that_vanishes_ends_in_a_line(home, tmp_path, capsys):
    data = shutil.copytree(home / "data", tmp_path / "data")
    how = [*QUICK["mnist"].split(), "--data", data, "--out", tmp_path / "run"]
    for chunk in data.glob("chunks/*.arrow"):
        chunk.unlink()
    assert ".arrow is broken" in refused(train_mnist.main, capsys, *how)


def test_a_folder_that_may_not_be_written(home, tmp_path, capsys, monkeypatch):
    """Of root's processes nothing is kept away: the system call is made to fail instead."""

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    for name, (main, given) in {n: w(home, tmp_path / n) for n, w in WRITERS.items()}.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", denied)
            said = refused(main, capsys, *given)
        assert "Permission denied" in said and "could not be written" in said, name
