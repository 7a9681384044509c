"""Files that were changed, exchanged, or are somebody else's: refused in a line, and left alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, full_disk, refused, t2i
from PIL import Image
from test_nothing_lost import content

import rf
import sample_t2i
from common import log, start
from common.pictures import png_path, strip
from common.pipeline import Pipeline, checkpoints, open_checkpoint
from experiments import (
    coordinate_check,
    digit_score,
    edit,
    lr_transfer,
    shape_scaling,
    throughput,
    toy2d,
)
from inputs import digits
from mmdit import load_model

# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("model.safetensors", b'"dtype":"F32"', b'"dtype":"I32"'),
        ("config.json", b'"predicts": "image"', b'"predicts": "velocity"'),
        ("config.json", b'"residual": "prenorm"', b'"residual": "auraflow"'),
    ],
)
def test_weights_belong_to_their_config(tmp_path, file, old, new):
    path = exported(tmp_path, DIGITS) / file
    load_model(tmp_path)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match="is damaged, weights and config"):
        load_model(tmp_path)


QUICK = """--seed 1 --samples 16 --batch-size 4 --eval-every-samples 16 --save-every-samples 8
--threads 1 --eval-prompts 1 --sample-steps 1 --warmup-samples 4 --cooldown-samples 4 --keep 9"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bound") / "run"
    call(t2i, *QUICK.split(), "--out", out)
    return out


@pytest.mark.parametrize("old, new", [('"shift": 2.0', '"shift": 9.0'), ('"seed": 1', '"seed": 2')])
def test_a_record_that_was_changed(run, tmp_path, capsys, old, new):
    copy = shutil.copytree(run, tmp_path / "run")
    file = checkpoints(copy / "checkpoints")[-1] / "run.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    line = refused(t2i, capsys, "--resume", "--out", copy, "--samples", 20)
    assert "run.json has been changed: move" in line


def test_the_network_of_another_checkpoint(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    first, last = checkpoints(copy / "checkpoints")
    name = "mp_rank_00_model_states.pt"
    shutil.copy(first / name, last / name)
    line = refused(t2i, capsys, "--resume", "--out", copy, "--samples", 20)
    assert "mp_rank_* is not of the run.json beside it" in line


def test_a_shard_under_the_name_of_another_rank(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    last = checkpoints(copy / "checkpoints")[-1]
    (shard,) = last.glob("*zero_pp_rank_0_*")
    shard.rename(shard.with_name(shard.name.replace("rank_0_", "rank_1_", 1)))
    with pytest.raises(ValueError, match="is of another checkpoint"):
        open_checkpoint(copy)


def test_an_elastic_checkpoint_is_refused(tmp_path, capsys):
    config = json.loads(Path("ds_config.json").read_text())
    config["zero_optimization"]["elastic_checkpoint"] = True
    (tmp_path / "ds.json").write_text(json.dumps(config))
    how = [*QUICK.split(), "--ds-config", tmp_path / "ds.json", "--out", tmp_path / "run"]
    assert '"elastic_checkpoint" is not supported here' in refused(t2i, capsys, *how)


def test_a_run_is_not_moved_over_one_that_is_in_use(tmp_path):
    for name in ("run", "run.old"):
        with start.owned(tmp_path / name, "train_mnist.py"):
            (tmp_path / name / "checkpoint.pt").write_text(name)
    before = content(tmp_path)
    with start.owned(tmp_path / "run.old", "train_mnist.py"):
        with pytest.raises(ValueError, match="in use by another process"):
            start.move_away(tmp_path / "run", "train_mnist.py")
        assert content(tmp_path) == before
    start.move_away(tmp_path / "run", "train_mnist.py")
    assert (tmp_path / "run.old" / "checkpoint.pt").read_text() == "run"


def test_a_reader_that_was_changed(tmp_path, monkeypatch):
    few = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: few(20, seed))
    training, _ = digits.load_images("glyphs", tmp_path)
    digit_score.reader_for(training, torch.arange(20), tmp_path, "cpu", 1)
    digit_score.reader_for(training, torch.arange(20), tmp_path, "cpu", 1)
    (file,) = tmp_path.glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 64
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"the reader .* is damaged: delete it"):
        digit_score.reader_for(training, torch.arange(20), tmp_path, "cpu", 1)


# --- pictures and tables -------------------------------------------------------------------------


