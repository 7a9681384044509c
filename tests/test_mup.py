"""muP: Microsoft's own package, the table, slopes of the coordinate check, the trainers."""

from dataclasses import replace

import mup
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import call, t2i

import train_mnist
from common.pipeline import load_shard
from experiments import coordinate_check
from mmdit import PRESETS, MMDiT, explain, load_model


def test_slopes_are_exponents():
    w = np.array([64.0, 128, 512])
    sizes = pd.DataFrame({"flat": 2 + 0 * w, "root": w**0.5, "falls": 3 / w, "none": 0 * w}, w)
    found = coordinate_check.slopes(sizes)
    assert found.to_dict() == pytest.approx({"flat": 0, "root": 0.5, "falls": -1})


@pytest.mark.parametrize("preset, dim", [("tiny", 96), ("tiny", 512), ("digits", 512)])
@pytest.mark.parametrize("double", [0, 2, 4])
def test_the_multipliers_are_those_of_the_mup_package(preset, dim, double):
    """Where fan-in and fan-out both grow: lr / m and decay · m, as mup.MuAdamW groups them."""
    config = replace(PRESETS[preset], n_layers=4, n_double_layers=double)
    model, base, other = (MMDiT(replace(config, dim=d)) for d in (dim, 256, 384))
    groups = model.param_groups(0.01, 0.1)
    mup.set_base_shapes(model, base, delta=other, rescale_params=False, do_assert=False)
    theirs = mup.MuAdamW(model.parameters(), lr=0.01, weight_decay=0.1).param_groups
    found, expected = (
        {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        for groups in (groups, theirs)
    )
    for name, p in model.named_parameters():
        grows = p.infshape.ninf() == 2
        assert grows == (model.role(name) in ("hidden", "modulation"))
        assert not grows or found[p] == pytest.approx(expected[p]), name


@pytest.mark.parametrize("preset", PRESETS)
def test_explain_counts_every_parameter_once_and_scales_it(preset):
    _, *rows, last = explain(PRESETS[preset]).splitlines()
    rows = [row.replace(",", "").split() for row in rows]
    with torch.device("meta"):
        total = MMDiT(PRESETS[preset]).n_parameters()
    assert sum(int(row[3]) for row in rows) == total
    assert last == f"{total:,} values; the multipliers are 1 at width 256"
    if preset == "auraflow-6.8b":
        table = {" ".join(row[:2]): row[4:] for row in rows}
        assert table["hidden 3072"] == ["0.0180", "0.08333", "12"]  # 1/√3072, 256/3072, 3072/256
        assert table["modulation 3072"] == ["0", "0.08333", "12"]
        assert table["text 2048"] == ["0", "1", "1"]
        assert table["vector -"] == ["own", "1", "0"]


@pytest.mark.parametrize(
    "main, options",
    [
        (train_mnist.main, "--data glyphs --steps 1"),
        (t2i, "--samples 64 --eval-prompts 1"),
    ],
)
def test_both_trainers_follow_the_table(tmp_path, main, options):
    """The groups of AdamW as a run of one step saved them."""
    options += " --lr 0.01 --muon-lr 0.02 --weight-decay 0.1 --batch-size 64 --sample-steps 1 --out"
    call(main, *options.split(), tmp_path)
    (file,) = [*tmp_path.glob("checkpoint.pt"), *tmp_path.rglob("*_optim_states.pt")]
    state = load_shard(file)
    adamw = state.get("adamw") or state["optimizer_state_dict"]["base_optimizer_state"]
    expected = load_model(tmp_path).param_groups(0.01, 0.1, muon_lr=0.02)
    found = [(group["base_lr"], group["weight_decay"]) for group in adamw["param_groups"]]
    assert found == [(group["lr"], group["weight_decay"]) for group in expected]
    assert len(found) > 2
