"""experiments/reflow.py on a small network: stages, solvers, going on."""

import math
import os
import shutil
import signal
from itertools import product

import pandas as pd
import pytest
import torch
from helpers import DIGITS, call, close, exported, refused

import rf
import train_mnist
from common.pipeline import Pipeline
from experiments import digit_score, reflow
from inputs import digits

QUICK = ["--number", 90, "--steps", 3, "--samples", 20, "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    few = digits.glyphs(100, seed=0), digits.glyphs(40, seed=1)
    monkeypatch.setattr(digit_score, "load_images", lambda name, data_dir: few)
    monkeypatch.setattr(reflow, "EVALUATIONS", (1, 4))
    monkeypatch.chdir(tmp_path)  # the readers are kept below it
    return exported(tmp_path / "run", DIGITS | {"size": 28, "preset": "digits-narrow"})


def reflowed(run, *options):
    """The table that it writes."""
    call(reflow.main, run, *QUICK, *options)
    file = "ablate.csv" if "--ablate" in options else "reflow.csv"
    return pd.read_csv(run / "reflow" / file)


def test_all_stages_are_made_scored_and_kept(run):
    def kept():
        """When the chunks of pairs were made, and the weights of the run and its stages."""
        made = {file: file.stat().st_mtime_ns for file in run.rglob("0*.safetensors")}
        return made, {file: file.read_bytes() for file in run.rglob("model.safetensors")}

    student = ("--student", "digits-narrow")
    table = reflowed(run, *student)
    fixed = table[table.solver != "rk45"][["stage", "solver", "steps", "passes"]]
    solvers = [("euler", 1, 1), ("euler", 4, 4), ("heun", 2, 3), ("rf_solver", 2, 4)]
    assert [*fixed.itertuples(index=False, name=None)] == [
        *[("first", *how, 2 * passes) for *how, passes in solvers],  # guided
        *[("second", *row) for row in solvers],
        ("distilled", "euler", 1, 1),
        *[("student", *row) for row in solvers],
    ]
    assert (table.frechet > 0).all() and table.straightness.isna().sum() == 1
    for name in ("reflow.png", "strip.png"):
        assert (run / "reflow" / name).stat().st_size > 1000
    state = train_mnist.load(run / "reflow" / "student" / "checkpoint.pt", "cpu")
    assert state["step"] == 2 * 3 and state["settings"]["anneal"] == 0.3
    assert not state["settings"].get("init")
    before = kept()
    assert [*map(len, before)] == [2, 4]
    pd.testing.assert_frame_equal(reflowed(run, *student), table)
    assert kept() == before


def test_a_stage_that_was_stopped_goes_on(run, monkeypatch, capsys):
    original, folder = train_mnist.train_step, run / "reflow"

    def interrupted(model, adamw, rows, settings, step, generator):
        if step == 1 and settings.out.name == "second":
            os.kill(os.getpid(), signal.SIGINT)
        return original(model, adamw, rows, settings, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(train_mnist, "train_step", interrupted)
        assert "interrupted" in refused(reflow.main, capsys, run, *QUICK)
    assert train_mnist.load(folder / "second" / "checkpoint.pt", "cpu")["step"] == 2
    assert not (folder / "pairs2").exists()  # no later stage begins with half a network
    weights = []
    for options in ((), ("--overwrite",)):
        reflowed(run, *options)
        weights.append((folder / "second" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    older = run / "reflow.old" / "second" / "model.safetensors"
    assert older.read_bytes() == weights[0]
    with pytest.raises(SystemExit):
        reflowed(run, "--time", "uniform")
    said = capsys.readouterr().err
    assert "second has --steps 3 --time u_shaped, not 3 and uniform: begin anew with" in said


def test_a_folder_of_others_is_left_alone(run, tmp_path, capsys):
    mine = tmp_path / "other" / "reflow" / "mine.txt"
    shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("reflow*"))
    mine.parent.mkdir()
    mine.write_text("mine")
    for options in ((), ("--overwrite",)):
        line = refused(reflow.main, capsys, tmp_path / "other", *QUICK, *options)
        assert "holds other files" in line and mine.read_text() == "mine"


def test_the_ablation_has_a_row_a_seed(run, capsys):
    table = reflowed(run, "--ablate", 0, 1, "--ablate-steps", 2)
    rows = product(("uniform", "u_shaped"), rf.LOSSES, (0, 1))
    assert [*zip(table.time, table.loss, table.seed, strict=True)] == [*rows]
    assert "std" in capsys.readouterr().out


def test_rk45_is_the_flow_of_a_known_field(run):
    """dx/dt = −x from t = 1 to 0 multiplies by e; the evaluations are counted."""
    pytest.importorskip("scipy")
    pipeline = Pipeline.open(run)
    pipeline.model, pipeline.facts["cfg"] = lambda x, t, text: -x, 1
    noise = torch.randn(4, 1, 2, 2)
    x, steps, evaluations = reflow.rk45(pipeline, [*"0123"], noise)
    close(x, math.e * noise, rtol=5e-3)
    assert evaluations >= 6 * steps


def test_a_missing_run_ends_in_one_line(tmp_path, capsys):
    line = refused(reflow.main, capsys, tmp_path / "nowhere", "--device", "cpu")
    assert line.endswith("nowhere holds no weights: train it first, or give another run")
