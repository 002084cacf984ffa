"""Targets of earlier steps, as further negatives of InfoNCE (MoCo, He et al., arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, pad_rows
from jepa_scale.losses.infonce import NO_KEY, first_of_each
from jepa_scale.models.fp32_state import Fp32State, overwrite


class TargetQueue(Fp32State):
    """The newest targets of different keys, the same on every rank.

    What is noted in a step enters at its end, so a step's losses see what was there before it.

    Args:
        size: rows. dim: width of a target.
    """

    rows: Tensor
    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("keys", torch.full((size,), NO_KEY, dtype=torch.int64))
        self._noted: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def note(self, rows: Tensor, keys: Tensor, capacity: int) -> None:
        """A micro-batch's targets (n, d) and their keys (n,), of this rank; n ≤ ``capacity``, which is the same on every rank."""
        self._noted.append((pad_rows(rows.detach().float(), capacity), pad_rows(keys, capacity, NO_KEY)))

    @torch.no_grad()
    def update(self, good: Tensor) -> None:
        """Take in what was noted since the last call, in the order of the global batch, before what is there. Collective.

        Args:
            good: 0-d bool; if it is false nothing changes.
        """
        rows = [all_gather_rows(noted) for noted, _ in self._noted]
        keys = [all_gather_rows(noted) for _, noted in self._noted]
        self._noted = []
        every_row, every_key = torch.cat([*rows, self.rows]), torch.cat([*keys, self.keys])
        keep, _, _ = first_of_each(every_key)  # of one key the newest
        order = torch.argsort((~keep).to(torch.int8), stable=True)[: len(self.keys)]
        overwrite(self.rows, every_row[order], good)
        overwrite(self.keys, torch.where(keep[order], every_key[order], NO_KEY), good)
