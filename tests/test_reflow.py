"""experiments/reflow.py on a small network: stages, solvers, going on."""

import math
import os
import signal

import pandas as pd
import pytest
import torch
from helpers import DIGITS, call, exported, refused

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


def tuples(table, *columns):
    return list(table[[*columns]].itertuples(index=False, name=None))


def files(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(pattern))}


def test_all_stages_are_made_scored_and_kept(run):
    student = ("--student", "digits-narrow")
    table = reflowed(run, *student)
    guided, plain = (
        [("euler", 1, f), ("euler", 4, 4 * f), ("heun", 2, 3 * f), ("rf_solver", 2, 4 * f)]
        for f in (2, 1)
    )
    fixed = table[table.solver != "rk45"]
    assert list(
        fixed[["stage", "solver", "steps", "passes"]].itertuples(index=False, name=None)
    ) == [
        *[("first", *row) for row in guided],
        *[("second", *row) for row in plain],
        ("distilled", "euler", 1, 1),
        *[("student", *row) for row in plain],
    ]
    assert (table.frechet > 0).all() and table.straightness.isna().sum() == 1
    for name in ("reflow.png", "strip.png"):
        assert (run / "reflow" / name).stat().st_size > 1000
    made, weights = files(run, "0*.safetensors"), list(files(run, "model.safetensors"))
    before = [path.read_bytes() for path in weights]
    assert len(made) == 2 and len(weights) == 4  # chunks of pairs; the run and its stages
    state = train_mnist.load(run / "reflow" / "student" / "checkpoint.pt", "cpu")
    assert state["step"] == 2 * 3 and state["settings"]["anneal"] == 0.3
    assert not state["settings"].get("init")
    again = reflowed(run, *student)
    pd.testing.assert_frame_equal(again, table)
    assert files(run, "0*.safetensors") == made
    assert [path.read_bytes() for path in weights] == before


def test_a_stage_that_was_stopped_goes_on(run, monkeypatch, capsys):
    original = train_mnist.train_step

    def interrupted(model, adamw, rows, settings, step, generator):
        if step == 1 and settings.out.name == "second":
            os.kill(os.getpid(), signal.SIGINT)
        return original(model, adamw, rows, settings, step, generator)

    monkeypatch.setattr(train_mnist, "train_step", interrupted)
    line = refused(reflow.main, capsys, run, *QUICK)
    assert "interrupted" in line
    folder = run / "reflow"
    assert train_mnist.load(folder / "second" / "checkpoint.pt", "cpu")["step"] == 2
    assert not (folder / "pairs2").exists()  # no later stage begins with half a network
    monkeypatch.setattr(train_mnist, "train_step", original)
    reflowed(run)
    parted = (folder / "second" / "model.safetensors").read_bytes()
    reflowed(run, "--overwrite")
    assert parted == (folder / "second" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        reflowed(run, "--time", "uniform")
    assert "--time uniform differs from the run to resume, which has u_shaped" in (
        capsys.readouterr().err
    )


def test_the_ablation_has_a_row_a_seed(run, capsys):
    table = reflowed(run, "--ablate", 0, 1, "--ablate-steps", 2)
    assert tuples(table, "time", "loss", "seed") == [
        (time, loss, seed)
        for time in ("uniform", "u_shaped")
        for loss in rf.LOSSES
        for seed in (0, 1)
    ]
    assert "std" in capsys.readouterr().out


def test_rk45_is_the_flow_of_a_known_field(run):
    """dx/dt = −x from t = 1 to 0 multiplies by e; the evaluations are counted."""
    pytest.importorskip("scipy")
    pipeline = Pipeline.open(run)
    pipeline.model, pipeline.facts["cfg"] = lambda x, t, text: -x, 1
    noise = torch.randn(4, 1, 2, 2)
    x, steps, evaluations = reflow.rk45(pipeline, ["0", "1", "2", "3"], noise)
    assert torch.allclose(x, math.e * noise, rtol=5e-3) and evaluations >= 6 * steps


def test_bad_options_end_in_one_line(run, tmp_path, capsys):
    line = refused(reflow.main, capsys, run, "--samples", 1)
    assert line == "experiments.reflow: --samples 1 must be at least 2"
    line = refused(reflow.main, capsys, tmp_path / "nowhere", "--device", "cpu")
    assert line.endswith("nowhere holds no weights: train it first, or give another run")
