"""What the spectrum of representations says: how many directions they use, and whether these are used alike.

Rows are whole here, gathered on every rank; nothing in this file is collective.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def covariance_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the normalised eigenvalues of the rows' covariance.

    (n, d) → 0-d float64, from 1 to min(n − 1, d); 0 for rows that are all the same. It is never above
    :func:`jepa_scale.metrics.representation.effective_rank`, which takes the square roots of these eigenvalues.
    """
    x = rows.double()
    x = x - x.mean(dim=0, keepdim=True) if len(x) else x
    values = torch.linalg.eigvalsh(x @ x.T if len(x) < x.shape[1] else x.T @ x)
    rounding = torch.finfo(torch.float64).eps * max(rows.shape) * rows.double().square().sum()
    values = torch.where(values > rounding, values, 0.0)
    total = values.sum()
    entropy = torch.special.entr(values / total.clamp(min=torch.finfo(torch.float64).tiny)).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)


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
