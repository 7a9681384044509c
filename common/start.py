"""START: what every program needs before and around its work.

device     where to compute, and how products are made there
files      appear whole or not at all
signals    Ctrl-C, SIGTERM and SIGUSR1 ask a training loop to save or to stop
errors     what went wrong ends in one line
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch

from common import cpu

# ------------------------------------------------------------------------------------------------
# Device
# ------------------------------------------------------------------------------------------------


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first of cuda, mps and cpu that is here. ValueError if `name` is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here["cpu"] = True
    if name == "auto":
        name = next(n for n, present in here.items() if present)
    if not here.get(name):
        have = ", ".join(n for n, present in here.items() if present)
        raise ValueError(f"--device {name!r} is not here; this machine has: {have}")
    return torch.device(name)


def begin(device: torch.device):
    """TF32 products on GPUs (fp32 range, shorter mantissa); on CPUs what cpu.py knows."""
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        cpu.tune()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes | memoryview):
    """The file appears complete or not at all, also when the disk is full or the process dies.

    A rename replaces a name in one operation; fsync first, since a file system may otherwise write
    the name before the content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------------------

NOTHING, SAVE, STOP = 0, 1, 2  # what a training loop is asked for; the greatest of all wins


class Signals:
    """SIGTERM and Ctrl-C ask to save and stop, SIGUSR1 to save and go on; so does every `minutes`.

    A second Ctrl-C interrupts at once. `with Signals() as signals:` puts back what was before.
    """

    def __init__(self, minutes: float | None = None):
        self.minutes, self.request, self.last_save = minutes, NOTHING, time.monotonic()

    def __enter__(self):
        names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]  # Windows has no SIGUSR1
        self.before = {number: signal.signal(number, self._heard) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number, frame):
        stops = number in (signal.SIGINT, signal.SIGTERM)
        self.request = max(self.request, STOP if stops else SAVE)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def take(self, clock: bool = True) -> int:
        """What was asked for since the last call. clock: whether `minutes` count here."""
        request, self.request = self.request, NOTHING
        now = time.monotonic()
        if clock and self.minutes is not None and now - self.last_save >= 60 * self.minutes:
            self.last_save = now  # asked once, not again until it is done
            request = max(request, SAVE)
        return request


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


def program(name: str):
    """Decorate main(argv): a known kind of error becomes one line, `name: message`, and status 1.

    Under a launcher one rank of each machine speaks, unless the error is about files.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv: list[str] | None = None):
            rank, local_rank = (os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK"))
            try:
                return main(argv)
            except (ValueError, OSError, FloatingPointError) as error:
                if local_rank == "0" or isinstance(error, OSError):
                    where = f" (rank {rank})" if rank != "0" else ""
                    # a loader's worker puts its traceback before the message
                    lines = [line for line in str(error).splitlines() if line.strip()]
                    print(f"{name}: {''.join(lines[-1:])}{where}", file=sys.stderr)
                sys.exit(1)
            except KeyboardInterrupt:
                print(f"{name}: interrupted; every file is whole", file=sys.stderr)
                sys.exit(1)

        return run

    return decorate
