"""muP: the coordinate check, Microsoft's own package, the table, and the experiments' pieces."""

import csv
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import coordinate_check as check
import lr_transfer
import mup
import numpy as np
import pytest
import shape_scaling
import torch

from mmdit import PRESETS, Linear, MMDiT, explain

ROOT = Path(__file__).resolve().parents[1]

# --- the coordinate check ------------------------------------------------------------------------


def worst_slope(parametrization, residual="prenorm", double=0):
    found = {
        width: check.measure(check.shape(width, residual, double), parametrization, steps=(8,))[8]
        for width in check.WIDTHS
    }
    slopes = check.slopes(found)
    model = MMDiT(check.shape(64, residual, double))
    assert slopes.keys() > {name for name, m in model.named_modules() if isinstance(m, Linear)}
    return max(slopes.values(), key=abs), slopes


@pytest.mark.parametrize("double", [0, 2])
@pytest.mark.parametrize("residual", ["prenorm", "auraflow"])
def test_activations_keep_their_size_at_every_width(residual, double):
    worst, slopes = worst_slope("mup", residual, double)
    assert abs(worst) <= 0.1, sorted(slopes.items(), key=lambda pair: -abs(pair[1]))[:5]
    seen = {name.split(".")[0] for name in slopes}
    assert ("double_blocks" in seen) == (double > 0) and "single_blocks" in seen


def test_the_check_sees_what_the_standard_parametrisation_does():
    worst, _ = worst_slope("standard")
    assert worst > 0.3


def test_slopes_are_exponents():
    found = {w: {"flat": 2.0, "root": w**0.5, "falls": 3 / w, "none": 0.0} for w in (64, 128, 512)}
    assert check.slopes(found) == pytest.approx({"flat": 0.0, "root": 0.5, "falls": -1.0})


# --- against the reference implementation --------------------------------------------------------


@pytest.mark.parametrize(("preset", "dim"), [("tiny", 96), ("tiny", 512), ("digits", 512)])
@pytest.mark.parametrize("double", [0, 2, 4])
def test_the_multipliers_are_those_of_the_mup_package(preset, dim, double):
    """Where fan-in and fan-out both grow: lr / m and decay · m, as mup.MuAdamW groups them."""
    config = replace(PRESETS[preset], dim=dim, n_layers=4, n_double_layers=double)
    model = MMDiT(config)
    base = MMDiT(replace(config, dim=config.base_dim))
    other = MMDiT(replace(config, dim=config.base_dim + 128))
    ours = {
        id(p): (group["lr"], group["weight_decay"])
        for group in model.param_groups(lr=0.01, weight_decay=0.1)
        for p in group["params"]
    }
    mup.set_base_shapes(model, base, delta=other, rescale_params=False, do_assert=False)
    theirs = {
        id(p): (group["lr"], group["weight_decay"])
        for group in mup.MuAdamW(model.parameters(), lr=0.01, weight_decay=0.1).param_groups
        for p in group["params"]
    }
    grows = {name: p for name, p in model.named_parameters() if p.infshape.ninf() == 2}
    matrices = {
        name for name, _ in model.named_parameters() if model.role(name) in ("hidden", "modulation")
    }
    assert grows.keys() == matrices
    for name, p in grows.items():
        assert ours[id(p)] == pytest.approx(theirs[id(p)]), name


# --- the table -----------------------------------------------------------------------------------


def test_explain_counts_every_parameter_once():
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            total = MMDiT(config).n_parameters()
        lines = explain(config).splitlines()
        counts = [int(line.split()[3].replace(",", "")) for line in lines[1:-1]]
        assert sum(counts) == total, preset
        assert lines[-1].startswith(f"{total:,} values")


def test_explain_at_auraflows_width():
    rows = [line.split() for line in explain(PRESETS["auraflow-6.8b"]).splitlines()]
    table = {(row[0], row[1]): row[4:] for row in rows[1:-1]}
    assert table["hidden", "3072"] == ["0.0180", "0.08333", "12"]  # 1/√3072, 256/3072, 3072/256
    assert table["modulation", "3072"] == ["0", "0.08333", "12"]
    assert table["text", "2048"] == ["0", "1", "1"]
    assert table["vector", "-"] == ["own", "1", "0"]


# --- lr_transfer.py and shape_scaling.py ---------------------------------------------------------

