"""What every program needs: settings from four sources, whole files, signals, one-line errors, the
log."""

import math
import signal
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import records

from common import cpu, log, start
from common.settings import Options, Parted, changes, option, parse, settle
from common.start import NOTHING, SAVE, STOP, Signals
from inputs.sources import Damaged
from mmdit import Linear

# --- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Options):
    data: list[str] = option(["here"], "what it learns", group="rows")
    lr: float = option(0.5, "up to 100 %", above=0, fixed=True)
    steps: int = option(7, "how many", least=7)
    mode: str = option("auto", "how")
    name: str | None = option(None, "of a column, say")
    size: int | None = option(None, "pixels", fixed=True)
    half: bool | None = option(None, "precision", local=True)
    resume: bool = option(False, "go on", local=True)
    save_to: Path = option(Path("runs"), "a folder")
    prompt: list[str] = option([], "captions", positional=True)


def test_parse_gives_what_was_typed_alone():
    line = """one --lr 2 --data a b --resume --no-half --size 3 --local_rank 1 --mode auto
    --name auto --save-to x two"""
    typed = {"lr": 2.0, "data": ["a", "b"], "resume": True, "half": False, "size": 3}
    typed |= {"name": "auto", "save_to": Path("x"), "prompt": ["one", "two"]}
    assert parse(Settings, line.split(), "about") == typed
    assert not any(parse(Settings, [], "about").values())


def test_help_is_made_of_the_options(capsys):
    recipes = {"small": {"steps": 2}, "large": {"steps": 9, "size": 64}}
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"], "What it does.", recipes)
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "What it does.",
        "rows: --data DATA [DATA ...] what it learns (default: here)",
        "--lr LR up to 100 % (default: 0.5)",
        "--steps STEPS how many (small 2, large 9)",
        "--size SIZE pixels (large 64)",
        "--half, --no-half precision",
        "--resume go on --save-to TO a folder (default: runs)",
    ):
        assert part in said, part
    assert "local_rank" not in said
    with pytest.raises(ValueError, match="needs its line of help"):
        option(1, "")


def test_sources_give_way_in_order():
    """Rows, command line, the run to resume (nothing local), the defaults one after another."""
    found = settle(
        Settings,
        facts={"size": 8},
        typed={"size": 8, "steps": 9},
        saved={"steps": 3, "lr": 2.0, "half": True},
        defaults=[{"size": 9, "lr": 3.0, "data": ["a"]}, {"data": ["b"], "save_to": "x"}],
    )
    assert found == Settings(size=8, steps=9, lr=2.0, data=["a"], save_to="x")


@pytest.mark.parametrize(
    "typed, saved, facts, message",
    [
        ({"size": 9}, {}, {"size": 8}, "--size 9 does not fit --data, which was made with 8"),
        ({"lr": 2.0}, {"lr": 1.0}, {}, "--lr 2.0 differs from the run to resume, which has 1.0"),
        ({}, {"size": 1}, {"size": 2}, "--size 2 differs from the run to resume, which has 1"),
    ],
)
def test_sources_that_contradict_each_other(typed, saved, facts, message):
    with pytest.raises(ValueError, match=message):
        settle(Settings, typed, saved=saved, facts=facts, defaults=[])


def test_a_run_keeps_its_settings_without_those_of_the_call():
    kept = {
        "data": ["here"],
        "lr": 0.5,
        "steps": 7,
        "mode": "auto",
        "name": None,
        "size": None,
        "save_to": "a",
    }
    assert Settings(half=True, save_to=Path("a")).saved() == kept | {"prompt": []}
    saved = Settings(steps=8, half=True, save_to=Path("a")).saved()
    assert changes(saved, Settings()) == "--steps 8 -> 7; --save-to a -> runs"
    assert changes(saved, Settings(steps=8, save_to=Path("a"))) == changes({}, Settings()) == ""


def test_parts_are_the_whole_each_piece_once():
    pieces = [list(range(11))[Parted(part=f"{i}/4").share] for i in range(4)]
    assert pieces[2] == [2, 6, 10] and sorted(chain(*pieces)) == list(range(11))
    assert list(range(3))[Parted().share] == [0, 1, 2] and [1][Parted(part="1/2").share] == []
    for part in ("2/2", "8/8", "1", "", "/2", "1/", "-1/2", "1/2/3", "a/b", "0/0", "0.5/2"):
        with pytest.raises(ValueError, match=rf"--part {part} must be i/n with 0 ≤ i < n, such as"):
            Parted(part=part)


# --- start ---------------------------------------------------------------------------------------


def test_a_device_is_chosen_of_those_that_are_here(monkeypatch):
    here = {"cuda": False, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here["mps"])
    assert start.choose_device("auto").type == "mps"
    with pytest.raises(ValueError, match="'cuda' is not here; this machine has: mps, cpu"):
        start.choose_device("cuda")
    here["cuda"] = True
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [start.choose_device(name).type for name in ("auto", "cpu")] == ["cuda", "cpu"]
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert start.choose_device("cuda:1") == torch.device("cuda", 1) == current.pop()
    assert start.choose_device("cuda") == torch.device("cuda") and not current
    for name in ("cuda:2", "cuda:-1", "cuda:x", "cuda:", "gpu"):
        said = f"'{name}' is not here; this machine has: cuda, cuda:0, cuda:1, mps, cpu"
        with pytest.raises(ValueError, match=said):
            start.choose_device(name)


