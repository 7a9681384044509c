"""START: what every program needs before and around its work.

device     where to compute, and how products are made there
files      appear whole or not at all
folders    belong to the program that made them, one process at a time
signals    Ctrl-C, SIGTERM and SIGUSR1 ask a training loop to save or to stop
errors     what went wrong ends in one line
"""

import functools
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from common import cpu

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two processes from one folder
    fcntl = None

# ------------------------------------------------------------------------------------------------
# Device
# ------------------------------------------------------------------------------------------------


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first of cuda, mps and cpu that is here. ValueError if `name` is not here."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda"] * (cards > 0) + [f"cuda:{i}" for i in range(cards)]
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise ValueError(f"--device {name!r} is not here; this machine has: {', '.join(here)}")
    device = torch.device(name)
    if device.index is not None:  # or streams and compiled kernels would be the first card's
        torch.cuda.set_device(device)
    return device


def begin(device: torch.device):
    """TF32 products on GPUs (fp32 range, shorter mantissa); on CPUs what cpu.py knows."""
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention is the default on recent GPUs, and NaN was reported from its backward pass
    # (pytorch issue 196678). Flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        cpu.tune()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


PART = ".part"  # ends the names of files that are being written


def write_whole(path: Path, content: bytes | memoryview):
    """The file appears complete or not at all, also when the disk is full or the process dies."""
    write_all({path: content})


def write_all(contents: dict[Path, bytes | memoryview]):
    """Files that belong together: as write_whole, and if one cannot be written, none is replaced.

    The last one describes the others. While they are replaced it is not there, so that it never
    stands beside what it does not describe. A rename replaces a name in one operation; fsync first,
    since a file system may otherwise write the name before the content.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}{PART}") for path in contents}
    still_there(*contents)
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        *others, last = contents
        if others:
            last.unlink(missing_ok=True)
        for path, file in temporary.items():
            os.replace(file, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        for file in temporary.values():
            with suppress(OSError):  # not there, as it should be; or a disk that only reads
                file.unlink()


def write_new(path: Path, content: bytes):
    """As write_whole, unless the file is there: of several processes the first one writes it."""
    spare = path.with_name(f".{path.name}.new.{os.getpid()}{PART}")
    write_whole(spare, content)
    try:
        os.link(spare, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(spare, path)
    finally:
        spare.unlink(missing_ok=True)


def check_free(path: Path):
    """ValueError if --out is there: it might be what the program reads."""
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"--out {path} must be a new file in a folder that is there")


def sweep(folder: Path):
    """Delete what killed processes of this machine left of write_whole, in its folders, too."""
    for left in folder.rglob(f".*{PART}"):
        number = left.stem.rpartition(".")[2]
        if number.isdecimal() and len(number) < 10 and os.name == "posix":
            try:
                os.kill(int(number), 0)  # asks whether there is such a process
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except OSError:  # of another user
                pass


def intact(file: Path) -> Path:
    """One of torch's files, if it is whole. OSError if it is not.

    It is a zip of tensors, each with its CRC-32, but torch.load does not look at them.
    """
    try:
        bad = zipfile.ZipFile(file).testzip()
    except Exception as error:  # half a dozen kinds
        bad = line_of(error)
    if bad:
        raise OSError(f"{file} is damaged ({bad})")
    return file


def line_of(error: Exception, which: int = 0) -> str:
    """Its first line (-1: the last); libraries often say more than one, or nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[which].strip()


