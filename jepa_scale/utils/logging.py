"""Logging: one hierarchy of loggers, ``jepa_scale.*``, and one handler on stderr.

Every module logs to ``logging.getLogger(__name__)``. An entry point calls :func:`configure` once. A program that
imports the package and does not configure logging itself gets only warnings, as from any library.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from typing import TextIO

ROOT = "jepa_scale"
"""The name above all our loggers."""
FORMAT, TIME = "%(asctime)s %(levelname)s %(rank)s%(message)s", "%H:%M:%S"


class RankFilter(logging.Filter):
    """Adds the rank to a record, and drops records below WARNING on ranks other than 0 unless all ranks are wanted.

    The rank is read from the launcher's environment variables: logging begins before there is a process group.
    """

    def __init__(self, all_ranks: bool) -> None:
        super().__init__()
        self._all_ranks = all_ranks

    def filter(self, record: logging.LogRecord) -> bool:
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        record.rank = f"[rank {rank}] " if world_size != "1" else ""
        return self._all_ranks or rank == "0" or record.levelno >= logging.WARNING


class StderrHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the ``sys.stderr`` of the moment at which a record arrives."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a progress bar on the same terminal is cleared before and drawn again after it."""
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm and self.stream.isatty() else nullcontext():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a stream that cannot be written, such as a file on a full disk: a lost message must not stop a run."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure(level: int = logging.INFO) -> None:
    """Send the package's messages from ``level`` on to stderr; DEBUG includes those of all ranks. A later call replaces an
    earlier one."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter(FORMAT, TIME))
    handler.addFilter(RankFilter(all_ranks=level <= logging.DEBUG))
    logger = logging.getLogger(ROOT)
    for other in [h for h in logger.handlers if isinstance(h, StderrHandler)]:
        logger.removeHandler(other)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # a handler that a library gives the root logger would repeat every message


def print_result(text: str) -> None:
    """Print a result of a run to stdout. If stdout cannot be written, such as a full disk or a closed pipe, it is logged instead."""
    try:
        print(text, flush=True)
    except OSError as error:
        logging.getLogger(__name__).warning(f"stdout: {error.strerror}; it would have had: {text}")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  at its exit the interpreter would fail to flush the old one


def configured_level() -> int | None:
    """Return the level that :func:`configure` was given in this process, None if it was not called."""
    logger = logging.getLogger(ROOT)
    return logger.level if any(isinstance(h, StderrHandler) for h in logger.handlers) else None


def shows_progress() -> bool:
    """Return whether progress bars are wanted; not if only warnings are logged."""
    return (configured_level() or logging.INFO) <= logging.INFO
