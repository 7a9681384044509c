"""experiments/toy2d.py: the distributions, the measures, the flow map, and a small run."""

import csv

import numpy as np
import pytest
import torch
import toy2d

import rf


@pytest.mark.parametrize("name", toy2d.SETS)
def test_sets_are_where_they_should_be(name):
    points = toy2d.draw(name, 20_000, 0, "test")
    assert points.shape == (20_000, 2) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 0.1
    assert torch.equal(points, toy2d.draw(name, 20_000, 0, "test"))
    assert not torch.equal(points, toy2d.draw(name, 20_000, 1, "test"))


def test_the_checkerboard_leaves_every_other_field_empty():
    points = toy2d.draw("checkerboard", 20_000, 0, "test")
    column, row = (points + 2).floor().long().T
    assert set(zip(column.tolist(), row.tolist(), strict=True)) == {
        (c, r) for c in range(4) for r in range(4) if (c + r) % 2 == 0
    }


def test_eight_gaussians_lie_on_a_circle():
    points = toy2d.draw("gaussians", 20_000, 0, "test")
    assert float(points.norm(dim=1).mean()) == pytest.approx(2, abs=0.05)
    angle = torch.atan2(points[:, 1], points[:, 0]) / (2 * np.pi / 8)
    assert (angle - angle.round()).abs().mean() < 0.1


def test_energy_distance_of_shifted_gaussians():
    """√(2E|a−b| − E|a−a'| − E|b−b'|) in one dimension, by scipy on the same points."""
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(800, 1), 0.7 + torch.randn(900, 1)
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert toy2d.energy_distance(a, b) == pytest.approx(expected, rel=1e-3)
    assert toy2d.energy_distance(a, a) == pytest.approx(0, abs=1e-3)


class Straight(toy2d.FlowMap):
    """The exact map of the flow that moves everything by a constant velocity."""

    def mean_velocity(self, x, s, t):
        return torch.tensor([1.0, -2.0]).expand_as(x)


def test_the_lagrangian_loss_is_zero_for_the_exact_flow_map():
    data = torch.randn(50, 2)
    source = data + torch.tensor([1.0, -2.0])
    r, s, t = torch.rand(3, 50)
    loss = toy2d.lagrangian_loss(Straight(), data, source, r, s, t)
    assert loss.shape == (50,) and loss.max() < 1e-9
    assert torch.allclose(toy2d.walk_map(Straight(), source, 1), data, atol=1e-6)
    assert torch.allclose(toy2d.walk_map(Straight(), source, 3), data, atol=1e-6)


def test_the_lagrangian_loss_sees_a_map_that_does_not_move_as_its_flow():
    class Bent(toy2d.FlowMap):
        def mean_velocity(self, x, s, t):
            return torch.tensor([1.0, -2.0]) * (1 + (t - s))[:, None]

    data = torch.randn(50, 2)
    source = data + torch.tensor([1.0, -2.0])
    s, t = torch.full((50,), 0.9), torch.full((50,), 0.4)
    # X = x + (t−s)(1 + (t−s))·c: its slope is (1 + 2(t−s))·c, the diagonal says c
    loss = toy2d.lagrangian_loss(Bent(), data, source, s, s, t)
    assert torch.allclose(loss, torch.full((50,), 5 * (2 * 0.5) ** 2), atol=1e-4)


def test_a_small_run_straightens_and_writes_everything(tmp_path):
    rows = toy2d.main(["--sets", "moons", "--steps", "400", "--out", str(tmp_path)])
    by_flow = {row["flow"]: row for row in rows}
    assert by_flow["second"]["straightness"] < by_flow["first"]["straightness"] / 5
    assert by_flow["second"]["cost"] < by_flow["real"]["cost"]
    assert by_flow["second"]["energy_1"] < by_flow["first"]["energy_1"] / 3
    with open(tmp_path / "toy2d.csv") as file:
        assert [row["flow"] for row in csv.DictReader(file)] == ["real", "first", "second"]
    page = (tmp_path / "moons.html").read_text()
    assert 'type="range"' in page and "▶" in page
    assert "://" not in page and "fa-" not in page  # nothing to fetch
    assert (tmp_path / "moons.gif").stat().st_size > 10_000 and (tmp_path / "moons.png").exists()


def test_from_data_to_data(tmp_path):
    rows = toy2d.main(
        ["--sets", "moons", "--source", "gaussians", "--steps", "150", "--no-film", "--out",
         str(tmp_path)]
    )  # fmt: skip
    assert all(row["source"] == "gaussians" for row in rows)
    assert rows[1]["cost"] < rows[0]["cost"]


def test_the_models_are_ordinary_ones_to_the_flow():
    model, x = toy2d.MLP(), torch.randn(4, 2)
    assert rf.sample(model, x, x, steps=2).shape == (4, 2)
