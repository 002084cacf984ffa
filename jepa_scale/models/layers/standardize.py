"""Standardisation of rows to mean 0 and variance 1 in each channel, by moments that follow the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_reduce_sum
from jepa_scale.models.fp32_state import AveragedState, overwrite

DECAY = 0.5
"""Decay of the moments per optimizer step; low, because they must follow the changing weights."""
EPSILON = 1e-3


class Standardize(AveragedState):
    """Layer (x − mean) / deviation for each channel, with the moments of the last few steps, which get no gradient.

    Before a codebook this layer keeps codes in use. While an encoder learns, all its rows drift together, and a code without
    assigned rows would stay behind; after the layer, rows and codes share their origin and scale. (Shared moments of rows and
    codes: Huh et al., arXiv 2305.08842, section 4; batch normalisation before a codebook: Łańcucki et al., arXiv 2005.08520.)
    Moments of the current batch would do the same, but a micro-batch could then not be encoded before all the others.

    As in :class:`jepa_scale.objectives.grid.quantizer.Quantizer`, :meth:`observe` records and :meth:`update` writes.
    """

    updates: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_averaged("mean", torch.zeros(dim))
        self.register_averaged("deviation", torch.ones(dim))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self._noted: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        """Standardise rows, (n, d) → (n, d), in the same dtype."""
        return ((rows.float() - self.read("mean")) / self.read("deviation")).to(rows.dtype)

    @torch.no_grad()
    def observe(self, standardized: Tensor) -> None:
        """Record a micro-batch of this rank: the output of :meth:`forward`, (n, d)."""
        rows = standardized.detach().float()
        count = torch.full_like(rows[:1].sum(dim=0), len(rows))
        self._noted.append(torch.stack([count, rows.sum(dim=0), rows.square().sum(dim=0)]))

    @torch.no_grad()
    def update(self, good: Tensor, momentum: float) -> None:
        """Update the moments from the rows recorded on all ranks since the last call. Collective.

        Args:
            good: 0-d bool; if it is false nothing changes.
            momentum: momentum of the teacher, for the averages.
        """
        count, total, squares = all_reduce_sum(torch.stack(self._noted).sum(dim=0))
        self._noted = []
        n = count.clamp(min=1)
        # moments of rows that are almost standardised already, so the difference of squares does not cancel
        shift = total / n
        spread = (squares / n - shift.square()).clamp(min=0)
        mean, deviation = self.read("mean"), self.read("deviation")
        fresh = self.updates == 0
        weight = torch.where(fresh, 1.0, 1.0 - DECAY) * (count > 0)
        new_mean = mean + weight * shift * deviation
        new_deviation = torch.lerp(deviation, deviation * spread.sqrt() + EPSILON, weight)
        self.write("mean", new_mean, momentum, fresh, good)
        self.write("deviation", new_deviation, momentum, fresh, good)
        overwrite(self.updates, self.updates + 1, good)
