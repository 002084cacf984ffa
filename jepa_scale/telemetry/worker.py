"""A thread for each logger, so that a slow or broken one neither stops nor slows training."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, Full, Queue
from typing import Protocol

logger = logging.getLogger(__name__)

WAITING = 1000
"""Most rows that wait for a logger; later ones are left out there."""
START_SECONDS, CLOSE_SECONDS = 45.0, 60.0
"""How long a run waits for a logger to start, before its first step, and to take the last rows, at its end."""


class Logger(Protocol):
    """A receiver of each row; names are those of :func:`jepa_scale.telemetry.metrics.chart`, values are finite or
    NaN. All its methods are called by one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Worker:
    """A logger on a thread of its own, with a bounded queue of rows.

    Whatever goes wrong is reported once, and the run goes on without this logger.

    Args:
        start: makes the logger, in the thread.
    """

    def __init__(self, name: str, start: Callable[[], Logger]) -> None:
        self.name = name
        self._start, self._exit_code = start, 0
        self._rows: Queue[tuple[int, Mapping[str, float]]] = Queue(WAITING)
        self._started, self._closing = threading.Event(), threading.Event()
        self._reported = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"logger {name}", daemon=True)
        self._thread.start()

    def wait_for_start(self, seconds: float) -> None:
        """Wait until the logger has started or failed; after these seconds it goes on starting beside the training."""
        if not self._started.wait(seconds):
            logger.warning(f"{self.name}: has not started in {seconds:g} s; the run begins, and its rows wait")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a row; never waits."""
        if self._thread.is_alive():
            try:
                self._rows.put_nowait((step, values))
            except Full:
                self._report(
                    f"takes rows more slowly than they come; from step {step} on some are left out there, as {WAITING:,} wait"
                )

    def finish(self, exit_code: int) -> None:
        """Ask the logger to take what waits and to close; :meth:`join` waits for that."""
        self._exit_code = exit_code
        self._closing.set()

    def join(self, until: float) -> None:
        """Wait for the end of the thread until this time of :func:`time.monotonic`, and then leave it."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._abandoned = True
            logger.warning(
                f"{self.name}: has not closed, and {self._rows.qsize():,} rows or more are missing there; metrics.jsonl has them"
            )

    def _run(self) -> None:
        try:
            listener = self._start()
        except Exception as error:  # whatever a third party's client raises, the run goes on
            logger.warning(f"{self.name}: cannot start, the run goes on without it: {reason(error)}")
            return
        finally:
            self._started.set()
        code = self._take(listener)
        try:
            listener.close(code or self._exit_code)
        except Exception as error:
            if not code and not self._abandoned:
                logger.warning(f"{self.name}: could not be closed: {reason(error)}")

    def _take(self, listener: Logger) -> int:
        """Pass rows on until the run ends. Return 1 if the logger has failed, else 0."""
        while True:
            closing = self._closing.is_set()  # before the queue is looked at: what was put before it is taken
            try:
                step, values = self._rows.get(timeout=0.2)
            except Empty:
                if closing:
                    return 0
                continue
            try:
                listener.log(step, values)
            except Exception as error:
                if not self._abandoned:
                    logger.warning(f"{self.name}: failed at step {step}, the run goes on without it: {reason(error)}")
                return 1

    def _report(self, message: str) -> None:
        if not self._reported:
            self._reported = True
            logger.warning(f"{self.name}: {message}")


def reason(error: Exception) -> str:
    """Return type and first line of an error, with API keys removed in case a client quotes them."""
    text = (str(error).strip().splitlines() or [""])[0]
    for name, value in os.environ.items():
        if value and name.endswith(("_API_KEY", "_TOKEN", "_PASSWORD")):
            text = text.replace(value, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
