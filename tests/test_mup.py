"""muP: the coordinate check, Microsoft's own package, the table, the experiments, the trainers."""

import re
from dataclasses import replace

import mup
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import call, t2i

import train_mnist
from common.pipeline import load_shard
from experiments import coordinate_check, lr_transfer, shape_scaling
from mmdit import PRESETS, Linear, MMDiT, explain, load_model


@pytest.mark.parametrize("residual, double", [("prenorm", 0), ("auraflow", 2)])
def test_activations_keep_their_size_under_mup_alone(
    tmp_path, monkeypatch, capsys, residual, double
):
    monkeypatch.setattr(coordinate_check, "WIDTHS", (64, 128, 256))
    call(coordinate_check.main, "--residual", residual, "--double", double, "--out", tmp_path)
    worst = re.findall(r"after 8 steps: worst slope (\S+)", capsys.readouterr().out)
    standard, ours = map(float, worst)
    assert abs(ours) < 0.15 and abs(standard) > 0.3
    model = MMDiT(coordinate_check.shape(64, residual, double))
    seen = set(pd.read_csv(tmp_path / "coordinate_check.csv").activation)
    assert seen > {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert ("double_blocks.0" in seen) == (double > 0)


def test_slopes_are_exponents():
    w = np.array([64.0, 128, 512])
    sizes = pd.DataFrame({"flat": 2 + 0 * w, "root": w**0.5, "falls": 3 / w, "none": 0 * w}, w)
    found = coordinate_check.slopes(sizes)
    assert found.to_dict() == pytest.approx({"flat": 0, "root": 0.5, "falls": -1})


@pytest.mark.parametrize("preset, dim", [("tiny", 96), ("tiny", 512), ("digits", 512)])
@pytest.mark.parametrize("double", [0, 2, 4])
def test_the_multipliers_are_those_of_the_mup_package(preset, dim, double):
    """Where fan-in and fan-out both grow: lr / m and decay · m, as mup.MuAdamW groups them."""
    config = replace(PRESETS[preset], dim=dim, n_layers=4, n_double_layers=double)
    model, base, other = (MMDiT(replace(config, dim=d)) for d in (dim, 256, 384))
    how = {"lr": 0.01, "weight_decay": 0.1}
    groups = model.param_groups(**how)
    mup.set_base_shapes(model, base, delta=other, rescale_params=False, do_assert=False)
    ours, theirs = (
        {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        for groups in (groups, mup.MuAdamW(model.parameters(), **how).param_groups)
    )
    for name, p in model.named_parameters():
        grows = p.infshape.ninf() == 2
        assert grows == (model.role(name) in ("hidden", "modulation"))
        assert not grows or ours[p] == pytest.approx(theirs[p]), name


def test_explain_counts_every_parameter_once_and_scales_it():
    for config in PRESETS.values():
        with torch.device("meta"):
            total = MMDiT(config).n_parameters()
        _, *rows, last = explain(config).splitlines()
        assert sum(int(row.split()[3].replace(",", "")) for row in rows) == total
        assert last == f"{total:,} values; the multipliers are 1 at width 256"
    rows = [row.split() for row in explain(PRESETS["auraflow-6.8b"]).splitlines()]
    table = {" ".join(row[:2]): row[4:] for row in rows}
    assert table["hidden 3072"] == ["0.0180", "0.08333", "12"]  # 1/√3072, 256/3072, 3072/256
    assert table["modulation 3072"] == ["0", "0.08333", "12"]
    assert table["text 2048"] == ["0", "1", "1"]
    assert table["vector -"] == ["own", "1", "0"]


@pytest.mark.parametrize("dataset", ["glyphs", "shapes"])
def test_a_grid_is_not_run_twice(tmp_path, dataset):
    path = tmp_path / f"lr_transfer_{dataset}.csv"
    options = ["--widths", 32, 64, "--rates", 0.004, 1e30, "--steps", 2, "--dataset", dataset]
    for seeds in (1, 2):
        call(lr_transfer.main, *options, "--seeds", seeds, "--out", tmp_path)
        table = pd.read_csv(path)
        assert len(table) == 8 * seeds and set(table.seed) == set(range(seeds))
    assert (np.isinf(table.loss) == (table.lr > 1)).all()  # a run that diverged is an answer
    groups = table[table.lr < 1].groupby(["width", "seed"]).loss.nunique()
    assert groups.tolist() == [1, 1, 2, 2]  # muP is the standard one at the first width
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_fit_finds_a_power_law():
    N = np.array([1e5, 2e5, 5e5, 1e6, 4e6])
    constant, c, alpha = shape_scaling.fit(N, 0.08 + 3 * N**-0.4)
    assert constant == pytest.approx(0.08, rel=0.02)
    assert constant + c * 1e8**-alpha == pytest.approx(0.08 + 3 * 1e8**-0.4, rel=0.01)
    constant, _, alpha = shape_scaling.fit(N, 3 * N**-0.4)  # no floor is found where there is none
    assert (constant, alpha) == (pytest.approx(0, abs=2e-3), pytest.approx(0.4, rel=0.02))


def test_searches_spend_equal_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(lr_transfer, "train", lambda config, data, **how: 1 / config.dim)
    for searches, runs in ((["blocks", "aspect"], 12), (shape_scaling.SEARCHES, 18)):
        options = ["--samples", 64_000, "--out", tmp_path]
        call(shape_scaling.main, "--searches", *searches, *options)
        table = pd.read_csv(tmp_path / "shape_scaling.csv")
        assert len(table) == runs  # what is there is not run again
        spent = (table.steps * table.flops)[:12]
        assert spent.max() < 1.01 * spent.min()
    assert set(table.steps[12:]) == {1000}


def rates(groups, lr="lr"):
    return [(group[lr], group["weight_decay"]) for group in groups]


@pytest.mark.parametrize("main", [train_mnist.main, t2i])
def test_both_trainers_follow_the_table(tmp_path, main):
    """The groups of AdamW as a run of one step saved them."""
    options = ["--lr", 0.01, "--weight-decay", 0.1, "--batch-size", 64, "--sample-steps", 1]
    if main is train_mnist.main:
        call(main, *options, "--steps", 1, "--data", "glyphs", "--out", tmp_path)
        state, lr = load_shard(tmp_path / "checkpoint.pt")["adamw"], "base_lr"
    else:
        call(main, *options, "--samples", 64, "--eval-prompts", 1, "--out", tmp_path)
        (file,) = tmp_path.rglob("*_optim_states.pt")
        state, lr = load_shard(file)["optimizer_state_dict"]["base_optimizer_state"], "initial_lr"
    expected = load_model(tmp_path).param_groups(0.01, 0.1)
    assert rates(state["param_groups"], lr) == rates(expected) and len(expected) > 2
