"""experiments/throughput.py on small sizes: the tables are whole, the loader's rows are real."""

import gzip
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import call, close, opened, refused

import rf
from experiments import measure, throughput
from inputs.encoders import TextFormat

TINY = throughput.aura(
    dim=128, head_dim=64, n_layers=3, n_double_layers=1, text_dim=16, max_grid=4, base_dim=64
)
SMALL = throughput.Size(TINY, 2, 8, 4)


@pytest.fixture
def tiny(monkeypatch):
    """Every size small enough for a test."""
    for name in throughput.SIZES:
        monkeypatch.setitem(throughput.SIZES, name, SMALL)


def table(folder, command, *options):
    """The rows of the CSV that the command writes."""
    call(throughput.main, "--out", folder, command, *options)
    assert (folder / f"{command}.png").stat().st_size > 1000
    return pd.read_csv(folder / f"{command}.csv", comment="#")


def test_data_measures_every_combination(tmp_path):
    small = ("--size", 32, "--tokens", 8, "--length", 4, "--workers", 0, 1, "--repeats", 2)
    found = table(tmp_path, "data", *small)
    assert [*zip(found.text_bits, found.caption_tokens, found.workers, strict=True)] == [
        *product((16, 8), (4, 8), (0, 1))
    ]
    need = throughput.demand("1b", 4, 8)
    assert found.x_1b.tolist() == pytest.approx((found.rows_per_s / need).tolist())


def test_the_demand_is_the_share_of_the_peak():
    """AuraFlow at 256² with 256 tokens: 13.1 TFLOP an image; 0.55 · 989 / 13.1 images/s."""
    need = throughput.demand("auraflow-6.8b", 32, 256)
    assert need == pytest.approx(0.55 * 989 / 13.1, rel=0.01)


def test_the_made_up_folder_has_rows_of_the_real_sizes(tmp_path):
    throughput.made_up(tmp_path / "made", 4, TextFormat(8, 2048), 5, rows=16)
    _, rows = opened(tmp_path / "made")
    batch = rows.draw(range(3), 0)
    assert batch.stored.shape == (3, 2, 4, 4, 4) and batch.text.values.shape == (15, 2048)
    assert rows.facts["size"] == 32


@pytest.mark.parametrize(
    "command, names",
    [
        ("model", {"ours", "ours compiled", "diffusers", "diffusers compiled", "plain product"}),
        (
            "blocks",
            {
                "1 double + 2 single",
                "0 double + 4 single",
                "2 double + 0 single",
                "head_dim 64",
                "head_dim 128",
                "separate q k v and SwiGLU",
                "compiled",
            },
        ),
        ("sample", {"eager", "compiled", "mkl"}),
    ],
)
def test_every_variant_has_its_row(tmp_path, tiny, command, names):
    found = table(tmp_path, command, "--repeats", 1)
    assert set(found.variant) - {"ours mkl", "ours onednn"} == names
    assert (found.ms > 0).all()


def test_diffusers_variant_computes_what_ours_does(tiny, monkeypatch):
    """The same weights and the same batch: the losses of three steps are equal."""
    losses, rf_loss = [], rf.rf_loss

    def kept(*args, **options):
        losses.append(rf_loss(*args, **options))
        return losses[-1]

    monkeypatch.setattr(rf, "rf_loss", kept)
    for name in ("ours", "diffusers"):
        step, _ = throughput.variant(name, throughput.SIZES["cpu"])
        for _ in range(3):
            step()
    ours, theirs = torch.stack(losses).chunk(2)
    assert (ours[0] != ours[2]).all()
    close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_memory_is_measured_in_processes_that_take_turns(tmp_path, tiny, monkeypatch):
    turns = []

    def apply(function, args):
        turns.extend(args)
        return function(*args)

    def pool(processes, maxtasksperchild):
        assert (processes, maxtasksperchild) == (1, 1)
        return nullcontext(SimpleNamespace(apply=apply))

    def once(steps, repeats, inner=1):
        for step in steps.values():
            step()
        return measure.summary([dict.fromkeys(steps, inner if turns[-1] else 3 * inner)])

    spawn = {"spawn": SimpleNamespace(Pool=pool)}
    monkeypatch.setattr(throughput, "get_context", spawn.get)
    monkeypatch.setattr(throughput, "interleaved", once)
    found = table(tmp_path, "memory", "--repeats", 2)
    assert turns == [True, False] * 2
    assert found.memory.tolist() == ["kept", "kept", "usual", "usual"]
    assert found.ms.tolist() == [40, 1, 120, 3] and found.over_kept.tolist() == [1, 1, 3, 3]


def test_separate_matrices_are_the_same_network():
    model, (x, _, text, t) = throughput.built(TINY), throughput.batch_of(SMALL, "cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    expected = model(x, t, text)
    close(throughput.apart(model)(x, t, text), expected, atol=1e-4)


def test_a_step_is_taken_apart(tmp_path, monkeypatch):
    # DeepSpeed cannot begin another process group
    monkeypatch.setattr(throughput.dist, "destroy_process_group", lambda: None)
    options = ("--", "--batch-size", 8, "--micro-batch", 4, "--eval-prompts", 1, "--threads", 1)
    found = table(tmp_path, "step", "--steps", 3, "--repeats", 1, *options)
    found = found.set_index("part").ms
    assert [*found.index] == [*throughput.RANGES, "trainer", "bare"]
    assert (found.drop("communication, inside") > 0).all()
    assert found.forward + found.backward > found.log + found.signals
    with gzip.open(tmp_path / "step_trace.json.gz") as file:
        assert file.read().count(b'"name": "part backward"') == 3 * 2  # two passes a step


def test_a_command_that_is_none_ends_in_one_line(capsys):
    line = refused(throughput.main, capsys, "speed")
    assert line.startswith("experiments.throughput: --command 'speed' must be one of model, blocks")


def test_a_turn_is_one_untimed_call_and_the_timed_ones(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    found = measure.interleaved({name: partial(calls.append, name) for name in "ab"}, 2, inner=4)
    assert "".join(calls) == "aaaaabbbbb" * 3  # the first round warms up
    assert found.ms.tolist() == [250, 250] and found.spread.tolist() == [0, 0]
    found = measure.summary([{"a": ms} for ms in range(1, 6)])
    assert found.loc["a"].tolist() == pytest.approx([3, 1 / 3])
