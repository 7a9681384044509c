"""experiments/reflow.py, edit.py, few_steps.py on small networks: stages, solvers, going on."""

import csv
import math
import os
import signal

import edit
import few_steps
import pytest
import reflow
import torch
from test_pairs import DIGITS, DIGITS_RUN, SHAPES_RUN, run_of
from test_train_mnist import checkpoint, few_glyphs, small  # noqa: F401

import rf
import train_mnist
from mmdit import PRESETS
from pairs import Maker


@pytest.fixture
def run(tmp_path, monkeypatch):
    for module in (reflow, edit):
        monkeypatch.setattr(module, "load_images", few_glyphs)
    monkeypatch.setattr(reflow, "EVALUATIONS", (1, 4))
    return run_of(tmp_path / "run", DIGITS, DIGITS_RUN | {"seed": 0})


def options(run, tmp_path, *more):
    told = [run, "--number", 12, "--steps", 3, "--samples", 20, "--cache", tmp_path / "readers"]
    return [str(x) for x in (*told, "--device", "cpu", *more)]


@pytest.fixture
def small_batches(monkeypatch):
    parser = train_mnist.build_parser

    def built():
        made = parser()
        made.set_defaults(batch_size=4)
        return made

    monkeypatch.setattr(train_mnist, "build_parser", built)


def test_all_stages_are_made_scored_and_kept(tmp_path, run, small_batches, capsys):
    rows = reflow.main(options(run, tmp_path))
    guided, plain = (
        [("euler", 1, f), ("euler", 4, 4 * f), ("heun", 2, 3 * f), ("rf_solver", 2, 4 * f)]
        for f in (2, 1)
    )
    assert [row[:4] for row in rows if row[1] != "rk45"] == [
        *[("first", *row) for row in guided], *[("second", *row) for row in plain],
        ("distilled", "euler", 1, 1),
    ]  # fmt: skip
    with open(run / "reflow" / "reflow.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for name in ("reflow.png", "strip.png"):
        assert (run / "reflow" / name).stat().st_size > 1000
    there = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    assert len(there) == 1 + 2 + 2  # the run, its stages, and a shard of pairs for each
    again = reflow.main(options(run, tmp_path))
    assert again == rows and "3 steps" not in capsys.readouterr().out.split("reflow.csv", 1)[1]
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == there


def test_a_stage_that_was_stopped_goes_on(tmp_path, run, small_batches, monkeypatch):
    folder = run / "reflow"
    told = reflow.build_parser().parse_args(options(run, tmp_path))
    folder.mkdir()
    reflow.make_pairs(told, run, folder / "pairs", 12)
    how = {"pairs": folder / "pairs", "init": run}
    reflow.train(told, folder / "whole", 6, **how)
    original = train_mnist.train_step

    def interrupted(state, *rest):
        original(state, *rest)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_mnist, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):  # no later stage begins with half a network
        reflow.train(told, folder / "parted", 6, **how)
    assert checkpoint(folder / "parted")["step"] == 3
    monkeypatch.setattr(train_mnist, "train_step", original)
    reflow.train(told, folder / "parted", 6, **how)
    a, b = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "parted"))
    assert a == b
    with pytest.raises(ValueError, match=r"was begun otherwise \(steps 6 there, 5 here\): add"):
        reflow.train(told, folder / "whole", 5, **how)


def test_the_ablation_has_a_row_a_seed(tmp_path, run, small_batches):
    rows = reflow.main(options(run, tmp_path, "--ablate", 0, 1, "--ablate-steps", 2))
    assert [row[:3] for row in rows] == [
        (time, loss, seed) for time in ("uniform", "u_shaped") for loss in rf.LOSSES
        for seed in (0, 1)
    ]  # fmt: skip
    assert (run / "reflow" / "ablate.csv").read_text().count("\n") == 9


def test_rk45_is_the_flow_of_a_known_field():
    """dx/dt = −x from t = 1 to 0 multiplies by e; the evaluations are counted."""
    pytest.importorskip("scipy")
    walker = reflow.Walker(lambda x, t, text: -x, torch.zeros(1, 1, 3), cfg=1.0, shift=1.0)
    x = torch.randn(4, 1, 2, 2)
    end, evaluations = walker.rk45(x, torch.zeros(4, 1, 3))
    assert torch.allclose(end, math.e * x, rtol=5e-3) and evaluations >= 8


@pytest.mark.parametrize("bad, message", [
    (["--samples", "1"], "--samples 1 must be at least 2"),
])  # fmt: skip
def test_bad_options_end_in_one_line(tmp_path, run, bad, message):
    with pytest.raises(SystemExit, match=message):
        reflow.main(options(run, tmp_path, *bad))
    with pytest.raises(SystemExit, match=r"holds no finished run: python train_mnist.py"):
        reflow.main(options(tmp_path / "nowhere", tmp_path))


