"""tests/gpu_check.py with --cpu: what it checks on a GPU, as far as a CPU can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import records

from tests import gpu_check

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def check(out, *options):
    command = [sys.executable, "-m", "tests.gpu_check", "--cpu", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("section", "ABCDE")
def test_all_checks_hold_on_a_cpu(tmp_path, section):
    done = check(tmp_path / "out", "--only", section)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = records(tmp_path / "out" / "checks.csv")
    assert len(rows) > 1 and {row["check"][0] for row in rows} == {section}
    assert f"{len(rows)} of {len(rows)} checks hold" in done.stdout


def test_a_check_that_fails_and_a_section_that_dies_are_told(tmp_path, capsys, monkeypatch):
    def bad(device, out):
        yield gpu_check.most("too much", float("nan"), 1)
        yield gpu_check.least("enough", 2, 1)
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu_check.SECTIONS, "A", bad)
    (tmp_path / "A").mkdir()
    gpu_check.section("A", gpu_check.torch.device("cpu"), tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "FAILED too much: nan (≤ 1)",
        "ok     enough: 2 (≥ 1)",
        "FAILED A ended early: RuntimeError: no kernel image (-)",
    ]


def test_it_needs_a_gpu_or_its_option(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    for options in (["--out", str(tmp_path / "new")], ["--cpu", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            gpu_check.main(options)
    said = capsys.readouterr().err
    assert "no CUDA device is here" in said and "give a new folder" in said