def read_prompts(path: Path, what: str) -> list[dict]:
    """Rows with a "prompt": each line of a text file, or of a .jsonl, with its other keys.

    Raises FileNotFoundError or ValueError: the file, the line, the rule.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} {path} is not there: give a text file, one on each line")
    if path.suffix in (".csv", ".tsv", ".json"):
        raise ValueError(f"{what} {path} must be plain text or .jsonl: write one on each line")
    # utf-8-sig: some editors begin a file with a mark that is no part of its text. And only "\n"
    # ends a line: splitlines() would also cut a text at rare signs inside it.
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} must be text in UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(map(str.strip, lines), 1):
        try:
            if path.suffix != ".jsonl" and line[:1] in ("{", "["):
                raise ValueError("JSON in another file")
            row = json.loads(line or "{}") if path.suffix == ".jsonl" else {"prompt": line}
            if line and row["prompt"].strip():
                rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{what} {path}: line {number} is no prompt; a file of JSON objects with a"
                ' "prompt" is called .jsonl'
            ) from error
    if not rows:
        raise ValueError(f"{what} {path} is empty: write one on each line")
    return rows


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------

MARK = "made_by.txt"  # in every folder that a program of ours fills: the program's name
OWNED = {}  # folders that this process fills → what os.stat said of them when it began


def real(folder: Path) -> Path:
    """Where a run is written. A link may come to point elsewhere while it runs, and "." has no
    name beside which an older run could be kept."""
    resolved = Path(os.path.realpath(folder))
    plain = resolved == Path(os.path.abspath(folder)) and {"", ".."}.isdisjoint(folder.parts[-1:])
    return folder if plain and folder.name else resolved


def listing(folder: Path) -> list:
    """A run's files, their sizes and times: to see whether another process has been here."""
    files = [file for file in folder.glob("*") if file.is_file() and file.name != MARK]
    files += folder.glob("checkpoints/*/run.json")
    return sorted((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.name[0] != ".")


def still_there(*paths: Path):
    """OSError if a folder of this process has been moved, and these paths lead into another."""
    for folder, began in OWNED.items():
        here = os.stat(folder) if folder.is_dir() else None
        moved = here is None or not os.path.samestat(here, began)
        if moved and any(folder in path.parents for path in paths):
            raise OSError(
                f"{folder} has been moved or replaced since this program began to fill it"
            )


def claim(folder: Path, program: str, what: str = "--out"):
    """ValueError unless the folder is new, empty, or one that this program made.

    Programs write files of fixed names, so in another's folder they would overwrite what it holds.
    """
    folder = Path(os.path.realpath(folder))  # NEW/.. is the folder that NEW would lie in
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{what} {folder} is a file, must be a folder: choose another")
    path = folder / MARK
    owner = path.read_text(errors="replace").strip() if path.is_file() else ""
    held = folder.is_dir() and any(file.name[0] != "." for file in folder.iterdir())
    if held and owner != program:
        whose = f"is of {owner}" if owner else "holds other files"
        raise ValueError(f"{what} {folder} {whose}: {program} needs a new or an empty folder")


def mark(folder: Path, program: str) -> Path:
    """Create the folder, and write down whose it is. → the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_new(folder / MARK, f"{program}\n".encode())
    return folder / MARK


@contextmanager
def owned(folder: Path, program: str, what="--out", shared=False, before: list | None = None):
    """Inside, the folder is there, says whose it is, and no other process may own it.

    shared: but others that share it (--part) may. before: its listing, when the program looked at
    what is there. The lock ends with the process, however it ends. ValueError as claim, or if the
    folder is taken, or is not any more what it was before.
    """
    claim(folder, program, what)
    ours = (folder / MARK).exists()
    with open(mark(folder, program), "r+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{what} {folder} is in use by another process: wait for it, or choose another"
            ) from error
        except OSError:  # a file system without locks
            pass
        moved = not (folder / MARK).exists() or not os.path.samestat(
            os.fstat(file.fileno()), os.stat(folder / MARK)
        )
        if moved or (before is not None and listing(folder) != before):
            raise ValueError(
                f"{what} {folder} has just been changed by another process: look at it, and start"
                " again"
            )
        if ours and not shared:  # another machine's part may be writing
            sweep(folder)
        OWNED[folder] = os.stat(folder)
        try:
            yield folder
        finally:
            OWNED.pop(folder, None)


def move_away(folder: Path, program: str, before: list | None = None) -> bool:
    """--overwrite: the run that is there becomes FOLDER.old, in place of an older one of that name.
    → whether it did.

    A rename cannot lose anything, whatever becomes of the new run. before: as in owned.
    """
    results = (
        "checkpoint.pt",
        "model.safetensors",
        "checkpoints/*/run.json",
        "*/model.safetensors",
    )
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not any(any(folder.glob(name)) for name in results):
        return False  # it left logs at best: the weights in FOLDER.old are worth more
    claim(old, program)
    with owned(folder, program, before=before):  # or it is in use
        if old.exists():
            with owned(old, program, "the older run in"):
                others = [file.parent for file in old.glob(f"*/**/{MARK}")]
                if others:
                    raise ValueError(f"{others[0]} would be deleted with {old}: move it away")
                shutil.rmtree(old)
        os.replace(folder, old)
    return True


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


SHORTAGE = ("memory", "alloc", "Storage size")  # in what torch says when there is too little


def program(name: str):
    """Decorate main(argv): a known kind of error becomes one line, `name: message`, and status 1.

    Under a launcher one rank of each machine speaks, unless the error is about files or memory.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv: list[str] | None = None):
            if None in (sys.stdout, sys.stderr):  # one was closed: >&-
                nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
                sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
            rank, local_rank = (os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK"))
            launched = "RANK" in os.environ  # later our own start may have set it
            try:
                return main(argv)
            except KeyboardInterrupt:
                said = "interrupted; every file is whole"
            except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
                # a loader's worker puts its traceback before the message
                said = line_of(error, -1)
                if isinstance(error, MemoryError | RuntimeError):
                    if isinstance(error, RuntimeError) and not any(w in said for w in SHORTAGE):
                        raise  # a mistake of ours
                    said = f"too little memory: lower the batch, the size or the network ({said})"
                # What only this rank may have met: its files, its memory.
                own = isinstance(error, OSError | MemoryError | RuntimeError)
                others = local_rank.isdecimal() and int(local_rank) > 0  # "x" is an error to tell
                if others and launched and not own:
                    sys.exit(1)
            for bar in list(getattr(tqdm, "_instances", ())):  # or the line would be glued to it
                bar.close()
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"{name}: {said}{where}", file=sys.stderr)
            sys.exit(1)

        return run

    return decorate
