"""Sums of the metrics that losses report, accumulated on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_reduce_sum
from jepa_scale.objectives.base import Loss
from jepa_scale.packing import PackedBatch
from jepa_scale.training.timer import StepTimer

T = TypeVar("T")
COUNTS = ("tokens", "budget", "skipped")
"""Keys of a batch's counts that are added up, in this order."""


class MetricAccumulator:
    """Accumulator of a loss's contributions. :meth:`read` is the only host sync of the training loop."""

    def __init__(self, device: torch.device, breakdown: bool = False):
        self.device = device
        self.timer = StepTimer(device, breakdown)
        """Clock of a step's parts; it measures with ``breakdown``."""
        self.bad_steps: list[int] = []
        """Steps without a finite gradient among the steps of the last :meth:`read`."""
        self.flops = 0
        """FLOPs of all ranks in the steps of the last :meth:`read`."""
        self._reset()

    def _reset(self) -> None:
        self._busy_since: float | None = None
        self._sums: dict[str, Tensor] = {}
        self._gauges: dict[str, Tensor | float] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._step: dict[str, Tensor] = {}
        self._good: list[Tensor] = []
        self._steps: list[int] = []
        self._waited = self._worked = 0.0
        self._spent = 0

    def add(self, loss: Loss, batch: PackedBatch) -> None:
        """Add a micro-batch's contributions."""
        for name, value in {"loss": loss.total.detach(), **loss.means}.items():
            self._step[name] = self._step[name] + value if name in self._step else value
        self._gauges.update(loss.gauges)
        for name in COUNTS:
            self._counts[name] += batch.counts[name]

    def add_flops(self, flops: int) -> None:
        """Add the FLOPs of a step on this rank; they also count if its update is skipped."""
        self._spent += flops

    def step_done(self, step: int, grad_norm: Tensor) -> None:
        """Close a step after its last micro-batch. If the norm is not finite, the engine has skipped the update, and the
        step's contributions, which may be NaN, are dropped.

        Args:
            grad_norm: 0-d, the same on every rank.
        """
        good = torch.isfinite(grad_norm)
        for name, value in self._step.items():
            kept = torch.where(good, value.double(), torch.zeros((), dtype=torch.float64, device=value.device))
            self._sums[name] = self._sums[name] + kept if name in self._sums else kept
        self._step = {}
        self._good.append(good)
        self._steps.append(step)

    @property
    def steps(self) -> list[int]:
        """Steps since the last :meth:`read`."""
        return list(self._steps)

    def read(self) -> tuple[dict[str, float], int]:
        """Return means over the optimizer steps since the last call, and the tokens of all ranks in them. Collective.

        ``data_wait`` is the share of the time that a rank waited for data, averaged over ranks. ``packing_efficiency`` is the
        used share of the token budget, if there is one. ``skipped_samples`` counts damaged samples that were left out.
        ``skipped_steps`` counts steps without a finite gradient, which are in no mean (:attr:`bad_steps` lists them). The
        values of :attr:`timer` are included.
        """
        names = sorted(self._sums)
        self._worked += time.perf_counter() - self._busy_since if self._busy_since is not None else 0.0
        own = [*self._counts.values(), self._waited, self._waited + self._worked, self._spent]
        host = torch.tensor(own, dtype=torch.float64).to(self.device)
        local = torch.cat([torch.stack([self._sums[name] for name in names]), host])
        *sums, tokens, budget, skipped, waited, passed, flops = all_reduce_sum(local).tolist()
        self.flops = int(flops)
        good = torch.stack(self._good).tolist()
        self.bad_steps = [step for step, ok in zip(self._steps, good, strict=True) if not ok]
        values = {name: total / sum(good) if any(good) else math.nan for name, total in zip(names, sums, strict=True)}
        values |= {name: float(value) for name, value in self._gauges.items()}
        if passed:
            values["data_wait"] = waited / passed
        if budget:
            values["packing_efficiency"] = tokens / budget
        if skipped:
            values["skipped_samples"] = skipped
        if self.bad_steps:
            values["skipped_steps"] = float(len(self.bad_steps))
        values |= self.timer.read(len(good))
        self._reset()
        return values, int(tokens)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches unchanged and measure the time until each arrives as waiting for data. Time after :meth:`read`, for
        example an evaluation, counts as neither waiting nor working."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self._busy_since = time.perf_counter()
            self._waited += self._busy_since - asked
            yield batch
            if self._busy_since is not None:
                self._worked += time.perf_counter() - self._busy_since
