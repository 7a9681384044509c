"""What every program needs: settings from four sources, whole files, signals, one-line errors, the
log."""

import csv
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_reads import HostReads

from common import cpu, log, start
from common.settings import Options, option, parse, settle
from common.start import NOTHING, SAVE, STOP, Signals
from mmdit import Linear

# --- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Options):
    data: list[str] = option(["here"], "what it learns", group="rows")
    lr: float = option(0.5, "up to 100 %", above=0, fixed=True)
    steps: int = option(7, "how many", least=1)
    mode: str = option("slow", "how", choices=("slow", "fast"))
    size: int | None = option(None, "pixels", fixed=True)
    half: bool | None = option(None, "precision", local=True)
    resume: bool = option(False, "go on", local=True)
    save_to: Path = option(Path("runs"), "a folder")
    prompt: list[str] = option([], "captions", positional=True)


@pytest.mark.parametrize(
    "line, typed",
    [
        ("", {}),
        ("--lr 2 --data a b --resume", {"lr": 2.0, "data": ["a", "b"], "resume": True}),
        ("--no-half --size 3 --local_rank 1", {"half": False, "size": 3}),
        ("one --half two --mode auto", {"prompt": ["one", "two"], "half": True}),
        ("--save-to x", {"save_to": Path("x")}),
    ],
)
def test_parse_gives_what_was_typed_alone(line, typed):
    found = parse(Settings, line.split(), "about")
    assert {k: v for k, v in found.items() if v != []} == typed


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


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mode": "new"}, "--mode 'new' must be one of slow, fast"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"lr": float("inf")}, "--lr inf must be finite"),
    ],
)
def test_bad_values_name_option_value_and_rule(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**values)


@pytest.mark.parametrize(
    "sources, expected",
    [
        ({"defaults": [{"lr": 3.0}, {"lr": 4.0, "steps": 2}]}, {"lr": 3.0, "steps": 2}),
        ({"saved": {"steps": 3, "half": True}, "defaults": [{"steps": 4}]}, {"steps": 3}),
        ({"saved": {"steps": 3, "lr": 2.0}, "typed": {"steps": 9}}, {"steps": 9, "lr": 2.0}),
        ({"facts": {"size": 8}, "defaults": [{"size": 9}], "typed": {"size": 8}}, {"size": 8}),
        ({"facts": {"size": 8}, "typed": {"size": 9}}, "--size 9 does not fit --data, .* with 8"),
        ({"saved": {"lr": 1.0}, "typed": {"lr": 2.0}}, "--lr 2.0 differs .* has 1.0: drop it"),
        ({"saved": {"size": 1}, "facts": {"size": 2}}, "--size 2 differs from the run to resume"),
    ],
)
def test_sources_give_way_in_order_or_contradict_each_other(sources, expected):
    sources = {"typed": {}, "saved": {}, "facts": {}, "defaults": []} | sources
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            settle(Settings, **sources)
    else:
        assert settle(Settings, **sources) == Settings(**expected)


def test_a_run_keeps_its_settings_without_those_of_the_call():
    kept = Settings(half=True, save_to=Path("a")).saved()
    assert kept.keys() == {"data", "lr", "steps", "mode", "size", "save_to", "prompt"}
    assert kept["save_to"] == "a"