# --- edit.py -------------------------------------------------------------------------------------


def test_there_and_back_has_the_solvers_order():
    """On v = t·x, there and back: the leading error of an even order cancels, so the midpoint's
    falls with the third power; Heun's last step is Euler's."""
    maker = Maker(
        lambda x, t, text: t.view(-1, 1, 1, 1) * x, (1, 2, 2), "labels", None, None, None,
        {"shift": 1.0}, None,
    )  # fmt: skip
    data = torch.rand(5, 1, 2, 2, dtype=torch.float64) + 0.5
    rows = edit.errors(maker, data, data)
    for solver, order in {"euler": 1, "heun": 2, "rf_solver": 3}.items():
        slopes = [row[4] for row in rows if row[0] == solver][1:]
        assert slopes == pytest.approx([-order] * len(slopes), abs=0.35), solver
    by = {(row[0], row[2]): row[3] for row in rows}
    assert all(by["rf_solver", n] < by["euler", n] for n in edit.EVALUATIONS)


def test_edit_of_digits_writes_table_plot_and_strip(tmp_path, run, monkeypatch):
    monkeypatch.setattr(edit, "EVALUATIONS", (2, 4))
    rows = edit.main([str(run), "--number", "3", "--device", "cpu"])
    assert [(row[0], row[1]) for row in rows] == [
        (solver, n // (1 if solver == "euler" else 2)) for solver in rf.SOLVERS for n in (2, 4)
    ]
    for name in ("edit.csv", "edit.png", "strip.png"):
        assert (run / "edit" / name).stat().st_size > 50


def test_edit_of_shapes_changes_one_colour(tmp_path, monkeypatch):
    pictures, captions, edited = edit.real_shapes(SHAPES_RUN | {"seed": 0}, 12)
    assert pictures.shape == (12, 3, 20, 20)
    for before, after in zip(captions, edited, strict=True):
        differs = [(a, b) for a, b in zip(before.split(), after.split(), strict=True) if a != b]
        assert len(differs) == 1 and set(differs[0]) <= set(edit.shapes.COLORS)
    monkeypatch.setattr(edit, "EVALUATIONS", (2,))
    run = run_of(tmp_path / "run", PRESETS["tiny"], SHAPES_RUN | {"seed": 0})
    edit.main([str(run), "--number", "2", "--device", "cpu"])
    assert (run / "edit" / "strip.png").exists()


def test_pairs_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match="holds no weights"):
        edit.main([str(tmp_path)])


# --- few_steps.py --------------------------------------------------------------------------------


def test_few_steps_scores_guided_and_unguided_runs(tmp_path):
    first = run_of(tmp_path / "first", PRESETS["tiny"], SHAPES_RUN)
    other = run_of(tmp_path / "other", PRESETS["tiny"], SHAPES_RUN | {"cfg": 1.0})
    rows = few_steps.main(
        [str(first), str(other), "--steps", "1", "2", "--per-tag", "1", "--device", "cpu"]
    )
    assert [row[:4] for row in rows] == [
        ("first", 3.0, 20, 40), ("first", 3.0, 1, 2), ("first", 3.0, 2, 4),
        ("other", 1.0, 1, 1), ("other", 1.0, 2, 2),
    ]  # fmt: skip
    with open(other / "few_steps.csv") as file:
        found = list(csv.DictReader(file))
    for row, line in zip(rows, found, strict=True):
        tags = [float(line[tag]) for tag in few_steps.shapes.TAGS]
        assert float(line["mean"]) == pytest.approx(sum(tags) / 6) == row[-1]
    assert (other / "few_steps.png").stat().st_size > 1000


def test_a_run_that_is_not_of_shapes_is_refused(tmp_path):
    run = run_of(tmp_path / "run", PRESETS["tiny"], SHAPES_RUN | {"data": ["x"]})
    with pytest.raises(SystemExit, match="is not of shapes in pixels"):
        edit.main([str(run), "--device", "cpu"])
    first = run_of(tmp_path / "first", PRESETS["tiny"], SHAPES_RUN)
    other = run_of(tmp_path / "other", PRESETS["tiny"], SHAPES_RUN | {"shapes": 5})
    with pytest.raises(SystemExit, match="live in different worlds"):
        few_steps.main([str(first), str(other), "--device", "cpu"])
    with pytest.raises(SystemExit, match="was not trained on shapes: there is nothing to score"):
        few_steps.main([str(run), "--device", "cpu"])
