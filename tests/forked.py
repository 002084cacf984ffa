"""A function in a forked process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> int:
    """Run ``work`` in a forked process, which exits with 1 if it raises; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)
