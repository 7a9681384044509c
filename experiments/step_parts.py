"""A step of train_t2i.py taken apart from outside: the loop stays plain (throughput.py step).

trainer_steps   seconds of steps of the real loop          ranges   names its parts for the profiler
bare_step       loss, gradients and AdamW alone            parts    the profile as a table
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rf
import train_t2i
from measure import synchronize
from mmdit import MMDiT


def trainer_steps(run: train_t2i.Run, steps: int) -> list[float]:
    """Seconds of each step of the real loop but the first, with nothing in it changed."""
    marks, end_step = [], run.end_step

    def marked():
        end_step()
        synchronize(run.engine.device)
        marks.append(time.perf_counter())
        run.stopped = len(marks) > steps

    with mock.patch.object(run, "end_step", marked):
        run.stopped = False
        train_t2i.train(run)
    return list(np.diff(marks))


def bare_step(run: train_t2i.Run) -> Callable:
    """Loss, gradients and AdamW of the same network on one batch that is there already."""
    engine, args = run.engine, run.args
    dtype = next(engine.module.parameters()).dtype
    network = MMDiT(run.config).to(engine.device, dtype)
    if args.compile:
        network.compile_blocks()
    adamw = torch.optim.AdamW(network.param_groups(args.lr, args.weight_decay), fused=True)
    batch = train_t2i.encode(next(run.batches()), run.image, run.text, engine.device)

    def bare():
        data, text, t, noise = batch
        for _ in range(engine.gradient_accumulation_steps()):
            rf.rf_loss(network, data, text, t=t, noise=noise).mean().backward()
        adamw.step()
        adamw.zero_grad()

    return bare


@contextmanager
def ranges(run: train_t2i.Run):
    """Name the parts of the loop for the profiler, from outside: the loop itself stays plain."""

    def named(owner, attribute: str, name: str):
        inner = getattr(owner, attribute)

        def outer(*args, **kwargs):
            with torch.profiler.record_function(f"part {name}"):
                return inner(*args, **kwargs)

        return mock.patch.object(owner, attribute, outer)

    engine, batches = run.engine, iter(run.batches())
    source = SimpleNamespace(fetch=lambda: next(batches))
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(named(source, "fetch", "data"))
        enter(mock.patch.object(run, "batches", lambda: iter(lambda: source.fetch(), None)))
        enter(named(train_t2i, "encode", "data"))
        enter(named(rf, "rf_loss", "forward"))
        enter(named(engine, "backward", "backward"))
        enter(named(engine, "step", "ZeRO-2 step"))
        enter(named(engine.optimizer.optimizer, "step", "AdamW"))
        enter(named(rf.PowerEMA, "update", "averages"))
        enter(named(run, "end_step", "log"))
        enter(named(run, "asked_to_save", "signals"))
        yield


def parts(profile, steps: int, medians: dict[str, float]) -> list[dict]:
    """A row a part: milliseconds a step on the host and on the device. AdamW is taken out of the
    ZeRO-2 step around it; communication is inside backward and ZeRO-2 step."""
    events = {event.key: event for event in profile.key_averages()}

    def ms(keys: list[str]) -> dict[str, float]:
        there = [events[key] for key in keys if key in events]
        host = sum(e.cpu_time_total for e in there) / 1e3 / steps
        return {"ms": host, "device_ms": sum(e.device_time_total for e in there) / 1e3 / steps}

    names = ("data", "forward", "backward", "ZeRO-2 step", "AdamW", "averages", "log", "signals")
    found = {name: ms([f"part {name}"]) for name in names}
    found["ZeRO-2 step"] = {k: v - found["AdamW"][k] for k, v in found["ZeRO-2 step"].items()}
    sent = [key for key in events if key.startswith(("gloo:", "nccl:", "ncclDevKernel"))]
    found["communication, inside"] = ms(sent)
    nan = float("nan")
    found |= {name: {"ms": 1e3 * s, "device_ms": nan} for name, s in medians.items()}
    whole = medians["trainer"] * 1e3
    return [{"part": name} | row | {"of_step": row["ms"] / whole} for name, row in found.items()]
