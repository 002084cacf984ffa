"""Targets of earlier steps, as further negatives of InfoNCE (MoCo, He et al., arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, pad_rows
from jepa_scale.losses.infonce import NO_KEY, first_of_each
from jepa_scale.models.fp32_state import Fp32State, overwrite


class TargetQueue(Fp32State):
    """The newest targets with distinct keys, the same on every rank.

    Targets that are recorded in a step enter the queue at its end, so the step's losses use those of earlier steps only.

    Args:
        size: number of rows. dim: width of a target.
    """

    rows: Tensor
    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("keys", torch.full((size,), NO_KEY, dtype=torch.int64))
        self._observed: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def observe(self, rows: Tensor, keys: Tensor, capacity: int) -> None:
        """Record the targets (n, d) of this rank's micro-batch and their keys (n,). ``capacity`` ≥ n is the same on every
        rank."""
        self._observed.append((pad_rows(rows.detach().float(), capacity), pad_rows(keys, capacity, NO_KEY)))

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Insert the targets recorded since the last call at the front, in the order of the global batch. Collective.

        Args:
            good: 0-d bool; if it is false, the queue does not change.
        """
        rows = [all_gather_rows(part) for part, _ in self._observed]
        keys = [all_gather_rows(part) for _, part in self._observed]
        self._observed = []
        every_row, every_key = torch.cat([*rows, self.rows]), torch.cat([*keys, self.keys])
        keep, _, _ = first_of_each(every_key)  # the newest row of each key
        order = torch.argsort((~keep).to(torch.int8), stable=True)[: len(self.keys)]
        overwrite(self.rows, every_row[order], good)
        overwrite(self.keys, torch.where(keep[order], every_key[order], NO_KEY), good)
