"""Vector quantisation with a codebook updated by exponential moving averages (van den Oord et al., arXiv 1711.00937,
appendix A.1). The functions have no state; :class:`jepa_scale.objectives.grid.quantizer.Quantizer` holds it.

A code is the moving average of the rows assigned to it; its size is the moving average of their number. The code is kept as
a mean, not as a ratio of two averages. So a code without rows does not change by a bit, however small its size becomes,
because nothing is divided by a vanishing size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.losses.precision import without_autocast

TINY = torch.finfo(torch.float32).tiny
ELEMENTS = 1 << 24
"""Number of distances computed at a time: 64 MiB."""
EQUAL_DISTANCE = 1e-4
"""Squared distance, relative to the variance of the rows, below which two rows count as equal."""


@torch.no_grad()
def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest code of each row, the first of several equally near ones, computed in fp32.

    (n, d) rows, (K, d) codes → (n,) int64.
    """
    with without_autocast(rows):
        codebook = codebook.float()
        half = codebook.square().sum(dim=1) / 2
        parts = rows.float().split(max(1, ELEMENTS // len(codebook)))
        return torch.cat([torch.addmm(half, part, codebook.T, alpha=-1).argmin(dim=1) for part in parts])


def straight_through(rows: Tensor, quantized: Tensor) -> Tensor:
    """Return the codes, with their gradient passed straight to the rows (Bengio et al., arXiv 1308.3432)."""
    return rows + (quantized.to(rows.dtype) - rows).detach()


def commitment(rows: Tensor, quantized: Tensor) -> Tensor:
    """Mean squared distance of each row to its code, in fp32; the code gets no gradient. (n, d), (n, d) → (n,)."""
    return (rows.float() - quantized.detach().float()).square().mean(dim=-1)


@torch.no_grad()
def assigned(rows: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Count and sum the rows assigned to each code.

    A matrix product does both: on a GPU a scatter would add in a different order each time.

    Returns:
        From (n, d) rows and (n,) codes: (K,) fp32 counts, and (K, d) fp32 sums.
    """
    with without_autocast(rows):
        mine = (codes[:, None] == torch.arange(count, device=codes.device)).float()
        return mine.sum(dim=0), mine.T @ rows.detach().float()


@torch.no_grad()
def follow(codebook: Tensor, sizes: Tensor, counts: Tensor, sums: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Update codes (K, d) and sizes (K,) by the counts and sums that the global batch assigned in one optimizer step:

    size ← γ · size + (1 − γ) · count,   code ← code + w · (mean of its rows − code),   w = (1 − γ) · count / size.
    """
    new = decay * sizes + (1 - decay) * counts
    weight = (1 - decay) * counts / new.clamp(min=TINY)  # 0 for a code without rows, at most 1
    means = sums / counts.clamp(min=1)[:, None]
    return torch.lerp(codebook, means, weight[:, None]), new


@torch.no_grad()
def refresh(
    codebook: Tensor, sizes: Tensor, pool: Tensor, valid: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace codes that are hardly used by rows of the batch that no code is near to.

    Args:
        codebook: (K, d). sizes: (K,), moving averages of the number of rows of each code.
        pool: (K, d), rows drawn from the global batch. valid: (K,) bool, whether a row of the pool is filled.
        threshold: a code is dead if its share of the sizes is below ``threshold`` / K.

    Returns:
        Codes, sizes, and a (K,) bool mask of the replaced codes. The least used codes get the first rows of the pool. The
        size of a replaced code is 0, so that the first rows assigned to it determine it.
    """
    share = sizes / sizes.sum().clamp(min=TINY)
    order = share.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    dead = share < threshold / len(sizes)
    fresh = valid & ~_taken(pool, valid, codebook, ~dead)
    chosen = (~fresh).int().argsort(stable=True)  # usable rows first, in their order
    pool, fresh = pool[chosen], fresh[chosen]
    replaced = dead & fresh[rank]
    codebook = torch.where(replaced[:, None], pool[rank].to(codebook.dtype), codebook)
    return codebook, torch.where(replaced, torch.zeros_like(sizes), sizes), replaced


def _taken(pool: Tensor, valid: Tensor, codebook: Tensor, alive: Tensor) -> Tensor:
    """Mark the rows of the pool that equal a live code or an earlier row, (K,) bool.

    Between two equal codes, rounding would decide which is the nearest.
    """
    count = valid.sum().clamp(min=1)
    mean = (pool * valid[:, None]).sum(dim=0) / count
    pool, codebook = pool - mean, codebook.float() - mean
    near = EQUAL_DISTANCE * (pool.square().sum(dim=1) * valid).sum() / count
    squares = pool.square().sum(dim=1)
    of_pool = squares[:, None] + squares - 2 * (pool @ pool.T)
    of_codes = squares[:, None] + codebook.square().sum(dim=1) - 2 * (pool @ codebook.T)
    earlier = torch.ones_like(of_pool, dtype=torch.bool).tril(-1) & valid
    return ((of_pool < near) & earlier).any(dim=1) | ((of_codes < near) & alive).any(dim=1)


def perplexity(sizes: Tensor) -> Tensor:
    """Effective number of codes in use: the exponential of the entropy of the codes' shares. (K,) sizes → 0-d."""
    share = sizes.float() / sizes.sum().clamp(min=TINY)
    return torch.special.entr(share).sum().exp()
