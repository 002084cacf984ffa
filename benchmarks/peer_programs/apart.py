"""Programs in processes of their own, each started with an environment of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from ctypes.util import find_library
from multiprocessing.connection import Connection
from typing import Any


def tcmalloc() -> dict[str, str]:
    """The variables of a process that has tcmalloc, as ``scripts/launch_common.sh`` sets them; none where it is not installed."""
    library = find_library("tcmalloc_minimal")
    return {"LD_PRELOAD": library, "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 62)} if library else {}


class Apart:
    """What ``make(*arguments)`` returns, in a process started with ``environment`` beside this one's. Its methods are called as if it
    were here, one at a time.

    Raises:
        EOFError, ConnectionResetError: of a call whose process has ended.
    """

    def __init__(self, environment: dict[str, str], make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._pipe.send((name, arguments))
            result = self._pipe.recv()
            if name == "close":
                self._process.join()
            return result

        return call


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    made, name = make(*arguments), ""
    while name != "close":
        name, of_call = pipe.recv()
        pipe.send(getattr(made, name)(*of_call))
