"""Ranks and isotropy of a set of representations, each defined here and nowhere else (table in ``docs/evaluation.md``).

Rows are whole here, gathered on every rank; nothing in this file is collective. Below, λ are the eigenvalues of the Gram
matrix of the centred rows, which is their covariance but for a factor, and σ = √λ are the singular values of the centred rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Rows at a time that are converted to float64."""


@torch.no_grad()
def effective_rank(rows: Tensor) -> Tensor:
    """exp(−Σ p ln p), p = σ / Σσ: the exponential of the entropy of the normalised singular values of the centred rows
    (Roy & Vetterli, "The effective rank", EUSIPCO 2007, definition 1, of the centred matrix).

    (n, d) → 0-d float64, from 1 (one direction) to min(n − 1, d) (as many, equally strong). 0 for rows that are all the
    same, or none: there is no direction at all. NaN if a row has a value that is not finite.
    """
    return _exp_entropy(_eigenvalues(rows).sqrt())


@torch.no_grad()
def covariance_entropy_rank(rows: Tensor) -> Tensor:
    """exp(−Σ q ln q), q = λ / Σλ: the exponential of the entropy of the normalised eigenvalues of the rows' covariance
    (the von Neumann entropy of the covariance divided by its trace).

    (n, d) → 0-d float64, with the range and the special cases of :func:`effective_rank`, above which it never is: λ = σ² weighs
    the strong directions more. The two are equal only if all directions in use are equally strong.
    """
    return _exp_entropy(_eigenvalues(rows))


@torch.no_grad()
def effective_rank_of_directions(rows: Tensor) -> Tensor:
    """The :func:`effective_rank` of the 2n unit vectors ±x / ‖x‖: 1 if all rows x point the same way or the opposite way.

    (n, d) → 0-d float64. The mean of ±x / ‖x‖ is zero, so nothing is centred away, and lengths do not count.
    """
    unit = F.normalize(rows.double(), dim=1)
    return effective_rank(torch.cat([unit, -unit]))


@torch.no_grad()
def isotropy(rows: Tensor) -> Tensor:
    """min Z(c) / max Z(c) over the eigenvectors ±c of the rows' second moments, Z(c) = Σ e^(c · x) over the rows x scaled to
    unit norm (Arora et al., TACL 4, 2016; Mu & Viswanath, arXiv 1702.01417).

    (n, d) → 0-d float64: 1 if no direction is preferred, e⁻² if all rows are one; NaN without rows.
    """
    x = F.normalize(rows.double(), dim=1)
    if not len(x):
        return torch.full((), torch.nan, dtype=torch.float64)
    _, directions = torch.linalg.eigh(x.T @ x)
    along = x @ directions
    sums = torch.cat([along.exp().sum(dim=0), (-along).exp().sum(dim=0)])
    return sums.min() / sums.max()


def _eigenvalues(rows: Tensor) -> Tensor:
    """(n, d) → (min(n, d),) float64 λ, zero where one is rounding; all NaN if a row is not finite."""
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
    # below this an eigenvalue is rounding: of the eigenvalues themselves, or of a mean that is far from zero
    rounding = epsilon * max(n, d) * values.sum() + (epsilon * n * mean).square().sum() * n
    values = torch.where(values > rounding, values, 0.0)
    return torch.where(finite, values, torch.nan)


def _exp_entropy(weights: Tensor) -> Tensor:
    """(k,) ≥ 0 → 0-d, the exponential of the entropy of the weights divided by their sum; 0 if all are zero, NaN if one is."""
    total = weights.sum()
    entropy = torch.special.entr(weights / total.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    return torch.where(total == 0, 0.0, entropy.exp())
