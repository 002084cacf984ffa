"""Progress of a run: a bar on a terminal, elsewhere a message at least every minute."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from jepa_scale.utils.format import format_number
from jepa_scale.utils.logging import shows_progress

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds after which there is another message, however long a step or an evaluation takes."""


class Progress:
    """Progress of ``total`` optimizer steps, starting at ``start``.

    If ``stream`` (stderr) is a terminal, it is a bar with loss, tokens/s and time left. Else there is a message after
    every tenth of the run, and at least every ``interval`` seconds: with the values of the newest row, or, if no step has
    finished since the last message, with what the run is doing and for how long.
    """

    def __init__(
        self, name: str, total: int, start: int = 0, stream: TextIO | None = None, interval: float = INTERVAL
    ) -> None:
        self._name, self._total, self._start, self._interval = name, total, start, interval
        self._stream = stream if stream is not None else sys.stderr
        self._step, self._seconds, self._shown, self._pause = start, 0.0, "", ""
        self._tenth = self._printed = start  # the steps of the last message for a tenth, and of the last message
        self._since = self._began = time.monotonic()  # of the last message, and of the step or pause that is going on
        self._bar: tqdm | None = None
        if self._stream.isatty() and shows_progress():
            self._bar = tqdm(
                total=total,
                initial=start,
                desc=name,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def step(self, step: int, seconds: float) -> None:
        """Show a finished step, ``seconds`` of training time after ``start``. Cheap: it is called every step."""
        self._step, self._seconds, self._began = step, seconds, time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def values(self, step: int, loss: float | None, tokens_per_second: float | None, seconds: float) -> None:
        """Show the values of a logged step, ``seconds`` of training time after ``start``."""
        self._step, self._seconds = step, seconds
        self._shown = f"loss {format_number(loss)}  {format_number(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(self._shown, refresh=False)
            return
        tenth = step >= self._total or (step - self._tenth) * 10 >= self._total
        # a fresh row after half a minute comes before the old one that would be repeated after a whole minute
        if tenth or time.monotonic() - self._since > self._interval / 2:
            self._tenth = step if tenth else self._tenth
            self._line()

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Name what the run does in the block, an evaluation or a save."""
        self._pause, self._began = what, time.monotonic()
        try:
            yield
        finally:
            self._pause, self._began = "", time.monotonic()

    def note(self, text: str) -> None:
        """Log a line; above the bar, where there is one."""
        if self._bar is not None:
            with suppress(OSError):  # a terminal that is gone must not stop a run
                self._bar.write(text, file=self._stream)
        else:
            self._since = time.monotonic()
            logger.info(text)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _watch(self) -> None:
        """Log a message whenever there was none for an interval; on a terminal keep the clock of the bar going."""
        while not self._closed.wait(max(self._interval / 100, self._since + self._interval - time.monotonic())):
            if time.monotonic() - self._since < self._interval:
                continue
            if self._bar is not None:
                self._since = time.monotonic()
                with suppress(OSError):
                    self._bar.refresh()
            elif self._pause or self._step == self._printed:
                doing = f"{self._pause} after step {self._step}" if self._pause else f"step {self._step + 1}"
                passed = timedelta(seconds=round(time.monotonic() - self._began))
                self.note(f"{self._name}  {doing} of {self._total}: for {passed} so far")
            else:
                self._line()

    def _line(self) -> None:
        step = self._printed = self._step
        left = timedelta(seconds=round(self._seconds / max(step - self._start, 1) * max(self._total - step, 0)))
        percent = 100 * step // max(self._total, 1)
        shown = f"{self._shown}  " if self._shown else ""
        self.note(f"{self._name}  step {step}/{self._total}  {percent}%  {shown}{left} left")
