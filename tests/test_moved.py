"""Folders that move, change or are linked while a program works; names that only look like ours."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, records, refused, t2i
from test_digits import write_mnist
from test_nothing_lost import content
from test_pairs import make
from test_prepare import captions, picture
from test_prepare import run as prepared

import rf
import sample_t2i
import train_mnist
import train_t2i
from common import log, start
from common.pictures import png_path
from common.pipeline import Pipeline
from experiments import distill
from inputs.stored import PairsFolder
from tools import plan, prepare, show

SHORT = """--data mnist --preset digits-narrow --device cpu --batch-size 4 --warmup-steps 1
--sample-steps 1 --checkpoint-every 2"""
T2I = "--samples 8 --batch-size 4 --threads 1 --eval-prompts 1 --sample-steps 1"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Options of a short run of chapter 1, on twelve pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    return [*SHORT.split(), "--data-dir", folder]


@pytest.fixture
def train(short):
    return lambda out, *options: call(train_mnist.main, *short, "--out", out, *options)


# --- a folder that another process changes -------------------------------------------------------


def test_nothing_is_written_into_the_folder_that_took_the_name(tmp_path):
    """The run's folder is moved, and another one stands in its place; or nothing does."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    with start.owned(run, "train_mnist.py"):
        start.write_whole(run / "a", b"1")
        run.rename(kept)
        for there in (False, True):
            if there:
                run.mkdir()
            for write in (
                lambda: start.write_whole(run / "sub" / "a", b"2"),
                lambda: log.append_row(run / "log.csv", {"a": 1}),
                lambda: log.write_rows(run / "log.csv", [{"a": 1}]),
            ):
                with pytest.raises(OSError, match="has been moved or replaced"):
                    write()
        assert not any(run.iterdir())
        start.write_whole(tmp_path / "elsewhere", b"3")  # no other place is concerned
    start.write_whole(run / "a", b"4")


def test_a_checkpoint_is_not_written_over_that_of_another(tmp_path, capsys, monkeypatch):
    out, original = tmp_path / "run", train_t2i.train_step

    def moved(run, batches):
        if out.exists() and not (tmp_path / "kept").exists():
            out.rename(tmp_path / "kept")
            out.mkdir()
        original(run, batches)

    monkeypatch.setattr(train_t2i, "train_step", moved)
    assert "has been moved or replaced" in refused(t2i, capsys, *T2I.split(), "--out", out)
    assert not any(out.iterdir())


def test_a_link_is_followed_once(train, tmp_path, monkeypatch):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    train(link, "--steps", 2)
    assert not link.with_name("link.old").exists()
    for _ in range(2):  # what is replaced is where the link leads
        train(link, "--steps", 2, "--overwrite")
    assert link.is_symlink() and (tmp_path / "target.old").is_dir()
    monkeypatch.chdir(target)
    train(Path("."), "--steps", 2, "--overwrite")
    assert (target / "checkpoint.pt").exists()
    for given, expected in (("a/b", "a/b"), (".", Path.cwd()), ("a/..", Path.cwd())):
        assert start.real(Path(given)) == Path(expected)
    assert start.real(tmp_path) == tmp_path


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_a_run_that_another_process_made_meanwhile_is_left(
    short, train, tmp_path, capsys, monkeypatch, how
):
    """Between the look at the folder and its lock: the network is built, MNIST is downloaded."""
    out, build, inside = tmp_path / "run", train_mnist.build, []
    if how:
        train(out, "--steps", 2)

    def slow(*given):
        if not inside:
            inside.append(True)
            train(out, "--steps", 3, *(["--resume"] if how else []))
            inside.append(content(tmp_path))
        return build(*given)

    monkeypatch.setattr(train_mnist, "build", slow)
    line = refused(train_mnist.main, capsys, *short, "--steps", 2, "--out", out, *how)
    assert "has just been changed by another process" in line or "is less than the 3 steps" in line
    assert content(tmp_path) == inside[1]


