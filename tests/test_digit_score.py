"""experiments/digit_score.py: its distance against a closed form, and its path end to end."""

import pytest
import torch

import data_mnist
import digit_score
import train_mnist


def test_frechet_distance_of_known_gaussians():
    """Diagonal Gaussians: ‖μ₁ − μ₂‖² + Σ (σ₁ − σ₂)²."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # exactly white
    a, b = z * torch.tensor([1.0, 2, 3]), z * torch.tensor([2.0, 2, 1]) + torch.tensor([1.0, 0, 2])
    assert digit_score.frechet_distance(a, b) == pytest.approx(5 + 1 + 4, rel=1e-6)
    assert digit_score.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def few_glyphs(monkeypatch):
    def load(source, data_dir="data", *, size=32, seed=0):
        return data_mnist.glyphs(1500, seed=0), data_mnist.glyphs(300, seed=1)

    monkeypatch.setattr(train_mnist, "load_images", load)
    monkeypatch.setattr(digit_score, "load_images", load)


def test_the_reader_reads_and_is_cached(few_glyphs, tmp_path):
    train, test = digit_score.load_images("glyphs")
    reader = digit_score.reader_for(train, tmp_path, "cpu", epochs=4)
    _, read = digit_score.read(reader, test.images, "cpu")
    assert (read == test.labels).float().mean() > 0.85
    again = digit_score.reader_for(train, tmp_path, "cpu", epochs=0)  # no training: from the cache
    assert torch.equal(digit_score.read(again, test.images, "cpu")[1], read)


def test_table_of_a_run(few_glyphs, tmp_path, capsys):
    train_mnist.main(
        ["--dataset", "glyphs", "--device", "cpu", "--patch-size", "7", "--steps", "2",
         "--batch-size", "4", "--sample-steps", "1", "--out", str(tmp_path)]
    )  # fmt: skip
    rows = digit_score.main(
        [str(tmp_path), "--samples", "20", "--steps", "1", "2", "--device", "cpu",
         "--cache", str(tmp_path)]
    )  # fmt: skip
    assert [row[:3] for row in rows] == [
        ("euler", 1, 1), ("euler", 2, 2), ("heun", 1, 1), ("heun", 2, 3),
        ("rf_solver", 1, 2), ("rf_solver", 2, 4),
    ]  # fmt: skip
    lines = (tmp_path / "digit_score.csv").read_text().split()
    assert len(lines) == 8 and lines[1].startswith("real,")
    assert (tmp_path / "digit_score.png").stat().st_size > 1000
    assert "recognised" in capsys.readouterr().out


def test_a_missing_run_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no config\.json"):
        digit_score.main([str(tmp_path)])
