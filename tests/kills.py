"""kill −9 at random moments: nothing is lost, and the end is the same to the byte.

    python tests/kills.py                  50 kills of each program: the table
    python tests/kills.py --kills 3        fewer

Each program runs once to its end. Then it is begun again in another folder, killed at a random
moment, and given the same command (trainers: with --resume) until it was killed --each times; after
that it may end. What the first one left and what this one left must be equal. That goes on until
--kills are reached. Moments come from a seed. Processes are forked with all modules loaded, so the
moments fall into work and not into imports.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402
from helpers import DIGITS, exported  # noqa: E402
from test_digits import write_mnist  # noqa: E402
from test_prepare import pictures  # noqa: E402

import train_mnist  # noqa: E402
import train_t2i  # noqa: E402
from tools import pairs, prepare  # noqa: E402

torch.set_num_threads(1)
MNIST = """--device cpu --preset digits-narrow --steps 120 --batch-size 8 --checkpoint-every 10
--sample-steps 1 --resume --data mnist --data-dir"""
T2I = """--threads 1 --samples 160 --batch-size 8 --eval-every-samples 40 --save-every-samples 16
--eval-prompts 1 --sample-steps 1 --keep 2 --resume --data mnist --data-dir"""
PREPARE = "--size 16 --text-tokens 8 --workers 1 --batch 2 --chunk-rows 4 --validation 8"
PAIRS = "--steps 8 --number 400 --chunk 10 --device cpu"


def programs(home: Path) -> dict[str, tuple[Callable, list[str], int]]:
    """name → main, its options without --out, ranks."""
    return {
        "train_mnist": (train_mnist.main, [*MNIST.split(), str(home)], 1),
        "train_t2i, 1 rank": (train_t2i.main, [*T2I.split(), str(home)], 1),
        "train_t2i, 2 ranks": (train_t2i.main, [*T2I.split(), str(home)], 2),
        "prepare": (prepare.main, [str(home / "source"), *PREPARE.split()], 1),
        "pairs": (pairs.main, [str(home / "first"), *PAIRS.split()], 1),
    }


def start(main: Callable, argv: list[str], ranks: int, log: Path) -> list[int]:
    """Fork a process for each rank; what they say goes to the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # of a trainer that this process may have been
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        if ranks > 1:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in where.items()}
        status = 1
        try:
            main(argv)
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            os._exit(status)
    return children


def end(children: list[int]) -> bool:
    """Whether all of them end well."""
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return not any(statuses)


def left(out: Path) -> dict[str, bytes]:
    """What counts of a folder: all but pictures and shards, which hold addresses and times."""
    files = [f for f in out.rglob("*") if f.is_file() and f.suffix not in (".pt", ".png", ".gif")]
    keep = (f for f in files if f.name not in ("run.json", "zero_to_fp32.py"))
    found = {str(f.relative_to(out)): f.read_bytes() for f in keep}
    names = [f.name for f in out.rglob("*") if f.name[0] == "." or "partial" in f.name]
    assert not names, f"half-written: {names}"
    return found | {f.name: b"" for f in (out / "checkpoints").glob("*")}


def attack(name: str, what: tuple, home: Path, kills: int, each: int, moments: random.Random):
    """→ a row of the table; AssertionError if something was lost."""
    main, options, ranks = what
    whole, log, runs, done, tried = home / f"{name} whole", home / f"{name}.log", 0, 0, 0
    started = time.monotonic()
    assert end(start(main, [*options, "--out", str(whole)], ranks, log)), log.read_text()[-2000:]
    length, wanted = time.monotonic() - started, left(whole)
    while done < kills:
        out = home / f"{name} {runs}"
        until = min(done + each, kills)
        while done < until:
            children = start(main, [*options, "--out", str(out)], ranks, log)
            time.sleep(moments.uniform(0, 0.6 * length))
            for child in children:  # of two ranks, one dies a little later, as on two machines
                os.kill(child, signal.SIGKILL)
            done += not end(children)  # one that came too late does not count
            tried += 1
        assert end(start(main, [*options, "--out", str(out)], ranks, log)), log.read_text()[-2000:]
        found = left(out)
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        differs = [file for file in wanted if found[file] != wanted[file]]
        assert not differs, f"{name}, run {runs}: {differs} differ"
        shutil.rmtree(out)
        runs += 1
    return f"{name:20}{done:7}{tried - done:10}{runs:7}{length:14.1f}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each program")
    parser.add_argument("--each", type=int, default=5, help="kills of one run before it may end")
    parser.add_argument("--only", default="", help="programs whose name begins so")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write_mnist(home)
        pictures(home / "source", 60)
        exported(home / "first", DIGITS)
        print(f"{'program':20}{'kills':>7}{'too late':>10}{'runs':>7}{'one takes, s':>14}")
        chosen = {k: v for k, v in programs(home).items() if k.startswith(args.only)}
        for name, what in chosen.items():
            kills = -(-args.kills // 2) if "rank" in name else args.kills
            moments = random.Random(f"{args.seed} {name}")
            print(attack(name, what, home, kills, args.each, moments), flush=True)
    print("nothing was lost")


if __name__ == "__main__":
    main()
