"""experiments/toy2d.py: the distributions, the measures, the flow map, and small runs."""

import pytest
import torch
from helpers import call, close, records
from PIL import Image

from experiments import toy2d


@pytest.mark.parametrize("name", toy2d.SOURCES)
def test_points_come_from_seed_and_purpose_alone(name):
    points, again, *others = (
        toy2d.draw(name, 20_000, *how) for how in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert points.shape == (20_000, 2) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 0.1
    assert torch.equal(points, again) and not any(torch.equal(points, x) for x in others)


def test_the_checkerboard_leaves_every_other_field_empty():
    fields = (toy2d.draw("checkerboard", 20_000, 0, "test") + 2).floor().unique(dim=0)
    assert fields.tolist() == [[c, r] for c in range(4) for r in range(4) if (c + r) % 2 == 0]


def test_eight_gaussians_lie_on_a_circle():
    points = torch.view_as_complex(toy2d.draw("gaussians", 20_000, 0, "test"))
    eighths = points.angle() / (2 * torch.pi / 8)
    assert points.abs().mean().item() == pytest.approx(2, abs=0.05)
    assert (eighths - eighths.round()).abs().mean() < 0.1
    assert len(eighths.round().remainder(8).unique()) == 8


def test_energy_distance_of_shifted_gaussians():
    """√(2E|a−b| − E|a−a'| − E|b−b'|) in one dimension, by scipy on the same points."""
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(800, 1), 0.7 + torch.randn(900, 1)
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert toy2d.energy_distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert toy2d.energy_distance(a, a) == pytest.approx(0, abs=1e-3)


# --- the flow map --------------------------------------------------------------------------------

DRIFT = torch.tensor([1.0, -2.0])


class Straight(toy2d.FlowMap):
    """The exact map of the flow that moves everything by a constant velocity."""

    def velocity(self, x, s, t):
        return DRIFT.expand_as(x)


class Bent(toy2d.FlowMap):
    """X = x + (t−s)(1 + (t−s))·DRIFT: its slope is (1 + 2(t−s))·DRIFT, its diagonal says DRIFT."""

    def velocity(self, x, s, t):
        return DRIFT * (1 + (t - s))[:, None]


def test_the_lagrangian_loss_is_zero_for_the_exact_flow_map_alone():
    data, (r, s, t) = torch.randn(50, 2), torch.rand(3, 50)
    early, late = torch.full((2, 50), 0.9), torch.full((50,), 0.4)
    for flow, drift, times, expected in (
        (Straight(), DRIFT, (r, s, t), 0.0),
        (Straight(), -DRIFT, (r, s, t), 20.0),  # ‖2·DRIFT‖²
        (Bent(), DRIFT, (*early, late), 5 * (2 * 0.5) ** 2),
    ):
        loss = toy2d.lagrangian_loss(flow, data, data + drift, *times)
        close(loss, torch.full((50,), expected), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_map_jumps_from_the_source_to_the_data(steps):
    data = torch.randn(50, 2)
    close(toy2d.walk_map(Straight(), data + DRIFT, steps), data)


# --- runs ----------------------------------------------------------------------------------------


def run(tmp_path, monkeypatch, *options):
    """flow → its numbers, of smaller batches and fewer points than usual."""
    monkeypatch.setattr(toy2d, "BATCH", 128)
    monkeypatch.setattr(toy2d, "POINTS", 600)
    call(toy2d.main, "--sets", "moons", "--out", tmp_path, *options)
    rows = records(tmp_path / "toy2d.csv")
    return {row["flow"]: {k: float(row[k] or "nan") for k in toy2d.COLUMNS[3:]} for row in rows}


def test_a_small_run_straightens_and_writes_everything(tmp_path, monkeypatch, capsys):
    found = run(tmp_path, monkeypatch, "--steps", 250, "--lagrangian")
    assert list(found) == ["real", "first", "second", "map"]
    real, first, second, jumps = found.values()
    assert second["straightness"] < first["straightness"] / 5
    assert second["cost"] < real["cost"] and first["cost"] < real["cost"]
    assert max(second["energy_1"], jumps["energy_1"]) < first["energy_1"] / 3
    assert real["energy_many"] < first["energy_many"] < first["energy_2"] < first["energy_1"]
    assert f"{second['energy_1']:.4f}" in capsys.readouterr().out
    with Image.open(tmp_path / "moons.gif") as film:
        assert film.n_frames == toy2d.STEPS // 2 + 1
    assert (tmp_path / "moons.png").stat().st_size > 10_000


def test_from_data_to_data(tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch, "--source", "gaussians", "--steps", 100)
    assert found["first"]["cost"] < found["real"]["cost"]
    assert {row["source"] for row in records(tmp_path / "toy2d.csv")} == {"gaussians"}
