"""Ranks and isotropy of a set of representations (table in ``docs/evaluation.md``).

All functions take the gathered rows of all ranks; none is collective. λ are the eigenvalues of the Gram matrix of the
centred rows, which is proportional to their covariance; σ = √λ are the singular values of the centred rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Number of rows that are converted to float64 at a time."""


@torch.no_grad()
def effective_rank(rows: Tensor) -> Tensor:
    """exp(−Σ p ln p), p = σ / Σσ: the exponential of the entropy of the normalised singular values of the centred rows
    (Roy & Vetterli, "The effective rank", EUSIPCO 2007, definition 1, applied to the centred matrix).

    (n, d) → 0-d float64, from 1 (one direction) to min(n − 1, d) (as many equally strong directions). 0 if all rows are
    equal or there are none. NaN if a row has a value that is not finite.
    """
    return _exp_entropy(_eigenvalues(rows).sqrt())


@torch.no_grad()
def covariance_entropy_rank(rows: Tensor) -> Tensor:
    """exp(−Σ q ln q), q = λ / Σλ: the exponential of the entropy of the normalised eigenvalues of the rows' covariance
    (the von Neumann entropy of the covariance divided by its trace).

    (n, d) → 0-d float64, with the range and the special cases of :func:`effective_rank`. It is never larger than that,
    because λ = σ² gives strong directions more weight. The two are equal only if all directions in use are equally strong.
    """
    return _exp_entropy(_eigenvalues(rows))


@torch.no_grad()
def effective_rank_of_directions(rows: Tensor) -> Tensor:
    """The :func:`effective_rank` of the 2n unit vectors ±x / ‖x‖; 1 if all rows x are parallel or antiparallel.

    (n, d) → 0-d float64. The mean of ±x / ‖x‖ is zero, so centring removes nothing. Lengths have no influence.
    """
    unit = F.normalize(rows.double(), dim=1)
    return effective_rank(torch.cat([unit, -unit]))


@torch.no_grad()
def isotropy(rows: Tensor) -> Tensor:
    """min Z(c) / max Z(c) over the eigenvectors ±c of the rows' second moments, with Z(c) = Σ e^(c · x) over the rows x scaled
    to unit norm (Arora et al., TACL 4, 2016; Mu & Viswanath, arXiv 1702.01417).

    (n, d) → 0-d float64: 1 if no direction is preferred, e⁻² if all rows have the same direction; NaN without rows.
    """
    x = F.normalize(rows.double(), dim=1)
    if not len(x):
        return torch.full((), torch.nan, dtype=torch.float64)
    _, directions = torch.linalg.eigh(x.T @ x)
    along = x @ directions
    sums = torch.cat([along.exp().sum(dim=0), (-along).exp().sum(dim=0)])
    return sums.min() / sums.max()


def _eigenvalues(rows: Tensor) -> Tensor:
    """Eigenvalues λ, zero below the rounding error; all NaN if a row is not finite. (n, d) → (min(n, d),) float64."""
    n, d = rows.shape
    epsilon = torch.finfo(torch.float64).eps
    mean = rows.sum(dim=0, dtype=torch.float64) / max(n, 1)
    if n < d:  # the smaller of the two Gram matrices; their non-zero eigenvalues are the same
        centred = rows.double() - mean
        gram = centred @ centred.T
    else:
        gram = torch.zeros(d, d, dtype=torch.float64, device=rows.device)
        for part in rows.split(CHUNK):
            centred = part.double() - mean
            gram.addmm_(centred.T, centred)
    finite = gram.isfinite().all()
    values = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))
    # rounding error: of the eigenvalues themselves, and of centring by a mean that is far from zero
    rounding = epsilon * max(n, d) * values.sum() + (epsilon * n * mean).square().sum() * n
    values = torch.where(values > rounding, values, 0.0)
    return torch.where(finite, values, torch.nan)


def _exp_entropy(weights: Tensor) -> Tensor:
    """Exponential of the entropy of the weights (≥ 0) over their sum; 0 if all are zero, NaN if one is NaN. (k,) → 0-d."""
    total = weights.sum()
    entropy = torch.special.entr(weights / total.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    return torch.where(total == 0, 0.0, entropy.exp())
