"""Adds up what the losses report, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.distributed import all_reduce_sum
from jepa_scale.objectives.base import Loss
from jepa_scale.packing import PackedBatch


class Meter:
    """Sums of a loss's contributions; :meth:`read` is the only host sync of the training loop."""

    def __init__(self, device: torch.device):
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._gauges: dict[str, Tensor] = {}
        self._tokens = 0
        self._steps: set[int] = set()

    def add(self, loss: Loss, batch: PackedBatch) -> None:
        for name, value in loss.means.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._gauges.update(loss.gauges)
        self._tokens += batch.counts["tokens"]
        self._steps.add(batch.step)

    def read(self) -> tuple[dict[str, float], int]:
        """Means over the optimizer steps since the last call, and the tokens of all ranks in them. Collective."""
        names = sorted(self._sums)
        tokens = torch.tensor(self._tokens, dtype=torch.float64, device=self.device)
        local = torch.stack([*[self._sums[name].double() for name in names], tokens])
        *sums, seen = all_reduce_sum(local).tolist()
        values = {name: total / len(self._steps) for name, total in zip(names, sums, strict=True)}
        values |= {name: float(value) for name, value in self._gauges.items()}
        self._reset()
        return values, int(seen)