def test_chapter_2_looks_again_when_the_folder_is_its_own(tmp_path, capsys, monkeypatch):
    out, run = tmp_path / "run", train_t2i.Run

    def slow(*given):
        out.mkdir()
        start.mark(out, "train_t2i.py")
        (out / "log.csv").write_text("another's")
        return run(*given)

    monkeypatch.setattr(train_t2i, "Run", slow)
    assert "changed by another process" in refused(t2i, capsys, *T2I.split(), "--out", out)
    assert (out / "log.csv").read_text() == "another's"


def test_a_run_inside_an_older_one_is_not_deleted_with_it(short, train, tmp_path, capsys):
    out = tmp_path / "run"
    train(out, "--steps", 2)
    train(out / "second", "--steps", 2)
    train(out, "--steps", 2, "--overwrite")
    before = content(tmp_path)
    line = refused(train_mnist.main, capsys, *short, "--steps", 2, "--overwrite", "--out", out)
    assert f"{tmp_path / 'run.old' / 'second'} would be deleted" in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_what_describes_others_never_stands_beside_what_it_does_not(tmp_path, monkeypatch, kind):
    files = {tmp_path / name: name.encode() for name in ("1.png", "2.png", "about.json")}
    start.write_all(files)
    replace, calls = os.replace, []

    def stopped(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise kind
        replace(old, new)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(kind):
        start.write_all(dict.fromkeys(files, b"new"))
    found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert found == {"1.png": b"new", "2.png": b"2.png"}  # nothing says what they are


def test_logs_without_weights_are_a_run(tmp_path, capsys):
    """As a copy of a run without its large files."""
    out = tmp_path / "run"
    call(t2i, *T2I.split(), "--out", out)
    shutil.rmtree(out / "checkpoints")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink(missing_ok=True)
    before = content(tmp_path)
    line = refused(t2i, capsys, *T2I.split(), "--out", out)
    assert "already holds a run" in line and content(tmp_path) == before
    call(t2i, *T2I.split(), "--out", out, "--overwrite")
    kept = {file.name for file in (tmp_path / "run.old").iterdir()}
    assert {"log.csv", "eval.csv"} <= kept and (out / "checkpoints").is_dir()


def test_only_files_of_ours_are_swept(tmp_path):
    ended = "999999999"  # no process has this number
    for name in (".notes.20240101", ".v.3999999", ".b.20240101120000", f".a.{ended}.part"):
        (tmp_path / name).write_text(name)
    (tmp_path / f".b.{os.getpid()}.part").write_text("under way")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / f".a.{ended}.part").write_text("a")
    start.sweep(tmp_path)
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {
        ".notes.20240101", ".v.3999999", ".b.20240101120000", f".b.{os.getpid()}.part"
    }  # fmt: skip


def test_a_log_that_somebody_wrote_into_is_whole_again(tmp_path):
    path = tmp_path / "log.csv"
    found = log.Log(path, 1)
    found.begin()
    for step in (1, 2, 3):
        found.add(torch.tensor(1.0 * step))
        found.end_step(step, step, torch.tensor(1.0), lr=0.1)
        with open(path, "a") as file:
            file.write("a note" if step == 2 else "")
    assert [row["loss"] for row in records(path)] == ["1.0", "2.0", "3.0"]


def test_weights_that_are_not_finite_are_not_exported(short, tmp_path, capsys):
    """The last step makes them, and its loss is from before."""
    how = ["--steps", 1, "--lr", 1e38, "--out", tmp_path / "run"]
    assert "is not finite" in refused(train_mnist.main, capsys, *short, *how)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_operators_that_do_not_compile_are_said_in_a_line(monkeypatch):
    import deepspeed

    def failed(**how):
        raise RuntimeError("Error building extension 'x'\n40 more lines")

    monkeypatch.setattr(deepspeed, "init_distributed", failed)
    with pytest.raises(ValueError, match=r"is g.. there. Error building extension 'x'$"):
        train_t2i.start_ranks()


