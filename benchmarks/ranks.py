"""A function on several ranks, each a process of its own, started one after the other and ended together."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import BaseContext
from typing import Any


def on_ranks(measure: Callable[..., None], count: int, *rest: Any, context: BaseContext | None = None) -> Any:
    """Run ``measure(rank, *rest, results)`` on each rank, and return what rank 0 puts into the queue ``results``.

    Raises:
        SystemExit: a rank has failed.
    """
    started: Any = context or multiprocessing.get_context("spawn")
    results = started.Queue()
    processes = [started.Process(target=measure, args=(rank, *rest, results)) for rank in range(count)]
    for process in processes:
        process.start()
    found = None
    while found is None:
        with suppress(queue.Empty):
            found = results.get(timeout=1)
        if found is None and any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            raise SystemExit("a rank has failed")
    for process in processes:
        process.join()
    return found
