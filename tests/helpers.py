"""What several test files need: runs of random weights, rows that are opened, commands."""

import csv
import os
import resource
import signal
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import train_t2i
from common.pipeline import Pipeline, settle_run
from common.start import Signals
from inputs.encoders import image_encoder, text_encoder
from mmdit import MMDiT, fitted

SHAPES = {  # facts of a run of chapter 2, of 20 pixels
    "size": 20,
    "text_encoder": "hash",
    "text_tokens": 12,
    "vae": "pixels",
    "channels": 3,
    "words": [],
    "text_format": None,
    "cfg": 3.0,
    "cfg_below": 1.0,
    "steps": 2,
    "solver": "euler",
    "shift": 2.0,
    "preset": "tiny",
    "patch_size": 4,
    "residual": "prenorm",
    "samples": 80,
    "source": "shapes",
    "rows": "",
    "models": ["", ""],
    "seed": 0,
    "shapes": 4,
    "colors": 6,
    "places": 10,
}
DIGITS = SHAPES | {  # and of chapter 1, of 14 pixels
    "size": 14,
    "text_encoder": "words",
    "text_tokens": 1,
    "channels": 1,
    "words": [str(i) for i in range(10)],
    "cfg": 1.6,
    "shift": 1.0,
    "preset": "digits",
    "patch_size": 7,
    "source": "glyphs",
    "rows": "",
    "models": ["", ""],
    "seed": 0,
    "shapes": 0,
}


def exported(folder, facts):
    """A run's folder with random weights, as a trainer leaves it."""
    torch.manual_seed(0)
    text = text_encoder(facts["text_encoder"], facts["text_tokens"], "cpu", facts["words"])
    image = image_encoder(facts["vae"], "cpu", facts["channels"])
    side = facts["size"] // image.factor
    sizes = {"channels": image.channels, "text_dim": text.dim, "sides": [(side, side)]}
    how = {key: facts[key] for key in ("patch_size", "residual")}
    model = MMDiT(fitted(facts["preset"], **sizes, **how))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    Pipeline(model, text, image, facts).save(folder)
    return folder


def opened(*data, stage=None, **typed):
    """Chapter 2's settings, and the rows of --data."""
    typed = {"data": [str(name) for name in data], "batch_size": 8} | typed
    return settle_run(train_t2i.Settings, typed, {}, "cpu", lambda preset: {}, stage)


def first_gradient(states):
    """Of a run's first step, from the moments of Adam and of Muon."""
    parts = [s["momentum"] * 20 if "momentum" in s else s["exp_avg"] * 10 for s in states]
    return torch.cat([part.flatten() for part in parts])


def call(main, *args):
    return main([str(arg) for arg in args])


def refused(main, capsys, *args):
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(main, *args)
    assert ended.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def close(found, expected, atol=1e-6, rtol=1e-5):
    """Equal up to rounding, and of one shape."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, check_dtype=False)


# --- runs of the trainers ------------------------------------------------------------------------


def records(path):
    """The rows of a CSV file, numbers as they are written."""
    with open(path) as file:
        return list(csv.DictReader(file))


def t2i(argv=None):
    """Chapter 2's main in this process. The process group stays: DeepSpeed cannot begin another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        train_t2i.main(argv)


@contextmanager
def once_there(path, action):
    """Inside, a thread calls action() as soon as the path exists; here and now, if it does."""
    ended = threading.Event()

    def watch():
        while not path.exists():
            if ended.wait(0.001):
                return
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    if path.exists():  # the thread may come to it later than what follows
        thread.join()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def stopped_once(path):
    """Inside, this process is sent SIGTERM as soon as the path exists; pytest survives it."""
    with Signals(), once_there(path, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


@contextmanager
def full_disk(path):
    """Inside, no file may grow beyond 100 kB once the path exists: so a full disk looks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with once_there(path, fill):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
