"""Vector quantisation with a codebook that follows by exponential moving averages (van den Oord et al., arXiv 1711.00937,
appendix A.1). Pure functions; the state that they update is :class:`jepa_scale.objectives.grid.quantizer.Quantizer`'s.

A code is the moving average of what was assigned to it, and its size the moving average of how much that was. Kept as a mean
and not as a ratio of two averages, a code that nothing is assigned to stays where it is, bit for bit, however small its size
becomes: nothing is divided by a size that fades.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.losses.precision import without_autocast

TINY = torch.finfo(torch.float32).tiny
ELEMENTS = 1 << 24
"""Distances computed at a time, 64 MiB."""
SAME_PLACE = 1e-4
"""Squared distance, as a part of the rows' variance, below which two rows are at the same place."""


@torch.no_grad()
def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """(n, d) rows, (K, d) codes → (n,) int64, the code that is nearest to each; of equals the first. In fp32."""
    with without_autocast(rows):
        codebook = codebook.float()
        half = codebook.square().sum(dim=1) / 2
        parts = rows.float().split(max(1, ELEMENTS // len(codebook)))
        return torch.cat([torch.addmm(half, part, codebook.T, alpha=-1).argmin(dim=1) for part in parts])


def straight_through(rows: Tensor, quantized: Tensor) -> Tensor:
    """The codes, as if they were the rows: the gradient goes to the rows (Bengio et al., arXiv 1308.3432)."""
    return rows + (quantized.to(rows.dtype) - rows).detach()


def commitment(rows: Tensor, quantized: Tensor) -> Tensor:
    """(n, d), (n, d) → (n,) fp32, mean squared distance of each row to its code, which gets no gradient."""
    return (rows.float() - quantized.detach().float()).square().mean(dim=-1)


@torch.no_grad()
def assigned(rows: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(n, d) rows and (n,) codes → (K,) fp32, rows of each code, and (K, d) fp32, their sums. A product of matrices: a scatter
    would add up in another order each time on a GPU."""
    with without_autocast(rows):
        mine = (codes[:, None] == torch.arange(count, device=codes.device)).float()
        return mine.sum(dim=0), mine.T @ rows.detach().float()


@torch.no_grad()
def follow(codebook: Tensor, sizes: Tensor, counts: Tensor, sums: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Codes (K, d) and sizes (K,) after an optimizer step, from what the global batch assigned to them:

    size ← γ · size + (1 − γ) · count,   code ← code + w · (mean of its rows − code),   w = (1 − γ) · count / size.
    """
    new = decay * sizes + (1 - decay) * counts
    weight = (1 - decay) * counts / new.clamp(min=TINY)  # 0 where nothing was assigned, never above 1
    means = sums / counts.clamp(min=1)[:, None]
    return torch.lerp(codebook, means, weight[:, None]), new


@torch.no_grad()
def refresh(
    codebook: Tensor, sizes: Tensor, pool: Tensor, valid: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give codes that are hardly used another place: that of a row of the batch where there is no code yet.

    Args:
        codebook: (K, d). sizes: (K,), moving averages of how many rows each gets.
        pool: (K, d), rows drawn from the global batch; valid: (K,) bool, which of them there are.
        threshold: a code is dead if its share of the sizes is below ``threshold`` / K.

    Returns:
        Codes, sizes and (K,) bool, which were replaced. The deadest get the first rows of the pool; their size is 0, so that
        the first rows assigned to them decide where they are.
    """
    share = sizes / sizes.sum().clamp(min=TINY)
    order = share.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    dead = share < threshold / len(sizes)
    fresh = valid & ~_taken(pool, valid, codebook, ~dead)
    chosen = (~fresh).int().argsort(stable=True)  # those to be used first, in their order
    pool, fresh = pool[chosen], fresh[chosen]
    replaced = dead & fresh[rank]
    codebook = torch.where(replaced[:, None], pool[rank].to(codebook.dtype), codebook)
    return codebook, torch.where(replaced, torch.zeros_like(sizes), sizes), replaced


def _taken(pool: Tensor, valid: Tensor, codebook: Tensor, alive: Tensor) -> Tensor:
    """(K,) bool, the rows of the pool that lie where a living code does, or an earlier row. Of two codes at one place, which
    is the nearest would be left to rounding."""
    count = valid.sum().clamp(min=1)
    mean = (pool * valid[:, None]).sum(dim=0) / count
    pool, codebook = pool - mean, codebook.float() - mean
    near = SAME_PLACE * (pool.square().sum(dim=1) * valid).sum() / count
    squares = pool.square().sum(dim=1)
    of_pool = squares[:, None] + squares - 2 * (pool @ pool.T)
    of_codes = squares[:, None] + codebook.square().sum(dim=1) - 2 * (pool @ codebook.T)
    earlier = torch.ones_like(of_pool, dtype=torch.bool).tril(-1) & valid
    return ((of_pool < near) & earlier).any(dim=1) | ((of_codes < near) & alive).any(dim=1)


def perplexity(sizes: Tensor) -> Tensor:
    """(K,) sizes → 0-d, exp of the entropy of their shares: how many codes are used, if all that are were used alike."""
    share = sizes.float() / sizes.sum().clamp(min=TINY)
    return torch.special.entr(share).sum().exp()
