"""The plan against what a step of train_t2i.py really keeps and sends, on CPU ranks.

    python -m tests.plan_bytes --out runs/plan_bytes

Memory: bytes of all tensors that are alive when a step begins, and on top of them the highest sum
of what the step allocates and frees, as PyTorch's profiler writes it down. Traffic: the bytes that
a rank hands to reduce, all_reduce and all_gather for the others, a mean over the ranks. Three
networks, fp32 and bf16, one, two and four ranks; OUT/plan_bytes.csv has a row each, planned and
counted. What Muon's cut matrices send is counted apart, for the plan leaves it out.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import train_t2i
from common.log import append_row
from tools import plan

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"tiny": 16, "tiny-wide": 16, "small": 8}  # preset → images of a rank's pass
STEP = 3  # the one that is looked at: moments and averages are there
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def alive() -> int:
    """Bytes of the tensors that Python knows, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def highest(profile) -> int:
    """Of the running sum of what was allocated and freed."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def one_rank(out: Path, options: list[str]):
    """train_t2i.py, watched in one step. → OUT.RANK.json"""
    rank, sent, found, now = os.environ["RANK"], Counter(), {}, {"step": -1}
    original = train_t2i.train_step

    def step(run, batches):
        now["step"] = run.step
        if run.step != STEP:
            return original(run, batches)
        before = alive()
        with torch.profiler.profile(profile_memory=True) as profile:
            original(run, batches)
        found["memory"] = before + highest(profile)
        found["grid"] = run.config.max_grid

    def counted(name, bytes_of):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            if now["step"] == STEP:
                given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
                sent[name] += bytes_of(given[-1], args, kwargs)
            return function(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    W = int(os.environ["WORLD_SIZE"])
    others = {  # bytes that leave this rank, in a ring; of a call's tensors, the last
        "all_reduce": lambda x, a, k: 2 * x.nbytes * (W - 1) // W,
        "reduce": lambda x, a, k: x.nbytes * (str(k.get("dst", a[1] if len(a) > 1 else 0)) != rank),
        "all_gather_into_tensor": lambda x, a, k: x.nbytes * (W - 1),
        "all_gather": lambda x, a, k: x.nbytes * (W - 1),
        "all_to_all_single": lambda x, a, k: x.nbytes * (W > 1),
    }
    with ExitStack() as around:
        for name, bytes_of in others.items():
            around.enter_context(counted(name, bytes_of))
        around.enter_context(mock.patch.object(train_t2i, "train_step", step))
        train_t2i.main(["--out", str(out), *options])
    Path(f"{out}.{rank}.json").write_text(json.dumps(found | {"sent": sent}))


def ranks(count: int, out: Path, options: list[str]) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "tests.plan_bytes", "--rank", "--out", str(out), *options]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(count)
    ]
    ended = [process.wait() for process in running]
    assert not any(ended), f"{out} failed"
    return [json.loads(Path(f"{out}.{i}.json").read_text()) for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    args.out = args.out.resolve()
    if args.rank:
        return one_rank(args.out, options)
    args.out.mkdir(parents=True)
    ds = json.loads((ROOT / "ds_config.json").read_text())
    for preset, precision, count in product(SIZES, ("fp32", "bf16"), (1, 2, 4)):
        batch = SIZES[preset] * count
        words = f"""--preset {preset} --precision {precision} --batch-size {batch} --threads 1
        --micro-batch {SIZES[preset]} --samples {6 * batch} --eval-prompts 1 --sample-steps 1
        --compile off"""
        out = args.out / f"{preset}-{precision}-{count}"
        found = ranks(count, out, words.split())
        record = json.loads(next(out.glob("checkpoints/*/run.json")).read_text())
        config = train_t2i.MMDiT(train_t2i.fitted(  # as Run builds it
            preset, channels=3, text_dim=record["model"]["text_dim"],
            sides=[(record["settings"]["size"],) * 2],
        )).config  # fmt: skip
        wanted = plan.Settings(
            preset=preset, gpus=count, micro_batch=SIZES[preset], batch_size=batch,
            text_tokens=record["settings"]["text_tokens"], vae="pixels", precision=precision,
        )  # fmt: skip
        _, memory, *_, sent = plan.plan(config, wanted, ds)
        own = [Counter(each["sent"]) for each in found]
        muon = sum(each.pop("all_to_all_single", 0) for each in own) / count
        wire = sum(sum(each.values()) for each in own) / count
        peak = max(each["memory"] for each in found)
        row = {"preset": preset, "precision": precision, "ranks": count}
        row |= {"planned_mb": f"{memory['in all'] / 1e6:.2f}", "counted_mb": f"{peak / 1e6:.2f}"}
        row |= {"memory": f"{memory['in all'] / peak:.3f}"}
        row |= {"planned_sent_mb": f"{sent / 1e6:.3f}", "counted_sent_mb": f"{wire / 1e6:.3f}"}
        row |= {"sent": f"{sent / wire:.3f}" if wire else "-", "muon_mb": f"{muon / 1e6:.3f}"}
        append_row(args.out / "plan_bytes.csv", row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
