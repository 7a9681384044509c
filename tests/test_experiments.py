"""The experiments on muP, the shape of networks, and editing, on small networks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import DIGITS, SHAPES, call, exported, records, refused
from PIL import Image

import rf
from experiments import coordinate_check, edit, lr_transfer, shape_scaling
from inputs import digits
from inputs.encoders import to_unit
from inputs.shapes import COLORS, World
from mmdit import PRESETS, Linear, MMDiT

# --- coordinate_check ----------------------------------------------------------------------------


def slopes(parametrization, residual="prenorm", double=0):
    table = pd.DataFrame(
        {"width": width} | row
        for width in coordinate_check.WIDTHS
        for seed in range(coordinate_check.SEEDS)
        for row in coordinate_check.measure(
            coordinate_check.shape(width, residual, double), parametrization, seed=seed
        )
    )
    last = table[table.step == 8].pivot_table("mean_abs", "width", "activation")
    return coordinate_check.slopes(last)


@pytest.mark.parametrize("double", [0, 2])
@pytest.mark.parametrize("residual", ["prenorm", "auraflow"])
def test_activations_keep_their_size_at_every_width(residual, double):
    found = slopes("mup", residual, double)
    assert found.abs().max() <= 0.1, found.sort_values()
    model = MMDiT(coordinate_check.shape(64, residual, double))
    assert set(found.index) > {n for n, m in model.named_modules() if isinstance(m, Linear)}
    assert {"single_blocks.0", *["double_blocks.0"] * (double > 0)} < set(found.index)


def test_the_check_sees_what_the_standard_parametrisation_does():
    assert slopes("standard").max() > 0.3


def test_the_check_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    for name, value in {"WIDTHS": (32, 64), "STEPS": (1, 2), "SEEDS": 1}.items():
        monkeypatch.setattr(coordinate_check, name, value)
    call(coordinate_check.main, "--lr", 0.01, "--double", 1, "--out", tmp_path)
    table = pd.read_csv(tmp_path / "coordinate_check.csv")
    config = coordinate_check.shape(64, double=1)
    measured = pd.DataFrame(coordinate_check.measure(config, "mup", lr=0.01))
    written = table[(table.parametrization == "mup") & (table.width == 64)]
    both = measured.merge(written, on=["step", "activation"])
    assert len(both) == len(measured) == len(table) / 4
    assert both.mean_abs_x.tolist() == pytest.approx(both.mean_abs_y.tolist())
    assert capsys.readouterr().out.count("worst slope") == 4
    assert (tmp_path / "coordinate_check.png").stat().st_size > 10_000


# --- lr_transfer ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few glyphs, wherever glyphs are loaded."""
    many = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed=0: many(min(n, 600), seed))


def told(program, **options):
    return program.Settings(**{"device": "cpu"} | options)


def test_digits_are_halved_inside_a_black_margin():
    data = lr_transfer.Data(told(lr_transfer))
    states, text, u, noise = data.rows.encode(data.held, "cpu")
    assert states.shape[1:] == (1, 1, 16, 16) and noise.shape[1:] == (1, 16, 16)
    images = torch.full((512, 1, 32, 32), -1.0)
    images[..., 2:30, 2:30] = to_unit(digits.glyphs(600, seed=1).images[:512])
    mean = images.view(512, 1, 16, 2, 16, 2).mean((3, 5))
    assert torch.allclose(states[:, 0], mean, atol=1e-6)
    assert text[:, 0].argmax(1).tolist() == digits.glyphs(600, seed=1).labels[:512].tolist()
    assert not data.held.dropped.any() and u.min() < 0.01 and u.max() > 0.99


@pytest.mark.parametrize("dataset", ["glyphs", "shapes"])
def test_a_grid_is_not_run_twice(tmp_path, monkeypatch, capsys, dataset):
    ran, train = [], lr_transfer.train

    def counted(config, data, **how):
        ran.append((how["parametrization"], config.dim, how["lr"], how["seed"]))
        return train(config, data, **how)

    monkeypatch.setattr(lr_transfer, "train", counted)
    options = ("--steps", 2, "--widths", 32, 64, "--rates", 0.004, 1e30, "--dataset", dataset)
    options += ("--out", tmp_path, "--device", "cpu")
    call(lr_transfer.main, *options)
    assert len(set(ran)) == len(ran) == 8
    first = records(tmp_path / f"lr_transfer_{dataset}.csv")
    printed = capsys.readouterr().out
    call(lr_transfer.main, *options)  # nothing is run, all of it is printed again
    assert len(ran) == 8 and capsys.readouterr().out == printed
    call(lr_transfer.main, *options, "--seeds", 2)
    assert len(ran) == 16 and {seed for *_, seed in ran[8:]} == {1}
    rows = records(tmp_path / f"lr_transfer_{dataset}.csv")
    assert rows[:8] == first and rows[8]["loss"] != rows[0]["loss"]
    assert {row["loss"] for row in rows if row["lr"] == "1e+30"} == {"inf"}  # it diverged
    losses = {(row["parametrization"], row["width"]): row["loss"] for row in first[::2]}
    assert losses["mup", "32"] == losses["standard", "32"]  # the first width is muP's base
    assert losses["mup", "64"] != losses["standard", "64"]
    line = next(line for line in printed.splitlines() if line.split()[:1] == ["64"])
    assert line.split()[1:] == [f"{float(losses['mup', '64']):.4g}", "inf", "0.004"]
    assert (tmp_path / f"lr_transfer_{dataset}.png").stat().st_size > 10_000


