"""The ranks of the tests: what they import, and how long they live."""

from __future__ import annotations

import os
import sys
import threading

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed import launch
from tests.distributed.launch import run_ranks


def imported(ranks: ParallelContext) -> set[str]:
    import jepa_scale.train  # noqa: F401

    return {"torch", "jepa_scale.train", "matplotlib"} & set(sys.modules)


def test_a_rank_does_not_import_what_draws():
    """Only rank 0 plots, at the end of the run."""
    assert run_ranks(imported, 2, fresh=True) == [{"torch", "jepa_scale.train"}] * 2


def with_threads(ranks: ParallelContext, more: int) -> int:
    """Start threads that never end, as a process group's does that somebody keeps."""
    for _ in range(more):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def test_ranks_live_on_until_they_have_many_threads():
    launch.end_ranks()
    first = run_ranks(with_threads, 2, 0)
    assert run_ranks(with_threads, 2, launch.MOST_THREADS) == first
    assert not set(run_ranks(with_threads, 2, 0)) & set(first)
