"""A codebook (GridJEPA): each row is replaced by the nearest of K codes, which are moving averages of the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, all_reduce_sum
from jepa_scale.losses.quantizer import assigned, follow, nearest, perplexity, refresh, straight_through
from jepa_scale.models.fp32_state import AveragedState, overwrite

NEVER = -(2**62)
"""Update at which a code was last used, if it never was."""
SETTLING = 2
"""Steps at the start in which all codes are replaced by rows of the batch. After them the encoder's output has its final
scale."""


class Quantized(NamedTuple):
    """Quantised rows.

    Attributes:
        rows: (n, d), the codes, whose gradient goes to the rows. table: (n, d) fp32, the codes without gradient.
        codes: (n,) int64, indices of the codes.
    """

    rows: Tensor
    table: Tensor
    codes: Tensor


class Quantizer(AveragedState):
    """K codes of width d, updated by moving averages over the global batch, once in each optimizer step.

    :meth:`forward` reads the codes, :meth:`observe` records the assignments of a micro-batch, and :meth:`update` moves the
    codes. Nothing else changes them, and an evaluation calls only the first. All state is in buffers, the same on every rank.
    What was recorded is used before a step ends, so a checkpoint between two steps is complete.

    Args:
        codes: K. dim: d.
        decay: γ of :func:`jepa_scale.losses.quantizer.follow`.
        refresh_every: optimizer steps between replacements of dead codes. Before step ``refresh_every`` dead codes are also
            replaced at steps 2, 4, 8 …, because the encoder's output changes fast then. In the first two steps all codes are
            replaced by rows of the batch. 0 = in the first two steps only.
        threshold: a code is dead if it is assigned less than this times 1/K of the rows.
        window: number of latest updates that :meth:`usage` covers.
    """

    codebook: Tensor
    average_codebook: Tensor
    sizes: Tensor
    last_used: Tensor
    updates: Tensor

    def __init__(self, codes: int, dim: int, decay: float, refresh_every: int, threshold: float, window: int) -> None:
        super().__init__()
        self.decay, self.refresh_every, self.threshold, self.window = decay, refresh_every, threshold, window
        self.register_averaged("codebook", torch.randn(codes, dim))
        self.register_buffer("sizes", torch.zeros(codes))
        self.register_buffer("last_used", torch.full((codes,), NEVER, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def forward(self, rows: Tensor) -> Quantized:
        """Replace rows (n, d) by the nearest codes."""
        codebook = self.read("codebook")
        codes = nearest(rows, codebook)
        table = codebook[codes]
        return Quantized(straight_through(rows, table), table, codes)

    def refreshes(self, step: int) -> bool:
        """Return whether dead codes are replaced at the end of this optimizer step."""
        return refreshes(step, self.refresh_every)

    @torch.no_grad()
    def observe(self, rows: Tensor, codes: Tensor, priorities: Tensor, step: int) -> None:
        """Record a micro-batch of this rank.

        Args:
            rows: (n, d). codes: (n,), the code that each row was assigned to.
            priorities: (n,) int64 ≥ 0, a random number for each row, independent of the rank that computes it. Dead codes
                are replaced by the rows with the greatest priorities.
            step: the optimizer step.
        """
        rows = rows.detach().float()
        self._observed.append(assigned(rows, codes, len(self.codebook)))
        if self.refreshes(step):
            self._drawn.append(_greatest(rows, priorities, len(self.codebook)))

    @torch.no_grad()
    def update(self, good: Tensor, momentum: float) -> None:
        """Move the codes by what was recorded on all ranks since the last call. Collective. The result is the same on every
        rank and for every split of the batch over ranks.

        Args:
            good: 0-d bool, whether the optimizer updated the parameters; if not, the codes do not change either.
            momentum: the teacher's, for the average of the codes. A replaced code's average is replaced, too.
        """
        counts, sums = (torch.stack(parts).sum(dim=0) for parts in zip(*self._observed, strict=True))
        total = all_reduce_sum(torch.cat([counts[:, None], sums], dim=1))
        counts, sums = total[:, 0], total[:, 1:]
        first = self.updates[0] < SETTLING
        moved = torch.zeros_like(counts, dtype=torch.bool)
        codebook, sizes = follow(self.codebook, self.sizes, counts, sums, self.decay)
        if self._drawn:
            rows, priorities = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
            rows, priorities = _greatest(rows, priorities, len(codebook))
            rows, priorities = _greatest(all_gather_rows(rows), all_gather_rows(priorities), len(codebook))
            # in the first steps assignments are to random codes: all of them are replaced
            sizes = torch.where(first, torch.zeros_like(sizes), sizes)
            codebook = torch.where(first, self.codebook, codebook)
            codebook, sizes, moved = refresh(codebook, sizes, rows, priorities >= 0, self.threshold)
        self._observed, self._drawn = [], []
        self.write("codebook", codebook, momentum, moved[:, None], good)
        overwrite(self.sizes, sizes, good)
        overwrite(self.last_used, torch.where(counts > 0, self.updates, self.last_used), good)
        overwrite(self.updates, self.updates + 1, good)

    @torch.no_grad()
    def usage(self) -> Tensor:
        """Return the share of the codes with an assigned row in the last ``window`` updates, 0-d fp32."""
        return (self.last_used >= self.updates - self.window).float().mean()

    @torch.no_grad()
    def perplexity(self) -> Tensor:
        """Return the perplexity of the codes' moving shares, 0-d fp32; see :func:`jepa_scale.losses.quantizer.perplexity`."""
        return perplexity(self.sizes)


def refreshes(step: int, every: int) -> bool:
    """Return whether dead codes are replaced in a step; see :class:`Quantizer`."""
    return step < SETTLING or (every > 0 and (step % every == 0 or (step < every and step & (step - 1) == 0)))


def _greatest(rows: Tensor, priorities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` rows with the greatest priorities (≥ 0), in descending order, padded with rows of priority −1."""
    missing = max(0, count - len(rows))
    rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    priorities = torch.cat([priorities, priorities.new_full((missing,), -1)])
    priorities, chosen = torch.sort(priorities, descending=True, stable=True)
    return rows[chosen[:count]], priorities[:count]
