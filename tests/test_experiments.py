"""The experiments on muP, the shape of networks, and editing, on small networks."""

import re
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import DIGITS, SHAPES, call, close, exported, refused
from PIL import Image
from test_digits import write_mnist

import rf
from experiments import coordinate_check, edit, lr_transfer, shape_scaling
from inputs import digits
from inputs.encoders import to_unit
from inputs.shapes import COLORS, World
from mmdit import PRESETS, Linear, MMDiT

# --- coordinate_check ----------------------------------------------------------------------------


@pytest.mark.parametrize("residual, double", [("prenorm", 0), ("auraflow", 2)])
def test_activations_keep_their_size_under_mup_alone(
    tmp_path, monkeypatch, capsys, residual, double
):
    monkeypatch.setattr(coordinate_check, "WIDTHS", (64, 128, 256))
    lr, shape = 0.0035, ("--residual", residual, "--double", double)
    call(coordinate_check.main, *shape, "--lr", lr, "--out", tmp_path)
    worst = re.findall(r"after 8 steps: worst slope (\S+)", capsys.readouterr().out)
    standard, ours, muon = map(float, worst)
    assert abs(ours) < 0.15 and abs(muon) < 0.2 and abs(standard) > 0.25
    config = coordinate_check.shape(256, residual, double)
    measure = partial(coordinate_check.measure, config, "standard", lr)
    table = pd.read_csv(tmp_path / "coordinate_check.csv")
    found = table[(table.parametrization == "standard") & (table.width == 256)]
    mean = pd.DataFrame(measure(0) + measure(1)).groupby(["activation", "step"]).mean_abs.mean()
    assert sorted(found.mean_abs) == pytest.approx(sorted(mean))
    layers = {name for name, module in MMDiT(config).named_modules() if isinstance(module, Linear)}
    assert {*found.activation} > layers | {"double_blocks.0" if double else "single_blocks.0"}
    assert (tmp_path / "coordinate_check.png").stat().st_size > 10_000


# --- lr_transfer ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few glyphs, wherever glyphs are loaded."""
    many = digits.glyphs
    monkeypatch.setattr(digits, "glyphs", lambda n, seed=0: many(min(n, 600), seed))


def test_digits_are_halved_inside_a_black_margin():
    data, held = lr_transfer.Data(lr_transfer.Settings(device="cpu")), digits.glyphs(600, seed=1)
    states, text, u, _ = data.rows.encode(data.held, "cpu")
    images = torch.full((512, 1, 32, 32), -1.0)
    images[..., 2:30, 2:30] = to_unit(held.images[:512])
    close(states[:, 0], images.view(512, 1, 16, 2, 16, 2).mean((3, 5)))
    assert text[:, 0].argmax(1).tolist() == held.labels[:512].tolist()
    assert not data.held.dropped.any() and u.min() < 0.01 and u.max() > 0.99


@pytest.mark.parametrize("dataset", ["glyphs", "shapes"])
def test_a_grid_is_not_run_twice(tmp_path, monkeypatch, capsys, dataset):
    ran, train = [], lr_transfer.train

    def counted(config, data, **how):
        ran.append((config.dim, *how.values()))
        return train(config, data, **how)

    def grid(*more):
        options = ("--widths", 32, 64, "--rates", 0.004, 1e30, "--dataset", dataset, "--steps", 2)
        call(lr_transfer.main, *options, "--out", tmp_path, "--device", "cpu", *more)
        return pd.read_csv(tmp_path / f"lr_transfer_{dataset}.csv"), capsys.readouterr().out

    monkeypatch.setattr(lr_transfer, "train", counted)
    first, printed = grid()
    again, same = grid()  # nothing is run, all of it is printed again
    assert same == printed and again.equals(first)
    table, _ = grid("--seeds", 2)
    assert len({*ran}) == len(ran) == len(table) == 24 and table[:12].equals(first)
    assert (np.isinf(table.loss) == (table.lr > 1)).all()  # a run that diverged is an answer
    losses = table[table.lr < 1].groupby(["width", "seed"]).loss
    assert losses.nunique().tolist() == [1, 1, 2, 2]  # the first width is muP's base
    assert table.loss[12] != table.loss[0]
    assert "base" in table and "rows" in table  # other widths or images are other cells
    assert re.search(rf" {losses.last()[64, 0]:.4g} +inf +0.004\n", printed)  # the best rate last
    assert (tmp_path / f"lr_transfer_{dataset}.png").stat().st_size > 10_000


