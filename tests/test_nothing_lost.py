"""What was there before a command that fails, or is killed, is there afterwards, byte for byte."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, full_disk, opened, refused, t2i
from PIL import Image
from test_digits import write_mnist
from test_pairs import make
from test_prepare import pictures
from test_prepare import run as prepared

import sample_t2i
import train_mnist
from common import log, start
from common.evaluate import Ranks, validation
from common.pictures import progress, strip
from common.pipeline import Pipeline
from inputs.rows import open_rows
from inputs.stored import PairsFolder
from mmdit import PRESETS, MMDiT, save_model
from tools import dedup, enhance, geneval, pairs, prepare

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
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "out_pictures"}


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


def test_two_processes_that_begin_together_do_not_own_one_folder(tmp_path, monkeypatch):
    """The other one marks the folder between this one's mark and its lock."""
    lock = start.fcntl.flock

    def late(file, how):
        start.write_whole(tmp_path / "run" / start.MARK, b"train_mnist.py\n")
        lock(file, how)

    with start.owned(tmp_path / "run", "train_mnist.py"):
        mark = (tmp_path / "run" / start.MARK).stat()
        start.mark(tmp_path / "run", "train_mnist.py")  # the file that is locked stays
        assert os.path.samestat(mark, (tmp_path / "run" / start.MARK).stat())
    monkeypatch.setattr(start.fcntl, "flock", late)
    ours = start.owned(tmp_path / "run", "train_mnist.py")
    with pytest.raises(ValueError, match="has just been changed by another process"), ours:
        pass


