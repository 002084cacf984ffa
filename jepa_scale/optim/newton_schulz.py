"""Orthogonal factors of matrices, by matrix products alone."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a quintic that is steep at 0 and maps [0, 1] into about [0, 1.2], iterated to about [0.7, 1.2] (Jordan et al. 2024)."""
EPS = 1e-7


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ: its singular values, scaled to at most 1, become ones near 1.

    Newton–Schulz iteration X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ from X = M / ‖M‖, the Frobenius norm, with the
    coefficients and constants of Jordan et al. 2024, "Muon". Singular values below about 1e-3 of that norm stay smaller.

    Args:
        matrices: (n, rows, columns), fp32 or bf16; all products are of this dtype.
        steps: iterations.

    Returns:
        (n, rows, columns), the same dtype; 0 for a matrix of zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # (n, r, s), r ≤ s, so that A is small
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)  # (n, 1, 1)
    x = x / norms.clamp(min=EPS).to(x.dtype)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)  # (n, r, r)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