# --- start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, cuda, mps, expected",
    [
        ("auto", True, True, "cuda"),
        ("auto", False, True, "mps"),
        ("cpu", True, True, "cpu"),
        ("cuda", False, True, "'cuda' is not here; this machine has: mps, cpu"),
    ],
)
def test_a_device_is_chosen_of_those_that_are_here(monkeypatch, name, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            start.choose_device(name)
    else:
        assert start.choose_device(name).type == expected


def test_beginning_tunes_the_products_of_the_device():
    torch.set_float32_matmul_precision("highest")
    start.begin(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    assert Linear.product is not cpu.linear
    start.begin(torch.device("cpu"))
    assert (Linear.product is cpu.linear) == cpu.available()


def test_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "file"
    start.write_whole(path, b"first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=f"{path} could not be written: File too large"):
            start.write_whole(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    start.write_whole(path, memoryview(b"second"))
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


def test_signals_ask_to_save_or_to_stop():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as signals:
        for raised, expected in [
            ((), NOTHING),
            ((signal.SIGUSR1,), SAVE),
            ((signal.SIGTERM, signal.SIGUSR1), STOP),
            ((signal.SIGINT,), STOP),
        ]:
            for number in raised:
                signal.raise_signal(number)
            assert (signals.take(), signals.take()) == (expected, NOTHING)
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(number) for number in numbers]


def test_so_many_minutes_ask_to_save_once(monkeypatch):
    now = iter([0, 119, 120, 121, 240, 241])
    monkeypatch.setattr(start.time, "monotonic", lambda: next(now))
    signals = Signals(minutes=2)
    asked = [signals.take(), signals.take(), signals.take(), signals.take(clock=False)]
    assert asked == [NOTHING, SAVE, NOTHING, NOTHING] and signals.take() == SAVE


@pytest.mark.parametrize(
    "error, rank, local_rank, said",
    [
        (ValueError("a worker's\ntraceback\n\nthe reason\n"), "0", "0", "it: the reason\n"),
        (FloatingPointError("nan"), "4", "0", "it: nan (rank 4)\n"),
        (ValueError("every rank knows"), "1", "1", ""),
        (OSError("this disk alone"), "5", "1", "it: this disk alone (rank 5)\n"),
        (KeyboardInterrupt(), "0", "0", "it: interrupted; every file is whole\n"),
    ],
)
def test_errors_end_in_one_line(monkeypatch, capsys, error, rank, local_rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    @start.program("it")
    def main(argv=None):
        if argv is not None:
            return argv
        raise error

    assert main(["x"]) == ["x"]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err == said


# --- log -----------------------------------------------------------------------------------------


def read(path):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(path))]


def test_rows_are_means_over_steps_passes_and_ranks(tmp_path):
    """Two passes a step, two ranks; what is not finite is left out, and the first such step named.
    Within an interval nothing is read from the device."""
    path = tmp_path / "log.csv"
    run = log.Log(path, 3, lambda losses: torch.stack([losses, losses + 2]))

    def steps(first, last, nan=0):
        for step in range(first, last + 1):
            run.add(torch.tensor(float(step)))
            run.add(torch.tensor(float("nan") if step == nan else step + 1))
            row = run.end_step(
                step, 8 * step, torch.tensor(10.0 * step), lr=1 / step, skipped=step // 5
            )
        return row

    with HostReads() as reads:
        assert steps(1, 2) is None
    assert reads.seen == []
    first = {"step": 3, "samples": 24, "loss": 3.5, "grad_norm": 20, "lr": 1 / 3, "skipped": 0}
    assert steps(3, 3) == first and run.bad_step is None
    assert steps(4, 6, nan=5) is run.rows[1] and run.bad_step == 5
    last = {"step": 6, "samples": 48, "loss": 6.5, "grad_norm": 50, "lr": 1 / 6, "skipped": 1}
    assert run.rows == [first, last] == read(path)
    steps(7, 7)
    assert run.flush()["loss"] == 8.5 and run.flush() is None and run.bad_step is None
    log.write_rows(path, run.rows[:1])  # a resumed run begins with what it knew
    log.append_row(path, last)
    assert read(path) == [first, last]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert log.device_peak(torch.device("cuda")) == peak
    assert log.device_peak(torch.device("cpu")) is None


def test_the_bar_says_what_the_devices_do():
    """1,000 images/s of 3 x 0.1 GFLOP are 0.3 TFLOP/s, 15 % of two devices that can do 1."""
    said, row = [], {"loss": 0.09312, "grad_norm": 0.213, "skipped": 0}
    bar = SimpleNamespace(format_dict={"rate": 1000.0}, set_postfix_str=said.append)
    log.show(bar, row, 1e8, 1, ranks=2)
    log.show(bar, row | {"skipped": 2}, 1e8, None)
    plain = "loss 0.0931, |g| 0.21, 0.30 TFLOP/s"
    assert said == [f"{plain}, MFU 15%", f"{plain}, 2 skipped"]
