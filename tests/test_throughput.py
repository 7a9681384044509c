"""experiments/throughput.py on small sizes: the table is whole, the loader's rows are real."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import throughput
import torch

import measure
from cache import TextFormat
from mmdit import MMDiT, MMDiTConfig


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(line for line in file if line[0] != "#"))


def test_data_measures_every_combination(tmp_path, capsys):
    throughput.main(
        ["--out", str(tmp_path), "data", "--size", "32", "--tokens", "8", "--length", "4",
         "--workers", "0", "1", "--repeats", "2"]
    )  # fmt: skip
    found = rows(tmp_path / "data.csv")
    assert [(r["text_bits"], r["caption_tokens"], r["workers"]) for r in found] == [
        (bits, length, workers) for bits in ("16", "8") for length in "48" for workers in "01"
    ]
    need = throughput.demand("1b", 32, 8)
    for row in found:
        assert float(row["rows_per_s"]) > 10
        assert float(row["x_1b"]) == pytest.approx(float(row["rows_per_s"]) / need)
    assert "PyTorch" in capsys.readouterr().out


def test_the_demand_is_the_share_of_the_peak():
    """AuraFlow at 256² with 256 tokens: 13.1 TFLOP an image; 0.55 · 989 / 13.1 images/s."""
    need = throughput.demand("auraflow-6.8b", 256, 256)
    assert need == pytest.approx(0.55 * 989 / 13.1, rel=0.01)


def test_the_made_up_cache_is_a_cache(tmp_path):
    cache = throughput.made_up_cache(tmp_path, 32, TextFormat(8, 2048), 5, 16)
    row = cache.row(cache.shards[1], 2)
    assert row.image.shape == (2, 4, 4, 4) and row.features[0].shape == (5, 2048)


@pytest.fixture
def tiny(monkeypatch):
    """Every size small enough for a test."""
    config = MMDiTConfig(
        dim=128, head_dim=64, n_layers=3, n_double_layers=1, text_dim=16, max_grid=4,
        residual="auraflow", base_dim=64,
    )  # fmt: skip
    for name in throughput.SIZES:
        monkeypatch.setitem(throughput.SIZES, name, throughput.Size(config, 2, 8, 4))
    monkeypatch.setattr(MMDiT, "compile_blocks", lambda self, **kwargs: None)
    monkeypatch.setattr(torch, "compile", lambda network: network)


@pytest.mark.parametrize("command, variants", [
    ("model", {"ours", "ours compiled", "diffusers", "diffusers compiled", "plain product"}),
    ("blocks", {"1 double + 2 single", "0 double + 4 single", "2 double + 0 single", "head_dim 64",
                "head_dim 128", "separate q k v and SwiGLU", "compiled"}),
    ("sample", {"eager", "compiled", "mkl"}),
])  # fmt: skip
def test_every_variant_has_its_row(tmp_path, tiny, command, variants):
    throughput.main(["--out", str(tmp_path), command, "--repeats", "2"])
    found = rows(tmp_path / f"{command}.csv")
    assert {row["variant"] for row in found} - {"ours mkl"} == variants
    assert all(float(row.get("ms") or row["s"]) > 0 for row in found)


def test_memory_is_measured_in_processes_that_take_turns(tmp_path, tiny, monkeypatch, capsys):
    asked = []

    def child(command, **kwargs):
        asked.append(command[-1])
        ms = {"kept": 10.0, "usual": 15.0}[command[-1]] + len(asked) / 100
        said = {"training step, batch 64": ms, "24 guided steps, batch 128": 10 * ms}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(said))

    monkeypatch.setattr(throughput.subprocess, "run", child)
    throughput.main(["--out", str(tmp_path), "memory", "--repeats", "3"])
    assert asked == ["kept", "usual"] * 3
    found = rows(tmp_path / "memory.csv")
    assert [(r["memory"], float(r["ms"])) for r in found] == [
        ("kept", 10.03), ("usual", 15.04), ("kept", 100.3), ("usual", pytest.approx(150.4)),
    ]  # fmt: skip
    monkeypatch.undo()


def test_a_child_measures_both(tiny):
    found = throughput.memory_child(keep=False)
    assert len(found) == 2 and all(ms > 0 for ms in found.values())


def test_separate_matrices_are_the_same_network(tiny):
    config = throughput.SIZES["cpu"].config
    torch.manual_seed(0)
    model = MMDiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 4, 16)
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.allclose(throughput.apart(model)(*inputs), expected, atol=1e-4)


def test_a_step_is_taken_apart(tmp_path):
    """In a process of its own: the trainer takes over signals and the process group."""
    script = Path(throughput.__file__)
    options = ["--batch-size", "8", "--eval-prompts", "1"]
    command = [sys.executable, script, "--out", tmp_path, "step", "--steps", "3", "--repeats", "1"]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([*command, "--", *options], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["part"]: float(row["ms"]) for row in rows(tmp_path / "step.csv")}
    inside = ("data", "forward", "backward", "ZeRO-2 step", "AdamW", "averages", "log", "signals")
    assert set(found) == {*inside, "communication, inside", "trainer", "bare"}
    assert all(found[name] > 0 for name in (*inside, "trainer", "bare"))
    assert found["forward"] + found["backward"] > found["log"] + found["signals"]
    with gzip.open(tmp_path / "step_trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("part backward") >= 4  # one a step
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_the_chart_has_a_bar_for_each_row_with_a_number(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (drawn.append(figure), close(figure)))
    table = [{"variant": "a", "n": 2, "ms": 3.0}, {"variant": "b", "n": 1, "ms": float("nan")},
             {"variant": "c", "n": 1, "ms": 5.0}]  # fmt: skip
    measure.report(table, tmp_path / "x.csv", bar="ms")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [5.0, 3.0]  # the first row on top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c, 1", "a, 2"]
    assert (tmp_path / "x.png").exists()