def test_a_picture_of_the_users_is_not_replaced(tmp_path, capsys):
    exported(tmp_path / "run", SHAPES)
    how = [tmp_path / "run", "a red circle", "--steps", 1, "--out", tmp_path / "cat.png"]
    for name in ("cat.png", "cat.gif"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    before = content(tmp_path)
    assert "was not drawn here" in refused(sample_t2i.main, capsys, *how)
    (tmp_path / "cat.png").unlink()
    assert "cat.gif would be overwritten" in refused(sample_t2i.main, capsys, *how, "--gif")
    (tmp_path / "cat.gif").unlink()
    for _ in range(2):  # ours are
        call(sample_t2i.main, *how, "--gif")
    assert (
        content(tmp_path).items()
        >= {k: v for k, v in before.items() if k.parts[0] == "run"}.items()
    )
    strip(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "ours.png")
    png_path(tmp_path / "ours.png")


def test_a_full_disk_leaves_the_pictures_of_the_command_before(tmp_path, capsys):
    exported(tmp_path / "run", SHAPES | {"size": 240})
    how = [tmp_path / "run", "--steps", 1, "--out", tmp_path / "a.png", "--images", 2]
    call(sample_t2i.main, *how, "a red circle")
    before = content(tmp_path / "a_pictures")
    line = ""
    with full_disk(tmp_path / "run"):
        line = refused(sample_t2i.main, capsys, *how, "a blue ring")
    assert "could not be written" in line
    assert content(tmp_path / "a_pictures") == before


def test_a_table_is_written_whole(tmp_path):
    path = tmp_path / "run" / "log.csv"
    path.parent.mkdir()
    log.write_rows(path, [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    before = path.read_bytes()
    log.append_row(path, {"a": 5, "b": 6})
    assert path.read_bytes().startswith(before) and len(path.read_text().splitlines()) == 4
    with full_disk(tmp_path), pytest.raises(OSError, match="could not be written"):
        log.write_rows(path, [{"a": 10**200}] * 1000)
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize(
    "program, options",
    [
        (toy2d, ["--sets", "moons", "--steps", "2", "--out"]),
        (coordinate_check, ["--out"]),
        (lr_transfer, ["--steps", "1", "--out"]),
        (shape_scaling, ["--samples", "64", "--out"]),
        (throughput, ["data", "--out"]),
    ],
)
def test_an_experiment_needs_a_folder_of_its_own(tmp_path, capsys, program, options):
    (tmp_path / "moons.png").write_bytes(b"mine")
    line = refused(program.main, capsys, *options, tmp_path)
    assert "holds other files" in line
    assert content(tmp_path) == {Path("moons.png"): b"mine"}


def test_an_edit_leaves_a_folder_of_the_users(tmp_path, capsys):
    run = exported(tmp_path / "run", SHAPES)
    (run / "edit").mkdir()
    (run / "edit" / "edit.csv").write_text("mine")
    assert "holds other files" in refused(edit.main, capsys, run, "--device", "cpu")
    assert (run / "edit" / "edit.csv").read_text() == "mine"


def test_a_cut_table_of_lr_transfer(tmp_path):
    (tmp_path / "t.csv").write_text("width,loss\n32,1")
    with pytest.raises(ValueError, match=r"t.csv is cut: move it away"):
        lr_transfer.remembered(tmp_path / "t.csv", {"width": 32}, None, None)


# --- the library ---------------------------------------------------------------------------------


def test_shapes_that_would_be_stretched(tmp_path):
    x, text = torch.randn(4, 1, 4, 4), torch.zeros(4, 1, 2)

    def flat(x, t, text):
        return x.mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"cfg has shape \(4,\), must be \(B, 1, ...\)"):
        rf.guided_velocity(lambda x, t, text: x, x, x[:, 0, 0, 0], text, text, torch.ones(4))
    with pytest.raises(ValueError, match="must be equal"):
        rf.sample(flat, x, text, steps=1)
    for below in (float("nan"), 1.5, -1):
        with pytest.raises(ValueError, match="cfg_below"):
            rf.sample(lambda x, t, text: x, x, text, steps=1, cfg_below=below)
    pipeline = Pipeline.open(exported(tmp_path, SHAPES))
    assert pipeline.draw(["a ring"], pipeline.noise(0, [0]), cfg_below=0.5).shape[0] == 1