def test_a_closed_stream_is_no_error(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    start.program("x")(lambda argv: print("said", flush=True))()
    with pytest.raises(SystemExit):
        start.program("x")(lambda argv: int("x"))()


def test_averages_are_kept_once():
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    rf.keep_averages(adamw, [0.05])
    with pytest.raises(ValueError, match=r"averages of widths \[0.05\] already"):
        rf.keep_averages(adamw, [0.1])


# --- sources and rows ----------------------------------------------------------------------------


def test_linked_folders_hold_images_too(tmp_path):
    source = tmp_path / "source"
    for i, folder in enumerate((source / "a", tmp_path / "elsewhere" / "deep")):
        folder.mkdir(parents=True)
        for k in range(3):
            picture(3 * i + k).save(folder / f"{k}.png")
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "back").symlink_to(source)  # a loop
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(".")
    manifest = prepared(source, tmp_path / "data", "--label", "label")
    assert manifest["rows"]["train"] + manifest["rows"]["validation"] == 6
    assert {c for (c,) in captions(tmp_path / "data").values()} == {
        "a photo of an a",
        "a photo of a deep",
    }


@pytest.mark.parametrize("length", [1, 6])
def test_a_file_that_was_replaced_at_the_same_time_is_read_anew(tmp_path, length):
    picture(0).save(tmp_path / "0.png")
    for text in ("first", "other"[:5] * length):
        table = tmp_path / "table.csv"
        table.write_text(f"file_name,text\n0.png,{text}\n")
        os.utime(table, (1e9, 1e9))
        prepared(table, tmp_path / text)
        assert captions(tmp_path / text) == {0: [text]}


def test_a_name_that_joins_file_systems(tmp_path, capsys):
    assert "'::' joins" in refused(prepare.main, capsys, "x", "--out", tmp_path / "a::b")


