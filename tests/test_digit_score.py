"""experiments/digit_score.py: its reader, and whole tables."""

import pandas as pd
import pytest
import torch
from helpers import DIGITS, call, exported, refused

import rf
from experiments import digit_score
from inputs import digits
from inputs.rows import open_rows

FEW = digits.glyphs(1500, seed=0), digits.glyphs(300, seed=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Few glyphs for all that is loaded here; the readers lie in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_score, "load_images", lambda name, data_dir: FEW)
        patch.setattr(digit_score, "STEPS", (1, 2))
        yield tmp_path_factory.mktemp("readers")


def test_the_judge_reads_holds_unseen_images_against_the_test_set_and_asks_all(home, monkeypatch):
    seen, reader_for = [], digit_score.reader_for

    def spied(dataset, numbers, *rest):
        seen.append(numbers)
        return reader_for(dataset, numbers, *rest, epochs=4 if len(seen) == 1 else 0)

    monkeypatch.setattr(digit_score, "reader_for", spied)
    training, test = FEW
    judge = digit_score.Judge("glyphs", home, home, 200, "cpu")
    unseen = torch.ones(1500, dtype=bool)
    unseen[seen[0]] = False
    assert unseen.sum() == 150
    real = judge.score(training.images[unseen], training.labels[unseen])
    assert real == pytest.approx(judge.real)
    assert judge.labels.bincount().tolist() == [20] * 10
    assert judge.captions[:12] == [*"012345678901"] and judge.noise.shape == (200, 1, 28, 28)
    cached = digit_score.Judge("glyphs", home, home, 20, "cpu", seed=1)  # its reader is not trained
    assert not torch.equal(cached.noise, judge.noise[:20])
    for each in (judge, cached):
        recognised, distance = each.score(test.images, test.labels)
        assert recognised > 0.85 and distance == pytest.approx(0, abs=1e-3)
        assert each.score(test.images, (test.labels + 1) % 10)[0] < 0.15


def test_table_of_a_run(home, tmp_path, capsys):
    rows = open_rows(["glyphs"]).id
    run = exported(tmp_path / "run", DIGITS | {"size": 28, "rows": rows})
    other = exported(tmp_path / "other", DIGITS | {"size": 28, "rows": "0"})
    assert "other images than" in refused(digit_score.main, capsys, other, "--cache", home)
    options = (run, "--samples", 20, "--cache", home, "--device", "cpu")

    def quick(*more):
        """The row of one sampler, Euler in two steps."""
        call(digit_score.main, *options, "--quick", *more)
        return capsys.readouterr().out.splitlines()[-1].split()

    usual = quick()
    assert not (run / "digit_score.csv").exists()
    for more in (("--cfg", 4), ("--seed", 1), ("--solver", "heun"), ("--steps", 1)):
        assert quick(*more)[4] != usual[4], more
    call(digit_score.main, *options)
    table = pd.read_csv(run / "digit_score.csv")
    assert [*table.solver] == ["real", *sorted([*rf.SOLVERS] * 2)]
    assert [*table.steps[1:]] == [1, 2] * 3 and [*table.evaluations[1:]] == [1, 2, 1, 3, 2, 4]
    assert usual[:3] == ["euler", "2", "2"]
    assert float(usual[4]) == pytest.approx(table.frechet[2], abs=1e-3)
    assert (table.frechet_ratio * table.frechet[0]).tolist() == pytest.approx([*table.frechet])
    assert (run / "digit_score.png").stat().st_size > 1000


def test_a_table_of_the_users_is_left(home, tmp_path, capsys):
    run = exported(tmp_path / "run", DIGITS)
    (run / "digit_score.csv").write_text("mine")
    line = refused(digit_score.main, capsys, run, "--samples", 2)
    assert "digit_score.csv would be overwritten: move it away" in line
    assert (run / "digit_score.csv").read_text() == "mine"


def test_a_single_sample_is_refused_in_one_line(tmp_path, capsys):
    line = refused(digit_score.main, capsys, tmp_path, "--samples", 1)
    assert line == "experiments.digit_score: --samples 1 must be at least 2"
