"""experiments/digit_score.py: its distance against a closed form, its reader, and whole tables."""

import pytest
import torch
from helpers import DIGITS, call, exported, records, refused

from experiments import digit_score
from inputs import digits


def test_frechet_distance_of_known_gaussians():
    """Diagonal Gaussians: ‖μ₁ − μ₂‖² + Σ (σ₁ − σ₂)²."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=g, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # exactly white
    a, b = z * torch.tensor([1.0, 2, 3]), z * torch.tensor([2.0, 2, 1]) + torch.tensor([1.0, 0, 2])
    assert digit_score.frechet_distance(a, b) == pytest.approx(5 + 1 + 4, rel=1e-6)
    assert digit_score.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_gaussians_with_covariances():
    """tr (Σ₁Σ₂)^½ from the roots of both matrices: the nuclear norm of Σ₁^½ Σ₂^½."""
    a, b = torch.randn(500, 4, dtype=torch.float64), torch.randn(400, 4, dtype=torch.float64)
    a, b = a @ torch.randn(4, 4).double(), b @ torch.randn(4, 4).double() + 1
    roots = []
    for x in (a, b):
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        roots.append(vectors * values.sqrt() @ vectors.T)
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() - 2 * cross
    expected += sum(torch.cov(x.T).trace() for x in (a, b))
    assert digit_score.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


FEW = digits.glyphs(1500, seed=0), digits.glyphs(300, seed=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Few glyphs for all that is loaded here; the readers lie in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_score, "load_images", lambda name, data_dir: FEW)
        patch.setattr(digit_score, "STEPS", (1, 2))
        yield tmp_path_factory.mktemp("readers")


def test_the_reader_reads_and_is_cached(home, tmp_path):
    training, test = FEW
    judge = digit_score.Judge("glyphs", tmp_path, home, 100, "cpu")
    reader = digit_score.reader_for(training, torch.arange(1500), tmp_path, "cpu", epochs=4)
    again = digit_score.reader_for(training, torch.arange(1), tmp_path, "cpu", epochs=0)
    for judge.reader in (reader, again):  # the second was not trained: it is from the cache
        assert judge.score(test.images, test.labels)[0] > 0.85
    assert judge.score(test.images, (test.labels + 1) % 10)[0] < 0.15


def test_the_judge_asks_all_classes_and_holds_unseen_images_against_the_test_set(home, monkeypatch):
    seen, reader_for = [], digit_score.reader_for

    def spied(dataset, numbers, *rest):
        seen.append(numbers)
        return reader_for(dataset, numbers, *rest)

    monkeypatch.setattr(digit_score, "reader_for", spied)
    training, test = FEW
    judge = digit_score.Judge("glyphs", home, home, 200, "cpu")
    unseen = torch.ones(1500, dtype=bool)
    unseen[seen[0]] = False
    assert unseen.sum() == 150
    real = judge.score(training.images[unseen], training.labels[unseen])
    assert real == pytest.approx(judge.real)
    assert judge.score(test.images, test.labels)[1] == pytest.approx(0, abs=1e-3)
    assert judge.labels.bincount().tolist() == [20] * 10
    assert judge.captions[:12] == [*"012345678901"] and judge.noise.shape == (200, 1, 28, 28)
    few = digit_score.Judge("glyphs", home, home, 20, "cpu", seed=1)
    assert not torch.equal(few.noise, judge.noise[:20])


def test_table_of_a_run(home, tmp_path, capsys):
    run = exported(tmp_path / "run", DIGITS | {"size": 28})
    options = (run, "--samples", 20, "--cache", home, "--device", "cpu")
    call(digit_score.main, *options, "--quick")  # Euler, two steps
    quick = capsys.readouterr().out.splitlines()[-1].split()
    assert not (run / "digit_score.csv").exists()
    call(digit_score.main, *options)
    rows = records(run / "digit_score.csv")
    assert [(row["solver"], row["steps"], row["evaluations"]) for row in rows] == [
        ("real", "", ""),
        ("euler", "1", "1"),
        ("euler", "2", "2"),
        ("heun", "1", "1"),
        ("heun", "2", "3"),
        ("rf_solver", "1", "2"),
        ("rf_solver", "2", "4"),
    ]
    euler = [row for row in rows if (row["solver"], row["steps"]) == ("euler", "2")]
    distance, ratio = (float(euler[0][key]) for key in ("frechet", "frechet_ratio"))
    assert quick[:3] == ["euler", "2", "2"] and float(quick[4]) == pytest.approx(distance, abs=1e-3)
    assert ratio == pytest.approx(distance / float(rows[0]["frechet"]))
    assert (run / "digit_score.png").stat().st_size > 1000
    for more in (("--cfg", 4), ("--seed", 1), ("--solver", "heun"), ("--steps", 1)):
        call(digit_score.main, *options, "--quick", *more)
        assert capsys.readouterr().out.splitlines()[-1].split()[4] != quick[4], more


def test_what_cannot_be_read_ends_in_one_line(tmp_path, capsys):
    assert "holds no weights" in refused(digit_score.main, capsys, tmp_path)
    line = refused(digit_score.main, capsys, tmp_path, "--samples", 1)
    assert line == "experiments.digit_score: --samples 1 must be at least 2"
