"""Messages in the middle of a run."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def say(message: str, stream: TextIO | None = None) -> None:
    """Print a line, on stderr if not told otherwise. Output may go to a file on a disk that is full: a line that cannot
    be printed is no reason to stop. Line and newline are one write, or those of two threads would mix."""
    with contextlib.suppress(OSError):
        print(f"{message}\n", end="", file=stream or sys.stderr, flush=True)
