"""Adds up what the losses report, on the device."""

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
from jepa_scale.training.timer import StepClock

T = TypeVar("T")
COUNTS = ("tokens", "budget", "skipped")
"""What is added up of a batch's counts, in this order."""


class Meter:
    """Sums of a loss's contributions; :meth:`read` is the only host sync of the training loop."""

    def __init__(self, device: torch.device, breakdown: bool = False):
        self.device = device
        self.clock = StepClock(device, breakdown)
        """Tells the parts of a step apart, with ``breakdown``."""
        self.bad_steps: list[int] = []
        """Steps without a finite gradient among those that the last :meth:`read` was about."""
        self.flops = 0
        """What all ranks have spent in the steps that the last :meth:`read` was about."""
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
        """A micro-batch's contributions."""
        for name, value in loss.means.items():
            self._step[name] = self._step[name] + value if name in self._step else value
        self._gauges.update(loss.gauges)
        for name in COUNTS:
            self._counts[name] += batch.counts[name]

    def spend(self, flops: int) -> None:
        """What a step costs this rank, whatever becomes of it."""
        self._spent += flops

    def step_done(self, step: int, grad_norm: Tensor) -> None:
        """The step's last micro-batch is in. Where the norm is not finite the engine has skipped the update, and the
        step's contributions, which may be NaN, count for nothing.

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
        """Means over the optimizer steps since the last call, and the tokens of all ranks in them. Collective.

        ``data_wait`` is the share of the time since then that a rank waited for data, on average; with a token budget
        ``packing_efficiency`` is the share of it that was used; ``skipped_samples`` were damaged and left out;
        ``skipped_steps`` had no finite gradient and are in no mean (:attr:`bad_steps` names them). What the :attr:`clock`
        measured is there too.
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
        values |= self.clock.read(len(good))
        self._reset()
        return values, int(tokens)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each arrives counts as waiting for data. What is done after :meth:`read`, an
        evaluation perhaps, counts as neither waiting nor working."""
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
