"""Traces of a few optimizer steps by ``torch.profiler``, and on CUDA snapshots of the allocator's history."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jepa_scale.distributed.comm import ParallelContext

logger = logging.getLogger(__name__)

FOLDER = "profile"
EVENTS = 100_000
"""Most allocations and frees in a snapshot of memory; of more, the newest stay."""


class StepProfiler:
    """Profiler of the optimizer steps from ``steps[0]`` to ``steps[1]``, both included; the run's first step is number 1.

    Every rank writes a trace of its own, because a step takes as long as its slowest rank and the traces of the others show that they
    wait. The files are ``profile/steps_A_to_B_rank_R.pt.trace.json.gz``, which https://ui.perfetto.dev opens, and on CUDA
    ``…_memory.pickle``, which https://docs.pytorch.org/memory_viz opens. A step is the range ``ProfilerStep#N``; the parts of a
    step (``data``, ``forward`` …) are ranges within it. What runs between steps, as an evaluation does, is recorded outside of
    these ranges.

    Args:
        steps: None profiles nothing; all methods then return at once.
        start: number of steps that are done already, for a resumed run.
    """

    def __init__(self, steps: Sequence[int] | None, run_dir: Path, ranks: ParallelContext, start: int = 0) -> None:
        self._first, self._last = steps or (0, 0)
        self._run_dir, self._ranks = run_dir, ranks
        self._profile: Any = None
        self._step: Any = None
        self._stored: tuple[int, int] = (0, 0)
        if steps and self._first <= start and ranks.is_main:
            done = f"log.profile: the run goes on after step {start:,}; "
            if self._last <= start:
                logger.warning(f"{done}steps {self._first} to {self._last} are done, so nothing is profiled")
            else:
                logger.warning(f"{done}steps {start + 1} to {self._last} are profiled")

    def begin(self, step: int) -> None:
        """Begin a step, before its data are waited for."""
        if not self._first <= step <= self._last:
            return
        if self._profile is None:
            self._start(step)
        self._step = torch.profiler.record_function(f"ProfilerStep#{step}")
        self._step.__enter__()

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()
        self._stored = step, step

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the block, a part of a step, in the trace."""
        if self._step is None:
            yield
            return
        with torch.profiler.record_function(name):
            yield

    def end(self, step: int) -> bool:
        """End a step. Return whether it was the last one, after which :meth:`write` is due."""
        if self._step is None:
            return False
        self._step.__exit__(None, None, None)
        self._step, self._stored = None, (self._stored[0], step)
        return step == self._last

    def write(self) -> None:
        """Stop, and write the files of the steps that were profiled. A full disk causes a warning only."""
        if self._profile is None:
            return
        if self._step is not None:  # an exception within a step
            self._step.__exit__(None, None, None)
            self._step = None
        if self._on_cuda:
            torch.cuda.synchronize(self._ranks.device)  # kernels of the last step may still run
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"steps_{self._stored[0]}_to_{self._stored[1]}_rank_{self._ranks.rank}"
        trace = self._run_dir / FOLDER / f"{name}.pt.trace.json.gz"
        try:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(trace))
            if self._on_cuda:
                torch.cuda.memory._dump_snapshot(str(trace.parent / f"{name}_memory.pickle"))
        except (OSError, RuntimeError) as error:
            logger.warning(f"{trace} was not written: {error}; the run goes on without it")
        else:
            if self._ranks.is_main:
                logger.info(f"profile of steps {self._stored[0]} to {self._stored[1]}: {trace}")
        finally:
            if self._on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def _on_cuda(self) -> bool:
        return self._ranks.device.type == "cuda"

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()  # the run has ended within the steps to profile