def test_row_numbers_of_any_whole_type(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    source = tmp_path / "source"
    source.mkdir()
    for i in range(300):
        picture(i).save(source / f"{i:03d}.png")
        (source / f"{i:03d}.txt").write_text("old")
    table = pa.table({"row": pa.array([3], pa.uint8()), "text": ["new"]})
    pa.parquet.write_table(table, tmp_path / "with.parquet")
    prepared(source, tmp_path / "data", "--with", tmp_path / "with.parquet")
    assert [n for n, c in captions(tmp_path / "data").items() if c == ["new"]] == [3]


def test_another_chunk_among_pairs_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # a bar that is off has no start
    out = make(exported(tmp_path / "run", DIGITS), tmp_path / "pairs", "--number", 20)
    (out / "00001.safetensors").unlink()
    make(tmp_path / "run", out, "--number", 20)
    (out / "00000 (copy).safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"move 00000 \(copy\).safetensors away"):
        PairsFolder(str(out))


def test_a_folder_with_a_space_is_found_again(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(12):
        picture(i, ((16, 16),)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"number {i}")
    data = tmp_path / "my set"
    prepared(source, data)
    how = [*SHORT.split()[2:], "--steps", 1, "--preset", "tiny"]
    call(train_mnist.main, *how, "--data", data, "--out", tmp_path / "run", "--sample-steps", 2)
    assert Pipeline.open(tmp_path / "run").facts["source"] == f"'{data}'"
    how = [tmp_path / "run", "--device", "cpu", "--pieces", 1, "--steps", 1, "--batch-size", 4]
    call(distill.main, *how, "--out", tmp_path / "student")
    assert Pipeline.open(tmp_path / "student").facts["source"] == f"'{data}'"


# --- pictures, the plan, students ----------------------------------------------------------------


def test_many_pictures_of_another_command_are_not_replaced(tmp_path, capsys, monkeypatch):
    how = [exported(tmp_path / "run", SHAPES), "--steps", 1, "--out", tmp_path / "a.png"]
    call(sample_t2i.main, *how, "a ring", "--images", 6)
    monkeypatch.setattr(sample_t2i, "MANY", 5)
    before = content(tmp_path)
    line = refused(sample_t2i.main, capsys, *how, "a square", "--images", 1)
    assert "holds pictures of another command" in line and content(tmp_path) == before
    monkeypatch.setattr(sample_t2i, "MANY", 6)
    call(sample_t2i.main, *how, "a square", "--images", 1)
    assert len(list((tmp_path / "a_pictures").glob("*.png"))) == 1


def test_a_picture_of_a_run_is_not_drawn_over(tmp_path, capsys):
    strip = start.mark(tmp_path / "run", "train_t2i.py").with_name("strips") / "000000000040.png"
    strip.parent.mkdir()
    call(show.main, "shapes", "--out", tmp_path / "a.png")
    strip.write_bytes((tmp_path / "a.png").read_bytes())
    line = refused(show.main, capsys, "shapes", "--out", strip)
    assert "is a picture of a run" in line
    png_path(tmp_path / "a.png")  # beside a run, and in its folder, ours may be drawn again
    png_path(tmp_path / "run" / "mine.png")


def test_what_does_not_fit_is_said(capsys):
    call(plan.main, "--preset", "tiny", "--vae", "pixels", "--size", 16, "--gib", 1e-9)
    assert "it does not fit: more than 85% of --gib 1e-09" in capsys.readouterr().out
    for option in ("--hfu", "--peak-tflops"):
        assert option in refused(plan.main, capsys, option, 1e-300)


def test_a_student_keeps_its_pieces(tmp_path, capsys):
    teacher = exported(tmp_path / "run", DIGITS | {"size": 28, "steps": 4})
    how = [teacher, "--device", "cpu", "--batch-size", 4]
    how += ["--out", tmp_path / "student"]
    call(distill.main, *how, "--pieces", 2, "--steps", 1)
    call(distill.main, *how, "--resume", "--steps", 2)
    assert Pipeline.open(tmp_path / "student").facts["steps"] == 2
    line = refused(distill.main, capsys, *how, "--resume", "--steps", 3, "--pieces", 1)
    assert "--pieces 1: the student" in line and "has 2, drop it" in line


def test_a_checkpoint_without_its_weights(tmp_path, capsys):
    out = tmp_path / "run"
    call(t2i, *T2I.split(), "--out", out)
    (out / "model.safetensors").unlink()
    (out / "config.json").unlink()
    next(out.glob("checkpoints/*/mp_rank_*")).unlink()
    line = refused(sample_t2i.main, capsys, out, "a ring", "--out", tmp_path / "a.png")
    assert "is damaged: it lacks its file mp_rank_*" in line


def test_a_run_that_left_nothing_does_not_take_the_place_of_an_older_one(tmp_path):
    """The first attempt is good, the second crashes, the third comes."""
    run, old = tmp_path / "run", tmp_path / "run.old"
    for name, folder in (("good", old), ("crashed", run)):
        start.mark(folder, "train_mnist.py")
        (folder / "log.csv").write_text(name)
    (old / "checkpoint.pt").write_text("good")
    start.move_away(run, "train_mnist.py")
    assert (old / "checkpoint.pt").read_text() == "good" and (run / "log.csv").exists()
    (run / "model.safetensors").write_text("better")
    start.move_away(run, "train_mnist.py")
    assert (old / "model.safetensors").exists() and not run.exists()


def test_a_teacher_that_draws_by_heun(tmp_path, capsys):
    teacher = exported(tmp_path / "run", DIGITS | {"size": 28, "steps": 4, "solver": "heun"})
    line = refused(distill.main, capsys, teacher, "--device", "cpu", "--out", tmp_path / "a")
    assert "draws with heun: must be euler or rf_solver" in line


def test_a_table_of_the_users_that_looks_like_a_score(tmp_path, capsys):
    run, table = exported(tmp_path / "run", SHAPES), tmp_path / "a.csv"
    table.write_text("name,run,steps,lr\n1,2,3,4\n")
    how = [run, "--score", "--per-tag", 1, "--steps", 1, "--out", tmp_path / "a.png"]
    assert "a.csv would be overwritten" in refused(sample_t2i.main, capsys, *how)
    table.unlink()
    for _ in range(2):  # ours is written anew
        call(sample_t2i.main, *how)
