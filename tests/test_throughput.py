"""experiments/throughput.py on small sizes: the tables are whole, the loader's rows are real."""

import gzip
import json

import pandas as pd
import pytest
import torch
from helpers import call, opened, refused

from experiments import measure, throughput
from inputs.encoders import TextFormat
from mmdit import MMDiT, MMDiTConfig

TINY = MMDiTConfig(
    dim=128,
    head_dim=64,
    n_layers=3,
    n_double_layers=1,
    text_dim=16,
    max_grid=4,
    residual="auraflow",
    base_dim=64,
)


@pytest.fixture
def tiny(monkeypatch):
    """Every size small enough for a test."""
    for name in throughput.SIZES:
        monkeypatch.setitem(throughput.SIZES, name, throughput.Size(TINY, 2, 8, 4))


def table(folder, command, *options):
    """The rows of the CSV that the command writes."""
    call(throughput.main, "--out", folder, command, *options)
    assert (folder / f"{command}.png").stat().st_size > 1000
    return pd.read_csv(folder / f"{command}.csv", comment="#")


def test_data_measures_every_combination(tmp_path, capsys):
    small = ("--size", 32, "--tokens", 8, "--length", 4)
    found = table(tmp_path, "data", *small, "--workers", 0, 1, "--repeats", 2)
    assert found[["text_bits", "caption_tokens", "workers"]].values.tolist() == [
        [bits, length, workers] for bits in (16, 8) for length in (4, 8) for workers in (0, 1)
    ]
    need = throughput.demand("1b", 4, 8)
    assert (found.rows_per_s > 10).all()
    assert found.x_1b.tolist() == pytest.approx((found.rows_per_s / need).tolist())
    assert "PyTorch" in capsys.readouterr().out


def test_the_demand_is_the_share_of_the_peak():
    """AuraFlow at 256² with 256 tokens: 13.1 TFLOP an image; 0.55 · 989 / 13.1 images/s."""
    need = throughput.demand("auraflow-6.8b", 32, 256)
    assert need == pytest.approx(0.55 * 989 / 13.1, rel=0.01)


def test_the_made_up_folder_has_rows_of_the_real_sizes(tmp_path):
    throughput.made_up(tmp_path / "made", 4, TextFormat(8, 2048), 5, rows=16)
    settings, rows = opened(tmp_path / "made")
    rows.random = True
    batch = rows.draw(range(3), settings.seed)
    assert batch.stored.shape == (3, 2, 4, 4, 4) and batch.noise.shape == (3, 4, 4, 4)
    assert batch.text.values.shape == (15, 2048)
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
    assert set(found.variant) - {"ours mkl"} == names
    assert (found.ms > 0).all()


def test_diffusers_variant_computes_what_ours_does(tiny, monkeypatch):
    """The same weights and the same batch: the losses of three steps are equal."""
    losses = {}
    for name in ("ours", "diffusers"):
        seen = losses[name] = []
        rf_loss = throughput.rf.rf_loss

        def kept(*args, rf_loss=rf_loss, seen=seen, **options):
            loss = rf_loss(*args, **options)
            seen.append(loss.detach().mean())
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(throughput.rf, "rf_loss", kept)
            step, _ = throughput.variant(name, throughput.SIZES["cpu"])
            for _ in range(3):
                step()
    assert losses["ours"][0] != losses["ours"][2]
    torch.testing.assert_close(losses["ours"], losses["diffusers"], rtol=1e-4, atol=1e-5)


def test_memory_is_measured_in_processes_that_take_turns(tmp_path, monkeypatch):
    asked = []

    class Pool:
        def __init__(self, processes, maxtasksperchild):
            assert (processes, maxtasksperchild) == (1, 1)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def apply(self, function, args):
            assert function is throughput.digits_ms
            asked.extend(args)
            ms = (10.0 if args[0] else 15.0) + len(asked) / 100
            return {"training": ms, "sampling": 10 * ms}

    context = type("Context", (), {"Pool": Pool})
    monkeypatch.setattr(throughput, "get_context", {"spawn": context}.get)
    found = table(tmp_path, "memory", "--repeats", 3)
    assert asked == [True, False] * 3
    assert found.memory.tolist() == ["kept", "kept", "usual", "usual"]
    assert found.ms.tolist() == pytest.approx([10.03, 100.3, 15.04, 150.4])
    assert found.over_kept.tolist() == pytest.approx([1, 1, 15.04 / 10.03, 15.04 / 10.03])


def test_a_process_measures_both(tiny, monkeypatch):
    def once(steps, repeats, inner=1):
        for step in steps.values():
            step()
        return measure.summary([dict.fromkeys(steps, inner)])

    monkeypatch.setattr(throughput, "interleaved", once)
    found = throughput.digits_ms(keep=False)
    assert found == {"training step, batch 64": 40, "24 guided steps, batch 128": 1}


def test_separate_matrices_are_the_same_network(tiny):
    torch.manual_seed(0)
    model = MMDiT(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 4, 16)
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.allclose(throughput.apart(model)(*inputs), expected, atol=1e-4)


def test_a_step_is_taken_apart(tmp_path, monkeypatch):
    # DeepSpeed cannot begin another process group
    monkeypatch.setattr(throughput.dist, "destroy_process_group", lambda: None)
    options = ("--", "--batch-size", 8, "--micro-batch", 4, "--eval-prompts", 1, "--threads", 1)
    found = table(tmp_path, "step", "--steps", 3, "--repeats", 1, *options)
    found = found.set_index("part").ms
    assert [*found.index] == [*throughput.RANGES, "trainer", "bare"]
    assert (found.drop("communication, inside") > 0).all()
    assert found.forward + found.backward > found.log + found.signals
    inside = found.drop(["trainer", "bare", "communication, inside"]).sum()
    assert inside < 5 * found.trainer  # the profiler slows it down, but it is the same step
    with gzip.open(tmp_path / "step_trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("part backward") == 3 * 2  # two passes a step


def test_bad_options_end_in_one_line(capsys):
    line = refused(throughput.main, capsys, "speed")
    assert line.startswith("experiments.throughput: --command 'speed' must be one of model, blocks")
    line = refused(throughput.main, capsys, "step", "--", "--batch-size", 0)
    assert line == "experiments.throughput: --batch-size 0 must be at least 1"


def test_a_turn_is_one_untimed_call_and_the_timed_ones(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measure.interleaved(steps, repeats=2, inner=4)
    assert "".join(calls) == "aaaaabbbbb" * 3  # the first round warms up
    assert found.ms.to_dict() == {"a": 250, "b": 250} and (found.spread == 0).all()
    found = measure.summary([{"a": ms} for ms in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert found.loc["a"].tolist() == pytest.approx([3, 1 / 3])


def test_the_chart_has_a_bar_for_each_row_with_a_number(tmp_path, monkeypatch):
    drawn, draw = [], pd.DataFrame.plot.barh
    keep = monkeypatch.setattr
    keep(pd.DataFrame.plot, "barh", lambda *a, **o: drawn.append(draw(*a, **o)) or drawn[-1])
    rows = [
        {"variant": "a", "n": 2, "ms": 3.0},
        {"variant": "b", "n": 1, "ms": float("nan")},
        {"variant": "c", "n": 1, "ms": 5.0},
    ]
    measure.report(pd.DataFrame(rows), tmp_path / "x.csv")
    (axes,) = drawn
    assert [bar.get_width() for bar in axes.patches] == [5.0, 3.0]  # the first row on top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c, 1", "a, 2"]
    assert (tmp_path / "x.png").exists()
