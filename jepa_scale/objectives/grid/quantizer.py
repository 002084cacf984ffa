"""A codebook: each row is replaced by the nearest of K codes, which follow the rows (GridJEPA, G5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_rows, all_reduce_sum
from jepa_scale.losses.quantizer import assigned, follow, nearest, perplexity, refresh, straight_through
from jepa_scale.models.fp32_state import AveragedState, overwrite

NEVER = -(2**62)
SETTLING = 2
"""Steps at the start in which all codes move to rows of the batch: what the encoder gives has its final scale then."""


class Quantized(NamedTuple):
    """Attributes: ``rows`` (n, d), the codes, with the gradient of the rows. ``table`` (n, d) fp32, the codes alone. ``codes``
    (n,) int64."""

    rows: Tensor
    table: Tensor
    codes: Tensor


class Quantizer(AveragedState):
    """K codes of width d, learned by moving averages over the global batch, once an optimizer step.

    :meth:`forward` reads the codes; :meth:`observe` notes what was assigned in a micro-batch; :meth:`update` moves the codes.
    Nothing else does, so an evaluation, which calls the first alone, cannot. All state is in buffers, the same on every rank,
    and what was noted is used up before a step ends: a checkpoint between two steps has everything.

    Args:
        codes: K. dim: d.
        decay: γ of :func:`jepa_scale.losses.quantizer.follow`.
        refresh_every: optimizer steps between looks for dead codes. Before the first of them there are looks at 2, 4, 8 … steps:
            what the encoder gives changes fast then. In the first two steps all codes get a place from the batch. 0 = only
            these.
        threshold: a code is dead with less than this times 1/K of what is assigned.
        window: updates that :meth:`usage` looks back on.
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
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def forward(self, rows: Tensor) -> Quantized:
        """(n, d) → the codes nearest to them."""
        codebook = self.read("codebook")
        codes = nearest(rows, codebook)
        table = codebook[codes]
        return Quantized(straight_through(rows, table), table, codes)

    def refreshes(self, step: int) -> bool:
        """Whether codes may be given other places at the end of this optimizer step."""
        return refreshes(step, self.refresh_every)

    @torch.no_grad()
    def observe(self, rows: Tensor, codes: Tensor, lots: Tensor, step: int) -> None:
        """Note a micro-batch of this rank: rows (n, d), the codes (n,) that they were assigned to, and lots (n,) int64 ≥ 0,
        random numbers that are each row's own, wherever it is computed; the rows with the greatest lots are what dead codes move to."""
        rows = rows.detach().float()
        self._noted.append(assigned(rows, codes, len(self.codebook)))
        if self.refreshes(step):
            self._drawn.append(_greatest(rows, lots, len(self.codebook)))

    @torch.no_grad()
    def update(self, good: Tensor, momentum: float) -> None:
        """Move the codes by what was noted on all ranks since the last call. Collective; the same result on every rank, however
        the batch was dealt out.

        Args:
            good: 0-d bool, whether the optimizer has updated anything; if not, nothing changes here, too.
            momentum: of the teacher, for the average of the codes. Where a code has moved to another place, so has its average.
        """
        counts, sums = (torch.stack(parts).sum(dim=0) for parts in zip(*self._noted, strict=True))
        total = all_reduce_sum(torch.cat([counts[:, None], sums], dim=1))
        counts, sums = total[:, 0], total[:, 1:]
        first = self.updates[0] < SETTLING
        moved = torch.zeros_like(counts, dtype=torch.bool)
        codebook, sizes = follow(self.codebook, self.sizes, counts, sums, self.decay)
        if self._drawn:
            rows, lots = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
            rows, lots = _greatest(rows, lots, len(codebook))
            rows, lots = _greatest(all_gather_rows(rows), all_gather_rows(lots), len(codebook))
            # what the first batch was assigned to are random places: all of them move
            sizes = torch.where(first, torch.zeros_like(sizes), sizes)
            codebook = torch.where(first, self.codebook, codebook)
            codebook, sizes, moved = refresh(codebook, sizes, rows, lots >= 0, self.threshold)
        self._noted, self._drawn = [], []
        self.write("codebook", codebook, momentum, moved[:, None], good)
        overwrite(self.sizes, sizes, good)
        overwrite(self.last_used, torch.where(counts > 0, self.updates, self.last_used), good)
        overwrite(self.updates, self.updates + 1, good)

    @torch.no_grad()
    def usage(self) -> Tensor:
        """0-d fp32, share of the codes that were assigned something in the last ``window`` updates."""
        return (self.last_used >= self.updates - self.window).float().mean()

    @torch.no_grad()
    def perplexity(self) -> Tensor:
        """0-d fp32, codes in use by their moving shares; see :func:`jepa_scale.losses.quantizer.perplexity`."""
        return perplexity(self.sizes)


def refreshes(step: int, every: int) -> bool:
    """See :meth:`Quantizer.refreshes`."""
    return step < SETTLING or (every > 0 and (step % every == 0 or (step < every and step & (step - 1) == 0)))


def _greatest(rows: Tensor, lots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` rows with the greatest lots, which are ≥ 0, in their order; filled up with rows of lot −1."""
    missing = max(0, count - len(rows))
    rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    lots = torch.cat([lots, lots.new_full((missing,), -1)])
    lots, chosen = torch.sort(lots, descending=True, stable=True)
    return rows[chosen[:count]], lots[:count]
