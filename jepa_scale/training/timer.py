"""Timing of a step's parts. The training loop marks the begin of each part; the times of the parts add up to the step's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from jepa_scale.distributed.comm import all_reduce_sum, dp_rank, dp_size
from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, step_part


class StepTimer:
    """Clock that measures the seconds of each of a step's ``STEP_PARTS``.

    On a CPU it uses the host's clock. A GPU runs asynchronously to the host, so there each part ends with a CUDA event on the
    current stream, and the times between events are measured. A part's time is then the *device's*, and ``data`` is the time
    that the device is idle because data are missing. Recording an event does not wait. Events are read in :meth:`read` only.

    Args:
        on: whether it measures; otherwise :meth:`enter` does nothing and :meth:`read` returns nothing.
        now: the host's clock, in seconds.
    """

    def __init__(self, device: torch.device, on: bool = True, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._on, self._now = device, on, now
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []  # the part that begins, and its time

    def enter(self, part: str | None) -> None:
        """Mark the begin of a part, which ends the part before it. None = no training; this time is not counted."""
        if self._on:
            assert part is None or part in STEP_PARTS, part
            self._marks.append((part, self._mark()))

    def read(self, steps: int) -> dict[str, float]:
        """Return means over the ``steps`` steps since the last call and over the ranks, in seconds. Parts that took no time on
        any rank are left out. Collective; waits for the device.

        ``time_per_step`` is the sum of the parts. ``time_data_slowest`` is ``time_data`` of the rank that waits longest for
        data; all others wait for this rank.
        """
        if not self._on:
            return {}
        part = self._marks[-1][0]
        self.enter(part)
        if self._on_gpu:
            self._marks[-1][1].synchronize()  # earlier events on the same stream are then complete, too
        own = dict.fromkeys(STEP_PARTS, 0.0)
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                own[name] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        del self._marks[:-1]
        ranks = dp_size()
        waits = [0.0] * ranks
        waits[dp_rank()] = own["data"]
        sums = all_reduce_sum(torch.tensor([*own.values(), *waits], dtype=torch.float64).to(self._device)).tolist()
        means = {part: total / ranks / steps for part, total in zip(STEP_PARTS, sums, strict=False) if total > 0}
        values = {STEP_TIME: sum(means.values()), **{step_part(part): mean for part, mean in means.items()}}
        if ranks > 1:
            values["time_data_slowest"] = max(sums[len(STEP_PARTS) :]) / steps
        return values

    def _mark(self) -> Any:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
