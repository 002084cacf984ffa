"""Find the rank that hangs: each rank writes its phase to a file, and reads the others' files when it makes no
progress."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jepa_scale.distributed.comm import ParallelContext

logger = logging.getLogger(__name__)

WAITING = ("/torch/distributed/", "/deepspeed/")
"""Folders of the code that waits for other ranks."""
PHASES = ("start", "data", "forward and backward", "update", "profile", "evaluation", "save")
"""The phases of a step, in order."""


def end_process() -> None:
    """End the process at once: exit handlers would wait for the ranks that hang."""
    os._exit(1)


class Watchdog:
    """End this process when it has made no progress for too long, and log which rank the others wait for.

    A rank that waits in a collective is ahead of the rank it waits for, or in the same phase of the same step. So the
    hanging ranks are among those furthest behind: the ones that do not themselves wait for others. The files lie in
    ``<run>/watchdog/``, which must be on a file system that all hosts share.

    Args:
        run_dir: of the run. ranks: this process's rank and the number of ranks.
        limit: seconds without progress; 0 = no watchdog.
        end: function that ends the process.
    """

    def __init__(
        self, run_dir: Path, ranks: ParallelContext, limit: float, end: Callable[[], None] = end_process
    ) -> None:
        self._folder, self._ranks, self._limit, self._end = run_dir / "watchdog", ranks, limit, end
        self._now = (0, "start", time.monotonic())  # step, phase, begin; the wall clock may jump
        self._written: tuple[int, str, float] | None = None
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file(self._ranks.rank).unlink(missing_ok=True)  # of an earlier process
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._limit:
            self._thread.join()
            self._file(self._ranks.rank).unlink(missing_ok=True)

    def enter(self, step: int, phase: str) -> None:
        """Record that this rank begins one of the ``PHASES`` of a step."""
        assert phase in PHASES, phase
        self._now = (step, phase, time.monotonic())

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 10)
        while not self._closed.wait(pause):
            now = self._now
            if now != self._written:
                self._write(now)
            if time.monotonic() - now[2] > self._limit:
                self._write(now, *place_of(self._main))
                time.sleep(2 * pause)  # the other ranks write their places, too
                if self._now == now and not self._closed.is_set():
                    logger.error(self._verdict())
                    self._end()
                    return

    def _write(self, now: tuple[int, str, float], place: str = "", waits: bool = False) -> None:
        partial = self._file(self._ranks.rank).with_suffix(".partial")
        try:
            partial.write_text(json.dumps([*now[:2], place, waits]))
            os.replace(partial, self._file(self._ranks.rank))
            self._written = now
        except OSError:
            pass  # a full disk must not stop the run

    def _verdict(self) -> str:
        found: dict[int, tuple[int, str, str, bool]] = {}
        for rank in range(self._ranks.world_size):
            try:
                found[rank] = tuple(json.loads(self._file(rank).read_text()))
            except (OSError, ValueError):
                return f"rank {rank} has ended and left no watchdog file; the others waited {self._limit:,.0f} s for it"
        reached = {rank: (step, PHASES.index(phase)) for rank, (step, phase, *_) in found.items()}
        behind = [rank for rank in found if reached[rank] == min(reached.values())]
        behind = [rank for rank in behind if not found[rank][3]] or behind
        step, phase, place, _ = found[behind[0]]
        who = f"rank {', '.join(map(str, behind))}"
        if len(behind) == len(found) > 1:  # one of them has not reached the collective in which the others wait
            who = f"one of {who}"
        return (
            f"no progress for {self._limit:,.0f} s: {who} hangs at step {step} in {phase!r}{place and f' at {place}'}; "
            "raise train.hang_minutes if that may take so long"
        )


def place_of(thread: int | None) -> tuple[str, bool]:
    """Return where a thread is, as ``function (folder/file.py:line)``, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "", False
    file = frame.f_code.co_filename
    short = "/".join(Path(file).parts[-2:])
    return f"{frame.f_code.co_name} ({short}:{frame.f_lineno})", any(folder in file for folder in WAITING)