def test_beginning_tunes_the_products_of_the_device():
    torch.set_float32_matmul_precision("highest")
    start.begin(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    assert Linear.product is not cpu.linear
    start.begin(torch.device("cpu"))
    assert (Linear.product is cpu.linear) == cpu.available()


def test_signals_ask_to_save_or_to_stop():
    numbers = {signal.SIGUSR1: SAVE, signal.SIGTERM: STOP, signal.SIGINT: STOP}
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as signals:
        assert signals.take() == NOTHING
        for number, expected in numbers.items():
            signal.raise_signal(number)
            assert [signals.take(), signals.take()] == [expected, NOTHING]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.take() == STOP
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(number) for number in numbers]


def test_so_many_minutes_ask_to_save_once(monkeypatch):
    now = iter([0, 119, 120, 121, 240, 241])
    monkeypatch.setattr(start.time, "monotonic", lambda: next(now))
    signals = Signals(minutes=2)
    asked = [signals.take(clock) for clock in (True, True, True, False, True)]
    assert asked == [NOTHING, SAVE, NOTHING, NOTHING, SAVE]


LITTLE = "too little memory: lower the batch, the size or the network"


@pytest.mark.parametrize(
    "error, rank, local_rank, said",
    [
        (ValueError("a worker's\ntraceback\n\nthe reason\n"), "0", "0", "it: the reason\n"),
        (FloatingPointError("nan"), "4", "0", "it: nan (rank 4)\n"),
        (ValueError("every rank knows"), "1", "1", ""),
        (ValueError("no launcher"), None, "1", "it: no launcher\n"),
        (OSError("this disk alone"), "5", "1", "it: this disk alone (rank 5)\n"),
        (Damaged("a row of this rank"), "5", "1", "it: a row of this rank (rank 5)\n"),
        (MemoryError("here"), "5", "1", f"it: {LITTLE} (here) (rank 5)\n"),
        (KeyboardInterrupt(), "0", "0", "it: interrupted; every file is whole\n"),
        (MemoryError("no"), "0", "0", f"it: {LITTLE} (no)\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), "0", "0", f"it: {LITTLE} (CUDA out of me"),
        (RuntimeError("can't allocate memory: 9 bytes"), "0", "0", f"it: {LITTLE} (can't alloc"),
    ],
)
def test_errors_end_in_one_line(monkeypatch, capsys, error, rank, local_rank, said):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank}.items():
        if value is not None:
            monkeypatch.setenv(name, value)

    @start.program("it")
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    found = capsys.readouterr().err
    assert ended.value.code == 1 and found.startswith(said) and found.count("\n") == bool(said)


def test_a_mistake_of_ours_keeps_its_traceback():
    @start.program("it")
    def main(argv=None):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError):
        main()


# --- log -----------------------------------------------------------------------------------------


def test_rows_are_means_over_steps_passes_and_ranks(tmp_path, capsys):
    """Two passes a step, two ranks; what is not finite is left out, and the first one named."""
    path, bad = tmp_path / "log.csv", []
    run = log.Log(path, 3, lambda losses: torch.stack([losses, losses + 2]))
    run.changed = changed = "--lr 2 -> 1"
    run.begin()
    assert capsys.readouterr().out == f"changed from here on: {changed}\n"
    for step in range(1, 8):
        for loss in (step, math.nan if step == 5 else step + 1):
            run.add(torch.tensor(float(loss)))
        row = run.end_step(step, 8 * step, torch.tensor(10.0 * step), lr=1 / step)
        assert row is (None if step % 3 else run.rows[-1])
        bad.append(run.bad_step)
    assert bad == [*5 * [None], 5, 5] and run.flush() and run.bad_step is run.flush() is None
    assert run.rows == [
        {"step": 3, "samples": 24, "loss": 3.5, "grad_norm": 20, "lr": 1 / 3, "changed": changed},
        {"step": 6, "samples": 48, "loss": 6.5, "grad_norm": 50, "lr": 1 / 6, "changed": ""},
        {"step": 7, "samples": 56, "loss": 8.5, "grad_norm": 70, "lr": 1 / 7, "changed": ""},
    ]
    assert records(path) == [{name: str(x) for name, x in row.items()} for row in run.rows]


def test_peaks_are_found_by_the_name_of_the_device(monkeypatch):
    peaks = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200 NVL": 835,
        "NVIDIA GH200 480GB": 990,
        "NVIDIA A10G": 70,
        "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 2080": None,
    }
    names = list(peaks)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    found = [log.device_peak(torch.device("cuda", i)) for i in range(len(names))]
    assert found == list(peaks.values())
    assert log.device_peak(torch.device("cpu")) is None


def test_the_bar_says_what_the_devices_do():
    """1,000 images/s of 3 x 0.1 GFLOP are 0.3 TFLOP/s, 15 % of two devices that can do 1."""
    said, row = [], {"loss": 0.09312, "grad_norm": 0.213, "skipped": 0}
    bar = SimpleNamespace(format_dict={"rate": 1000.0}, set_postfix_str=said.append)
    log.show(bar, row, 1e8, 1, ranks=2)
    log.show(bar, row | {"skipped": 2}, 1e8, None)
    plain = "loss 0.0931, |g| 0.21, 0.30 TFLOP/s"
    assert said == [f"{plain}, MFU 15%", f"{plain}, 2 skipped"]
