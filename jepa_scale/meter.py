"""Adds up what the losses report, on the device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from jepa_scale.distributed import all_reduce_sum
from jepa_scale.objectives.base import Loss
from jepa_scale.packing import PackedBatch

T = TypeVar("T")
COUNTS = ("tokens", "budget", "skipped")
"""What is added up of a batch's counts, in this order."""


class Meter:
    """Sums of a loss's contributions; :meth:`read` is the only host sync of the training loop."""

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._busy_since: float | None = None
        self._sums: dict[str, Tensor] = {}
        self._gauges: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._steps: set[int] = set()
        self._waited = self._worked = 0.0

    def add(self, loss: Loss, batch: PackedBatch) -> None:
        for name, value in loss.means.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._gauges.update(loss.gauges)
        for name in COUNTS:
            self._counts[name] += batch.counts[name]
        self._steps.add(batch.step)

    def read(self) -> tuple[dict[str, float], int]:
        """Means over the optimizer steps since the last call, and the tokens of all ranks in them. Collective.

        ``data_wait`` is the share of the time since then that a rank waited for data, on average; with a token budget
        ``packing_efficiency`` is the share of it that was used; ``skipped_samples`` were damaged and left out.
        """
        names = sorted(self._sums)
        self._worked += time.perf_counter() - self._busy_since if self._busy_since is not None else 0.0
        own = [*(float(n) for n in self._counts.values()), self._waited, self._waited + self._worked]
        host = torch.tensor(own, dtype=torch.float64).to(self.device)
        local = torch.cat([torch.stack([self._sums[name].double() for name in names]), host])
        *sums, tokens, budget, skipped, waited, passed = all_reduce_sum(local).tolist()
        values = {name: total / len(self._steps) for name, total in zip(names, sums, strict=True)}
        values |= {name: float(value) for name, value in self._gauges.items()}
        if passed:
            values["data_wait"] = waited / passed
        if budget:
            values["packing_efficiency"] = tokens / budget
        if skipped:
            values["skipped_samples"] = skipped
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