GRID = ["--steps", "3", "--widths", "32", "64", "--rates", "0.004"]


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dataset", ["glyphs", "shapes"])
def test_a_grid_is_not_run_twice(tmp_path, monkeypatch, capsys, dataset):
    options = [*GRID, "--dataset", dataset, "--out", str(tmp_path)]
    ran, train = [], lr_transfer.train

    def counted(config, data, **settings):
        ran.append((settings["parametrization"], config.dim, settings["lr"], settings["seed"]))
        return train(config, data, **settings)

    monkeypatch.setattr(lr_transfer, "train", counted)
    lr_transfer.main(options)
    assert Counter(ran).most_common(1)[0][1] == 1 and len(ran) == 4
    first = rows(tmp_path / f"lr_transfer_{dataset}.csv")
    lr_transfer.main([*options, "--seeds", "2"])
    assert len(ran) == 8 and {seed for *_, seed in ran[4:]} == {1}
    assert rows(tmp_path / f"lr_transfer_{dataset}.csv")[:4] == first
    at_base = {row["parametrization"]: row["loss"] for row in first if row["width"] == "32"}
    assert at_base["mup"] == at_base["standard"]
    assert (tmp_path / f"lr_transfer_{dataset}.png").stat().st_size > 10_000
    assert "best rate" in capsys.readouterr().out


def test_a_diverged_cell_is_infinite(tmp_path):
    data = lr_transfer.dataset("glyphs", tmp_path, torch.device("cpu"))
    config = replace(data.config, dim=32, base_dim=32)
    assert lr_transfer.train(config, data, lr=1e30, steps=4) == float("inf")


def test_the_fit_finds_a_power_law():
    N = np.array([1e5, 2e5, 5e5, 1e6, 4e6])
    constant, c, alpha = shape_scaling.fit(N, 0.08 + 3 * N**-0.4)
    assert constant == pytest.approx(0.08, rel=0.02)
    assert constant + c * 1e8**-alpha == pytest.approx(0.08 + 3 * 1e8**-0.4, rel=0.01)
    constant, _, alpha = shape_scaling.fit(N, 3 * N**-0.4)  # no floor is found where there is none
    assert constant == pytest.approx(0, abs=2e-3) and alpha == pytest.approx(0.4, rel=0.02)


def test_searches_spend_equal_compute(tmp_path, monkeypatch):
    spent = []

    def counted(config, data, *, lr, steps, seed):
        spent.append(steps * shape_scaling.flops(config, data))
        return 1 / config.dim

    monkeypatch.setattr(shape_scaling, "train", counted)
    shape_scaling.main(["blocks", "aspect", "--samples", "64000", "--out", str(tmp_path)])
    assert len(spent) == 7 + 5
    assert max(spent) / min(spent) < 1.01
    done = len(spent)
    shape_scaling.main(["--samples", "64000", "--out", str(tmp_path)])
    assert len(spent) == done + 6  # only the scaling runs were missing
    assert len(rows(tmp_path / "shape_scaling.csv")) == 18


# --- the trainers use it -------------------------------------------------------------------------


def last_loss(path, n):
    """Mean training loss of the last n rows of a log."""
    losses = [float(row["loss"]) for row in rows(path)]
    assert all(np.isfinite(losses)) and losses[0] > 2 * losses[-1]
    return np.mean(losses[-n:])


@pytest.mark.slow
@pytest.mark.parametrize("chapter", ["mnist", "t2i"])
def test_one_rate_serves_two_presets_and_the_wider_gets_further(tmp_path, chapter):
    presets = {"mnist": ("digits", "digits-wide"), "t2i": ("tiny", "tiny-wide")}[chapter]
    options = {
        "mnist": "--dataset glyphs --steps 160 --sample-steps 2",
        "t2i": "--samples 5120 --batch-size 32 --warmup-samples 640 --cooldown-samples 2560"
        " --eval-prompts 1",
    }[chapter].split()
    found = []
    for preset in presets:
        out = tmp_path / preset
        script = ROOT / f"train_{chapter}.py"
        command = [sys.executable, script, "--preset", preset, "--out", out, *options]
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        alone = {k: v for k, v in os.environ.items() if k not in ranks}  # left by other tests
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env=alone)
        found.append(last_loss(out / "log.csv", 3))
    narrow, wide = found
    assert wide < narrow, found