def test_training_helps():
    data = lr_transfer.Data(told(lr_transfer))
    config = replace(data.config, dim=32, base_dim=32)
    losses = [lr_transfer.train(config, data, lr=0.016, steps=n, seed=0) for n in (1, 30)]
    assert losses[1] < 0.8 * losses[0]


# --- shape_scaling -------------------------------------------------------------------------------


def test_searches_spend_equal_compute_and_the_law_predicts(tmp_path, monkeypatch, capsys):
    spent, law = [], lambda model: 0.1 + 3 * model.n_parameters() ** -0.25

    def counted(config, data, *, lr, steps, seed):
        spent.append(steps * shape_scaling.flops(config, data))
        return law(MMDiT(config)) + (seed - 0.5) / 100  # the mean over two seeds is the law

    monkeypatch.setattr(lr_transfer, "train", counted)
    options = ("--samples", 64_000, "--seeds", 2, "--out", tmp_path, "--device", "cpu")
    call(shape_scaling.main, *options, "--searches", "blocks", "aspect")
    assert len(spent) == 2 * (7 + 5) and max(spent) / min(spent) < 1.01
    call(shape_scaling.main, *options)
    assert len(spent) == 2 * (7 + 5 + 6)  # only the scaling runs were missing
    assert max(spent[24:]) / min(spent[24:]) > 10  # these have equal samples
    rows = records(tmp_path / "shape_scaling.csv")
    assert len(rows) == 36
    assert {row["steps"] for row in (rows[0], rows[14], *rows[24:])} == {"1000"}  # the first two
    large = MMDiT(replace(PRESETS["tiny"], dim=256, n_layers=4))
    assert int(rows[-1]["parameters"]) == large.n_parameters()
    printed = capsys.readouterr().out
    assert f"measured: {law(large):.4f}" in printed
    predicted = float(printed.split("parameters: ")[1].split()[0])
    assert predicted == pytest.approx(law(large), rel=2e-3)
    for name in ("blocks", "aspect", "scaling"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


# --- edit ----------------------------------------------------------------------------------------


def test_there_and_back_has_the_solvers_order():
    """On v = t·x, there and back: the leading error of an even order cancels, so the midpoint's
    falls with the third power; Heun's last step is Euler's."""
    data = torch.rand(5, 1, 2, 2, dtype=torch.float64) + 0.5
    table = edit.errors(lambda x, t, text: t.view(-1, 1, 1, 1) * x, data, data)
    for solver, order in {"euler": 1, "heun": 2, "rf_solver": 3}.items():
        found = table[table.solver == solver].slope
        assert np.isnan(found.iloc[0])
        assert found[1:].tolist() == pytest.approx([-order] * (len(found) - 1), abs=0.35), solver
    rmse = table.set_index(["solver", "evaluations"]).rmse
    assert (rmse["rf_solver"] < rmse["euler"]).all()


@pytest.mark.parametrize("facts", [DIGITS | {"size": 28}, SHAPES])
def test_an_edit_writes_table_plot_and_strip(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(edit, "EVALUATIONS", (2, 4))
    run = exported(tmp_path / "run", facts)
    call(edit.main, run, "--number", 3, "--device", "cpu")
    rows = records(run / "edit" / "edit.csv")
    assert [(row["solver"], row["steps"], row["evaluations"]) for row in rows] == [
        (solver, str(n if solver == "euler" else n // 2), str(n))
        for solver in rf.SOLVERS
        for n in (2, 4)
    ]
    assert (run / "edit" / "edit.png").stat().st_size > 5000
    with Image.open(run / "edit" / "strip.png") as strip:
        assert strip.width < strip.height  # three pictures wide, four high


def test_the_real_digits_are_held_out_and_become_the_next(tmp_path):
    held = digits.glyphs(600, seed=1)
    examples = list(edit.real_digits("glyphs", tmp_path))
    assert len(examples) == 600
    for k, (image, word, other) in enumerate(examples[:40]):
        assert torch.equal(image, held.images[k]) and int(word) == held.labels[k]
        assert int(other) == (held.labels[k] + 1) % 10


def test_the_real_shapes_change_one_colour():
    examples = edit.real_shapes(World(20, 4, 6, 10))
    for _ in range(12):
        picture, caption, edited = next(examples)
        assert picture.shape == (3, 20, 20) and picture.dtype == torch.uint8
        words = zip(caption.split(), edited.split(), strict=True)
        ((before, after),) = [pair for pair in words if pair[0] != pair[1]]
        assert {before, after} <= set(COLORS) and after not in caption.split()


def test_what_cannot_be_edited_ends_in_one_line(tmp_path, capsys):
    assert "holds no weights" in refused(edit.main, capsys, tmp_path)
    run = exported(tmp_path / "run", SHAPES | {"shapes": 0})
    assert "is of neither digits nor shapes" in refused(edit.main, capsys, run, "--device", "cpu")
    assert "--number 0 must be at least 1" in refused(edit.main, capsys, run, "--number", 0)