@pytest.mark.parametrize("program", [lr_transfer, shape_scaling])
def test_other_data_are_refused(tmp_path, capsys, program):
    said = refused(program.main, capsys, "--dataset", tmp_path)
    assert f"--dataset '{tmp_path}' must be one of glyphs, mnist, shapes" in said


def test_few_held_out_pictures_are_enough(tmp_path):
    write_mnist(tmp_path, 40)
    data = lr_transfer.Data(SimpleNamespace(dataset="mnist", data_dir=tmp_path, device="cpu"))
    assert len(data.held.stored) == 40


def test_training_helps():
    data = lr_transfer.Data(lr_transfer.Settings(device="cpu"))
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
    call(shape_scaling.main, *options)
    assert len(spent) == 2 * (7 + 5 + 6)  # only the scaling runs were missing
    assert max(spent[:24]) / min(spent[:24]) < 1.01
    rows = pd.read_csv(tmp_path / "shape_scaling.csv")
    assert "rows" in rows  # other images are other cells
    assert len(rows) == 36 and set(rows.steps[24:]) == {1000} == {rows.steps[0], rows.steps[14]}
    large = MMDiT(replace(PRESETS["tiny"], dim=256, n_layers=4))
    assert rows.parameters.iloc[-1] == large.n_parameters()
    printed = capsys.readouterr().out
    assert f"measured: {law(large):.4f}" in printed
    fitted = re.findall(r"= (\S+) \+ (\S+) N\^-(\S+)\n.*: (\S+)", printed)[-1]
    expected = (0.1, 3, 0.25, law(large))
    assert [*map(float, fitted)] == pytest.approx(expected, rel=0.02)
    assert {file.stem for file in tmp_path.glob("*.png")} == {*shape_scaling.SEARCHES}


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
    sizes = data.square().flatten(1).mean(1).sqrt()  # the error of a picture is proportional to it
    share = float(sizes.median() / sizes.square().mean().sqrt())
    assert (table["median"] / table.rmse).tolist() == pytest.approx([share] * len(table), rel=1e-3)


@pytest.mark.parametrize("facts", [DIGITS | {"size": 28}, SHAPES])
def test_an_edit_writes_table_plot_and_strip(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(edit, "EVALUATIONS", (2, 4))
    run = exported(tmp_path / "run", facts)
    call(edit.main, run, "--number", 3, "--device", "cpu")
    rows = pd.read_csv(run / "edit" / "edit.csv")
    assert [*rows.solver] == [solver for solver in rf.SOLVERS for _ in range(2)]
    assert [*rows.steps] == [2, 4, 1, 2, 1, 2] and [*rows.evaluations] == [2, 4] * 3
    assert (run / "edit" / "edit.png").stat().st_size > 5000
    with Image.open(run / "edit" / "strip.png") as strip:
        assert strip.width < strip.height  # three pictures wide, four high


def test_the_real_digits_are_held_out_and_become_the_next(tmp_path):
    images, words, others = zip(*edit.real_digits("glyphs", tmp_path), strict=True)
    held = digits.glyphs(600, seed=1)
    assert torch.equal(torch.stack(images), held.images)
    assert [*map(int, words)] == held.labels.tolist()
    assert [*map(int, others)] == ((held.labels + 1) % 10).tolist()


def test_the_real_shapes_change_one_colour():
    for picture, caption, edited in islice(edit.real_shapes(World(20, 4, 6, 10)), 12):
        assert picture.shape == (3, 20, 20) and picture.dtype == torch.uint8
        words = zip(caption.split(), edited.split(), strict=True)
        ((before, after),) = [pair for pair in words if pair[0] != pair[1]]
        assert {before, after} <= set(COLORS) and after not in caption.split()


def test_what_cannot_be_edited_ends_in_one_line(tmp_path, capsys):
    run = exported(tmp_path / "run", SHAPES | {"shapes": 0})
    assert "is of neither digits nor shapes" in refused(edit.main, capsys, run, "--device", "cpu")
