"""experiments/throughput.py on small sizes: the table is whole, the loader's rows are real."""

import csv

import pytest
import throughput

from cache import TextFormat


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