def test_the_first_writer_wins(tmp_path):
    for content in (b"1", b"2"):
        start.write_new(tmp_path / "new", content)
    assert (tmp_path / "new").read_bytes() == b"1"
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_a_refused_run_leaves_the_stage_of_the_running_one(home, tmp_path, capsys, monkeypatch):
    """Two runs have two folders there, also if both are called `run`."""
    name = f"t2i-{zlib.crc32(os.path.realpath(tmp_path / 'run').encode()):08x}"
    monkeypatch.chdir(tmp_path)
    how = [*QUICK["t2i"].split(), "--data", home / "data", "--stage", "stage", "--out", "run"]
    with start.owned(tmp_path / "stage" / name, "train_t2i.py --stage"):
        (tmp_path / "stage" / name / "0.arrow").touch()
        before = content(tmp_path)
        said = refused(t2i, capsys, *how)
        assert "--stage" in said and "is in use by another process" in said
        assert content(tmp_path) == before


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
    """In a process of its own: it forks, and this one has threads."""
    command = [sys.executable, ROOT / "tests/kills.py", "--kills", "2", "--each", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing was lost" in done.stdout, done.stderr[-2000:]


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


# --- what two attacks found ----------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_without_a_checkpoint_are_a_run(home, tmp_path, capsys, trainer):
    out = shutil.copytree(home / trainer, tmp_path / "run")
    for path in (out / "checkpoint.pt", out / "checkpoints"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before, given = content(out), options(trainer, home, out)
    assert "already holds a run" in refused(TRAINERS[trainer], capsys, *given)
    said = refused(TRAINERS[trainer], capsys, *given, "--resume")
    assert "begin anew with --overwrite" in said and content(out) == before
    call(TRAINERS[trainer], *given, "--overwrite")
    assert content(tmp_path / "run.old") == before


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_run_that_another_starts_from_is_not_replaced(home, tmp_path, capsys, trainer):
    first = shutil.copytree(home / trainer, tmp_path / "run.old")
    before = content(first)
    given = options(trainer, home, tmp_path / "run", "--init", first, "--overwrite")
    assert "is replaced: choose another --out" in refused(TRAINERS[trainer], capsys, *given)
    assert content(first) == before


def test_whose_folder_it_is(home, tmp_path, capsys):
    """Also by another name; and what is hidden in a folder stays."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.csv").write_text("thesis")
    given = options("mnist", home, tmp_path / "mine" / "new" / "..")
    assert "holds other files" in refused(train_mnist.main, capsys, *given)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".notes.2024").write_text("mine")
    call(train_mnist.main, *options("mnist", home, tmp_path / "hidden"))
    assert (tmp_path / "hidden" / ".notes.2024").read_text() == "mine"
    for name in ("samples", "eval"):
        how = [home / "mnist", 3, "--out", home / "mnist" / f"{name}.png"]
        assert "has files of this name" in refused(sample_t2i.main, capsys, *how)


def test_a_picture_that_is_not_finite_is_none(home):
    pipeline = Pipeline.open(home / "first")
    with pytest.raises(FloatingPointError, match="a picture is not finite"):
        pipeline.draw(["1"], torch.full((1, 1, 14, 14), torch.nan))
    for captions in ("1", ["1"] * 3):
        with pytest.raises(ValueError, match="1 noises need as many captions, in a list"):
            pipeline.draw(captions, torch.zeros(1, 1, 14, 14))
    with pytest.raises(TypeError, match="not step"):
        pipeline.draw(["1"], torch.zeros(1, 1, 14, 14), step=5)


def test_strips_that_do_not_fit_end_no_run(tmp_path):
    for seen, columns in ((8, 6), (16, 12), (24, 12)):
        strip(torch.zeros(columns, 3, 4, 4, dtype=torch.uint8), tmp_path / f"{seen:012d}.png")
    (tmp_path / f"{12:012d}.png").write_bytes(b"no picture")
    (tmp_path / "1 copy.png").write_bytes(b"")
    progress(tmp_path, ["a"] * 12, tmp_path / "progress.png")
    assert (tmp_path / "progress.png").stat().st_size > 1000


def test_prepare_reads_what_it_was_given_alone(tmp_path, capsys):
    """Names with signs of a pattern; images that have not 8 bits; labels without a place."""
    for name, said in (("x[1]", "right"), ("x1", "wrong")):
        folder = pictures(tmp_path / name, 6)
        lines = (folder / "metadata.jsonl").read_text().replace("number", said)
        (folder / "metadata.jsonl").write_text(lines)
    Image.fromarray(np.arange(2500, dtype=np.uint16).reshape(50, 50)).save(tmp_path / "x[1]/0.png")
    how = ["--size", 16, "--bad-limit", 1]
    call(prepare.main, tmp_path / "x[1]", "--out", tmp_path / "data", *how)
    chunk = json.loads((tmp_path / "data/chunks/00000.json").read_text())
    assert [row["reason"] for row in chunk["left_out"]] == ["image of mode I;16, must have 8 bits"]
    rows = open_rows([str(tmp_path / "data")]).sources[0]
    assert all(caption.startswith("right") for caption in rows.captions(np.arange(5)))
    how = [tmp_path / "x1", "--out", tmp_path / "new", "--label-template", "photo"]
    assert "must hold {} or {a}" in refused(prepare.main, capsys, *how)


def test_a_chunk_that_was_deleted_is_made_again(home, tmp_path, capsys):
    out = tmp_path / "data"
    how = [home / "source", "--out", out, "--size", 16, "--chunk-rows", 6]
    call(prepare.main, *how)
    before = content(out)
    for file in (out / "chunks").glob("00001.*"):
        file.unlink()
    call(prepare.main, *how)
    assert content(out) == before
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("prepare.json", "manifest.json"):  # it was killed while it wrote them
        (out / "manifest.json").unlink(missing_ok=True)
        for folder, owner in ((out, ended.pid), (out / "chunks", ended.pid), (out, os.getppid())):
            (folder / f".{name}.{owner}.part").write_bytes(b"half")
        call(prepare.main, *how)
        # a process that is there may still write it
        (out / f".{name}.{os.getppid()}.part").unlink()
        assert content(out) == before
    (out / "prepare.json").unlink()
    assert "has chunks, but no prepare.json" in refused(prepare.main, capsys, *how)


def test_no_tool_writes_over_what_it_reads(home, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ring")
    for main, given in (
        (dedup.main, [home / "source", "--out", home / "source/0.png"]),
        (dedup.main, [home / "source", "--out", tmp_path / "no" / "x.parquet"]),
        (enhance.main, [prompts, "--model", "x", "--out", prompts]),
        (enhance.main, [home / "prompts.jsonl", "--model", "x", "--out", prompts]),
    ):
        before = content(home / "source")
        assert "--out" in refused(main, capsys, *given)
        assert content(home / "source") == before and prompts.read_text() == "a ring"


# --- files of two folders never mix --------------------------------------------------------------


def test_chunks_of_other_rows_are_refused(home, tmp_path):
    """Of the same sizes, under their own number or another's."""
    other = tmp_path / "other"
    prepared(pictures(tmp_path / "source", 12), other, "--chunk-rows", 6)
    data = shutil.copytree(home / "data", tmp_path / "data")
    second = data / "chunks" / "00001.arrow"
    for chunk in (other / "chunks" / second.name, second.with_name("00000.arrow")):
        shutil.copy(chunk, second)
        _, rows = opened(data)
        with pytest.raises(ValueError, match=r"00001.arrow is broken .*(not those|rows, the mani)"):
            rows.at(range(8))
    exported(tmp_path / "second", DIGITS | {"samples": 81})
    other = make(tmp_path / "second", tmp_path / "other pairs")
    data = shutil.copytree(home / "pairs", tmp_path / "pairs")
    for chunk in (other / "00001.safetensors", data / "00000.safetensors"):
        shutil.copy(chunk, data / "00001.safetensors")
        with pytest.raises(ValueError, match=r"00001.safetensors is broken .* is of other pairs"):
            PairsFolder(str(data)).chunk(1)
    (data / "pairs.json").unlink()
    with pytest.raises(SystemExit):
        make(home / "first", data)


def test_shards_of_another_checkpoint_are_refused(home, tmp_path, capsys):
    call(t2i, *options("t2i", home, tmp_path / "other", "--seed", 1, "--samples", 16))
    out = shutil.copytree(home / "t2i", tmp_path / "run")
    (path,), (other,) = (
        sorted((run / "checkpoints").glob("0*")) for run in (out, tmp_path / "other")
    )
    (shard,) = path.glob("zero_pp_rank_*")
    kept = shard.read_bytes()
    shutil.copy(other / shard.name, shard)
    for main, how in ((t2i, ["--resume"]), (sample_t2i.main, [out, "1", "--ema", 0.1])):
        given = [*how, "--out", out] if main is t2i else [*how, "--out", tmp_path / "x.png"]
        assert f"{shard.name} is of another checkpoint" in refused(main, capsys, *given)
    shard.write_bytes(kept)
    mixed = shutil.copytree(other, path.with_name(other.name))
    with pytest.raises(ValueError, match="is of another run than those beside it"):
        Pipeline.open(out, ema=0.07)
    shutil.rmtree(mixed)
    Pipeline.open(shutil.copytree(path, tmp_path / "best"), ema=0.07)
    path.rename(path.with_name("000000000099"))
    assert "holds the run.json of 8 samples" in refused(t2i, capsys, "--resume", "--out", out)


def test_data_inside_the_run_and_files_beside_a_picture_stay(home, tmp_path, capsys):
    out = shutil.copytree(home / "mnist", tmp_path / "run")
    shutil.copytree(home / "MNIST", out / "MNIST")
    line = refused(train_mnist.main, capsys, *options("mnist", out, out, "--overwrite"))
    assert "lies in --out, which is replaced" in line and (out / "MNIST").exists()
    (tmp_path / "mine.gif").write_bytes(b"mine")
    drawn = [home / "first", "1", "--gif", "--steps", 1, "--out", tmp_path / "mine.png"]
    assert "mine.gif would be overwritten" in refused(sample_t2i.main, capsys, *drawn)
    assert (tmp_path / "mine.gif").read_bytes() == b"mine"
    (tmp_path / "mine.csv").write_bytes(b"a,b")
    scored = [exported(tmp_path / "shapes", SHAPES), "--score", "--out", tmp_path / "mine.png"]
    assert "mine.csv would be overwritten" in refused(sample_t2i.main, capsys, *scored)
    assert (tmp_path / "mine.csv").read_bytes() == b"a,b"


def test_a_table_that_is_cut_is_not_gone_on_with(tmp_path):
    path = tmp_path / "log.csv"
    log.append_row(path, {"a": 1, "b": 2})
    log.append_row(path, {"a": 3, "b": 4})
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]
    for row, text in (({"a": 1}, path.read_text()), ({"a": 1, "b": 2}, "a,b\n1,")):
        path.write_text(text)
        with pytest.raises(ValueError, match="is cut, or holds other columns: move it away"):
            log.append_row(path, row)
