"""Does this tree train what an earlier one trained? Losses, gradient norms, averages, to the bit.

    git worktree add ../before 175c5af
    python tests/unchanged.py ../before --keep ../unchanged
    python tests/unchanged.py ../before --keep ../unchanged --cases digits shapes

Each case runs with the earlier code and with this one, small, on the CPU, with one thread. Rows of
log.csv and eval.csv with the same step or number of samples are compared, and the averaged weights
that come out. With --keep the earlier code's runs stay, and a second call does not repeat them.
A difference that is not in EXPLAINED ends with exit status 1. Not a test of pytest's.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

# (case, column of the table): why it may differ
EXPLAINED: dict[tuple[str, str], str] = {}
# case: the step of a log row that is not compared: of the steps before a kill (11 to 15) and after
# it (16 to 20), chapter 2's log may hold only the latter
SPANS_A_KILL = {"shapes-resumed": 20}

DIGITS = "--steps 60 --batch-size 32 --warmup-steps 10 --sample-steps 2"
T2I = (
    "--samples 480 --batch-size 16 --eval-every-samples 240 --save-every-samples 240"
    " --eval-prompts 1 --warmup-samples 64 --cooldown-samples 128 --sample-steps 2 --threads 1"
)
PREPARE = "--size 32 --max-aspect 2 --caption text:1 --caption other:2 --validation 4"
TIMEOUT = 600  # seconds a command may take


class Tree:
    """One of the two: how its programs are called, and the folder for what they write."""

    def __init__(self, root: Path, out: Path, new: bool):
        self.root, self.out, self.new = root, out, new

    def once(self, name: str, make) -> Path:
        """The folder that make(folder) fills; not again if it is there already."""
        out, done = self.out / name, self.out / f"{name}.done"
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)
            (self.out / f"{name}.txt").unlink(missing_ok=True)
            make(out)
            done.touch()
        return out

    def run(self, out: Path, *command, ranks: int = 1, kill=None, number=signal.SIGTERM):
        """Run a command on so many ranks. kill: asked again and again; once it is true, each rank
        gets the signal `number`. RuntimeError if the command fails, or ends before it is killed.
        """
        env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
        each = [{}]  # what each rank has in its environment besides
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
            env["WORLD_SIZE"] = str(ranks)
            each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        command = [sys.executable, *map(str, command)]
        log = out.with_suffix(".txt")
        with open(log, "a") as file:
            print("$", *command, file=file, flush=True)
            how = {"cwd": self.root, "stdout": file, "stderr": file}
            processes = [subprocess.Popen(command, env=env | rank, **how) for rank in each]
            killed, deadline = False, time.monotonic() + TIMEOUT
            while any(p.poll() is None for p in processes):
                dead = any(p.poll() not in (None, 0) for p in processes)
                if kill is not None and not killed and kill():
                    killed = True
                    for p in processes:
                        p.send_signal(number)
                elif time.monotonic() > deadline or (dead and not killed):
                    for p in processes:
                        p.kill()
                time.sleep(0.02)
        if killed == (kill is None) or (not killed and any(p.returncode for p in processes)):
            raise RuntimeError(f"{' '.join(command[1:4])} … failed: see {log}")

    def digits(self, out: Path, *options, data="glyphs", **how):
        data = ("--data" if self.new else "--dataset", data)
        self.run(out, "train_mnist.py", *data, *DIGITS.split(), *options, "--out", out, **how)

    def t2i(self, out: Path, *options, **how):
        self.run(out, "train_t2i.py", *T2I.split(), *options, "--out", out, **how)

    def pairs(self, run: Path, out: Path, number: int, *options):
        program = ("-m", "tools.pairs") if self.new else ("pairs.py",)
        rows = ("--number", number, "--chunk" if self.new else "--shard", 90)
        self.run(out, *program, run, "--out", out, *rows, "--steps", 4, "--batch", 64, *options)


# ------------------------------------------------------------------------------------------------
# Cases: each returns the folder of a run
# ------------------------------------------------------------------------------------------------


def digits(tree: Tree) -> Path:
    return tree.once("digits", tree.digits)


def digits_resumed(tree: Tree) -> Path:
    def make(out: Path):
        tree.digits(out, kill=lambda: last_step(out) >= 20)
        tree.digits(out, "--resume")

    return tree.once("digits-resumed", make)


def digits_annealed(tree: Tree) -> Path:
    """Reflow. Chapter 1 used to train on every pair; now the last tenth is for evaluation."""
    number = 600 if tree.new else 540
    pairs = tree.once("digits-pairs", lambda out: tree.pairs(digits(tree), out, number))
    how = ("--init", digits(tree), "--anneal", 0.5)

    def make(out: Path):
        if tree.new:
            tree.digits(out, *how, data=pairs)
        else:
            tree.digits(out, *how, "--pairs", pairs)

    return tree.once("digits-annealed", make)


def shapes(tree: Tree) -> Path:
    return tree.once("shapes", tree.t2i)


def shapes_two_ranks(tree: Tree) -> Path:
    return tree.once("shapes-two-ranks", lambda out: tree.t2i(out, ranks=2))


def shapes_resumed(tree: Tree) -> Path:
    """Two ranks, killed after the checkpoint at 240 samples, and resumed from it on one rank."""

    def make(out: Path):
        def saved() -> bool:
            return last_step(out) >= 10 and (out / "checkpoints" / f"{240:012d}").exists()

        tree.t2i(out, ranks=2, kill=saved, number=signal.SIGKILL)
        tree.t2i(out, *(("--resume",) if tree.new else ("--resume", "auto")))

    return tree.once("shapes-resumed", make)


def shapes_pieces(tree: Tree) -> Path:
    """Pieces of paths (PeRFlow)."""

    def make_pairs(out: Path):
        tree.pairs(shapes(tree), out, 600, "--segments", 2)

    pairs = tree.once("shapes-pairs", make_pairs)
    how = ("--data" if tree.new else "--pairs", pairs, "--segments", 2, "--init", shapes(tree))
    return tree.once("shapes-pieces", lambda out: tree.t2i(out, *how))


def prepared(tree: Tree) -> Path:
    """Pictures of two aspect ratios, so two buckets, with two weighted columns of captions."""
    source = tree.once("source", write_source)
    program = ("-m", "tools.prepare") if tree.new else ("data_t2i.py", "prepare")

    def make_data(out: Path):
        tree.run(out, *program, source, "--out", out, *PREPARE.split())

    data = tree.once("prepared-data", make_data)
    return tree.once("prepared", lambda out: tree.t2i(out, "--data", data))


def write_source(out: Path):
    """60 pictures in two sizes, with metadata.jsonl."""
    out.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        height, width = ((64, 64), (64, 96))[i % 2]
        low = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(low).resize((width, height)).save(out / f"{i:02d}.png")
        words = ("red", "green", "blue")[int(low.mean((0, 1)).argmax())]
        rows.append({"file_name": f"{i:02d}.png", "text": f"mostly {words}", "other": f"no. {i}"})
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CASES = {
    "digits": digits,
    "digits-resumed": digits_resumed,
    "digits-annealed": digits_annealed,
    "shapes": shapes,
    "shapes-two-ranks": shapes_two_ranks,
    "shapes-resumed": shapes_resumed,
    "shapes-pieces": shapes_pieces,
    "prepared": prepared,
}
WHOLE = {"digits-resumed": "digits"}  # a resumed run, and the one that nothing interrupts

# ------------------------------------------------------------------------------------------------
# Comparing
# ------------------------------------------------------------------------------------------------


def rows_by(path: Path, key: str) -> dict[int, dict[str, float]]:
    """The rows of a CSV file by one of its columns; {} if it is not there (yet)."""
    if not path.exists():
        return {}
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    return {int(row[key]): {name: float(value) for name, value in row.items()} for row in rows}


def last_step(out: Path) -> int:
    return max(rows_by(out / "log.csv", "step"), default=0)


def average(out: Path) -> dict[str, torch.Tensor]:
    """The averaged weights: those at the end of a run, or of its newest checkpoint."""
    files = sorted(out.glob("checkpoints/*/ema_0.05/model.safetensors"))
    whole = out / "model.safetensors"
    return load_file(whole if whole.exists() else files[-1])


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def greatest(old: dict, new: dict, names: list[str]) -> float:
    """The greatest difference in these columns; inf where one lacks a row or a column."""
    if old.keys() != new.keys():
        return float("inf")
    a = np.array([[old[key].get(name, np.inf) for name in names] for key in old])
    b = np.array([[new[key].get(name, -np.inf) for name in names] for key in old])
    apart = np.where(np.isnan(a) & np.isnan(b), 0, abs(a - b))  # few rows may miss a time: NaN
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0))


def merged(rows: dict, steps: list[int]) -> dict:
    """The rows of a log as if there were one at each of these steps: a save may end a row early.

    A row is the mean over the steps since the row before; so is what comes out.
    """
    result, parts, before = {}, [], 0
    for step, row in sorted(rows.items()):
        parts.append((step - before, row))
        before = step
        if step in steps:
            total = sum(n for n, _ in parts)
            means = {name: sum(n * part[name] for n, part in parts) / total for name in row}
            result[step] = row if len(parts) == 1 else means
            parts = []
    return result


def compare(a: Path, b: Path, without: int | None = None) -> dict[str, tuple[float, str]]:
    """Column of the table → how far the runs a and b are apart, and in words.

    without: the step of a log row that is not compared.
    """
    logs = [rows_by(out / "log.csv", "step") for out in (a, b)]
    common = [step for step in logs[0] if step in logs[1]]
    cut = logs[0].keys() != logs[1].keys()
    same_end = last_step(a) == last_step(b)
    logs = [merged(log, common) for log in logs]
    for log in logs:
        log.pop(without, None)
    result = {}
    for title, name in (("loss", "loss"), ("grad norm", "grad_norm")):
        value = greatest(*logs, [name]) if same_end else float("inf")
        result[title] = (value, f"{value:.3g}")
        if cut and 0 < value < 1e-6:  # the mean of two means in fp32
            result[title] = (0.0, f"{value:.3g} (rounding)")
    evals = [rows_by(out / "eval.csv", "samples") for out in (a, b)]
    value = greatest(*evals, list(next(iter(evals[0].values()), {}))) if all(evals) else 0.0
    result["evaluation"] = (value, f"{value:.3g}" if all(evals) else "–")
    x, y = average(a), average(b)
    digests = fingerprint(x), fingerprint(y)
    if digests[0] == digests[1]:
        return result | {"average": (0.0, f"equal {digests[0]}")}
    if x.keys() != y.keys() or any(x[name].shape != y[name].shape for name in x):
        return result | {"average": (float("inf"), f"other tensors {digests}")}
    value = max((x[name].double() - y[name].double()).abs().max().item() for name in x)
    return result | {"average": (value or float("inf"), f"{value:.3g}")}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="work tree of the earlier code")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    args = parser.parse_args(argv)
    folder = args.keep or Path(tempfile.mkdtemp())
    old = Tree(args.before.resolve(), folder.resolve() / "before", new=False)
    new = Tree(ROOT, folder.resolve() / "now", new=True)
    shutil.rmtree(new.out, ignore_errors=True)
    for tree in (old, new):
        tree.out.mkdir(parents=True, exist_ok=True)
    lines = [("case", "loss", "grad norm", "evaluation", "average")]
    failed, notes = False, []
    for name in args.cases:
        found, runs = {}, []
        try:
            for tree in (old, new):
                runs.append(CASES[name](tree))
                if name in WHOLE:
                    whole = CASES[WHOLE[name]](tree)
                    found[f"{name} and whole, {tree.out.name}"] = compare(whole, runs[-1])
            found[name] = compare(*runs, SPANS_A_KILL.get(name))
        except RuntimeError as error:
            failed = True
            notes.append(f"{name}: {error}")
        for label, columns in found.items():
            lines.append((label, *(text for _, text in columns.values())))
            for column, (value, text) in columns.items():
                reason = EXPLAINED.get((label, column))
                if value and reason:
                    notes.append(f"{label}, {column} {text}: {reason}")
                failed |= bool(value) and not reason
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    print(*notes, f"runs: {folder}", sep="\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
