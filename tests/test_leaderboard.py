"""experiments/leaderboard.py: an entry is trained by its options, timed, scored, written down."""

import pytest
from helpers import call, records, refused
from test_digits import write_mnist

from experiments import leaderboard

pytestmark = pytest.mark.slow
SHORT = ["--batch-size", "8", "--sample-steps", "1"]


def enter(home, task, *options):
    files = ["--data-dir", home, "--cache", home / "readers", "--table", home / "board.csv"]
    call(leaderboard.main, task, "--name", "short", *files, "--out", home / "run", "--", *options)
    return records(home / "board.csv")[-1]


def test_entries_are_trained_timed_and_scored(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path, 40)
    monkeypatch.setattr(leaderboard, "NOISES", 2)
    monkeypatch.setattr(leaderboard, "PER_TAG", 2)
    row = enter(tmp_path, "digits", *SHORT, "--steps", 2, "--preset", "digits-narrow")
    recognised, ratio = map(float, row["score"].split(", "))
    assert 0 <= recognised < 0.985 and ratio > 1 and row["reached"] == "no"
    assert row["options"] == "--batch-size 8 --sample-steps 1 --steps 2 --preset digits-narrow"
    assert 0 < float(row["minutes"]) < 3 and "PyTorch" in row["machine"]
    (tmp_path / "run").rename(tmp_path / "digits")
    row = enter(tmp_path, "shapes", *SHORT, "--samples", 16, "--eval-prompts", 1)
    assert row["task"] == "shapes" and 0 <= float(row["score"]) <= 1 and row["reached"] == "no"
    assert len(records(tmp_path / "board.csv")) == 2
    what = ["shapes", "--name", "x", "--table", tmp_path / "board.csv", "--out", tmp_path / "run"]
    for option in ("--help", "--hel", "--stepz 5", "--lr nan"):  # no older run's score
        line = refused(leaderboard.main, capsys, *what, "--", *option.split())
        assert any(word in line for word in ("is not a whole run", "--stepz", "--lr nan"))
    assert not (tmp_path / "run.old").exists() and (tmp_path / "run").exists()  # nothing is moved
    for option in ("--data glyphs", "--resume", "--dry-run", "--out elsewhere"):
        line = refused(leaderboard.main, capsys, "digits", *what[1:], "--", *option.split())
        assert f"{option.split()[0]} after -- is not for an entry" in line
    table = tmp_path / "other.csv"
    table.write_text("a,b\n")
    line = refused(leaderboard.main, capsys, *what[:3], "--table", table, "--", *SHORT)
    assert "holds other columns: move it away" in line
    other = ["--init", "nowhere"]
    assert "the trainer ended with status 1" in refused(
        leaderboard.main, capsys, *what, "--", *other
    )
    assert len(records(tmp_path / "board.csv")) == 2
