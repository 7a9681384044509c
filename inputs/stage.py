"""THE STAGE: chunks on fast local storage, ahead of their use (train_t2i.py --stage).

The order of a run is a function of its seed, so its whole future is known: Rows.uses lists the
chunks in the order in which the run will need them. A copier goes ahead of the run along this list.
So data that lie on slow storage, or do not fit on the local disk, are read at the disk's speed.

    slow storage ──Copier──> stage/ID/chunks/00017.arrow ──PreparedFolder.table──> the run
                                     └── deleted when the run has passed its last use
"""

import threading
import time
from contextlib import suppress
from itertools import islice, takewhile
from math import ceil
from pathlib import Path

from common.start import write_whole
from inputs.rows import Rows, Use
from inputs.stored import FAILED, POLL

LOOK_AHEAD, MOST_USES = 8, 2**17  # epochs, and uses in them, that --stage-limit is checked for


class Copier(threading.Thread):
    """Copies chunks into the stage in the order of their use, never more than `limit` bytes, and
    deletes them when the run has passed them.

    One copier on each node, in a thread of its first rank. The file system carries all messages:
    ranks and workers only wait for files to appear. Chunks with held-out rows come first and stay.
    What an earlier run left in the folder goes.
    Raises ValueError if the limit is less than what is in use at one time.
    """

    def __init__(self, rows: Rows, limit: float, seen: int = 0):
        super().__init__(daemon=True)
        self.rows, self.limit, self.seen, self.closed = rows, limit, seen, False
        self.staged: dict[Path, tuple[int, float]] = {}  # file → bytes, end of its use
        self.stage = rows.sources[0].stage
        held = {(s, r.chunk) for s in rows.sources for r in s.ranges if r.split != "train"}
        self.kept = [Use(folder, chunk, 0, 2**62) for folder, chunk in held]
        least = self.least()
        if limit < least:
            raise ValueError(
                f"--stage-limit {limit / 1e9:g} GB must be at least {ceil(least / 1e3) / 1e6:g} GB"
                " for the chunks in use at one time: raise it, or lower --window"
            )
        self.stage.mkdir(parents=True, exist_ok=True)
        for file in (*self.stage.rglob("*.arrow"), *self.stage.rglob(".*"), self.stage / FAILED):
            file.unlink(missing_ok=True)
        for use in self.kept:
            self._stage(use)

    def least(self) -> int:
        """The most bytes that are in use at one time in the next epochs."""
        active: dict[Path, tuple[int, float]] = {}
        peak = 0
        end = self.seen + LOOK_AHEAD * self.rows.epoch
        ahead = takewhile(lambda use: use.first < end, self.rows.uses(self.seen))
        for use in (*self.kept, *islice(ahead, MOST_USES)):
            active = {file: of for file, of in active.items() if of[1] > use.first}
            file, size = use.file
            active[file] = size, max(use.last, active.get(file, (0, 0))[1])
            peak = max(peak, sum(size for size, _ in active.values()))
        return peak

    def begin(self, seen: int):
        """Start: after the loader's workers, which must not inherit a thread."""
        self.seen = seen
        self.start()

    def passed(self, seen: int):
        """The run has finished the samples before `seen`."""
        self.seen = seen

    def close(self):
        """Stop, and let no reader wait any longer."""
        self.closed = True
        if self.is_alive():
            self.join()
        self._tell("the run has ended")

    def _tell(self, reason: str):
        """Readers look for this file while they wait."""
        with suppress(OSError):
            write_whole(self.stage / FAILED, reason.encode())
        with suppress(OSError):  # on a full disk, say: an empty file is heard too
            (self.stage / FAILED).touch()

    def run(self):
        try:
            for use in self.rows.uses(self.seen):
                while not self._room(use):
                    if self.closed:
                        return
                    time.sleep(POLL)
                self._stage(use)
        except Exception as error:  # of a dozen file systems: the ranks that wait must hear of it
            self._tell(f"staging failed: {error}")

    def _stage(self, use: Use):
        file, size = use.file
        if file not in self.staged:
            use.folder.fetch(use.chunk, file)
        _, last = self.staged.get(file, (0, 0))
        self.staged[file] = size, max(last, use.last)

    def _room(self, use: Use) -> bool:
        """Whether it is time, and there is room when all that is passed is dropped."""
        target, size = use.file
        for file in [f for f, (_, last) in self.staged.items() if last <= self.seen]:
            if file != target:
                file.unlink()
                del self.staged[file]
        used = sum(size for size, _ in self.staged.values())
        fits = target in self.staged or used + size <= self.limit
        if use.first <= self.seen and not fits:  # nothing more will be dropped
            raise ValueError(
                f"--stage-limit {self.limit / 1e9:g} GB is full of chunks in use: resume with more,"
                " or a lower --window"
            )
        return fits and use.first <= self.seen + self.rows.epoch
