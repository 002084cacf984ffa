"""VICReg (Bardes et al., arXiv 2105.04906, equations 1 to 6), with statistics over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.losses.precision import without_autocast
from jepa_scale.losses.statistics import at_least_one, global_moments, off_diagonal_squares, zero_if_none


def vicreg(a: Tensor, b: Tensor, total: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance of predictions to their targets, variance and covariance of the predictions, in fp32. Collective.

    Args:
        a: (m, d) predictions of this rank and all its micro-batches in the step
            (:func:`jepa_scale.losses.statistics.rows_of_step`), m ≥ 0.
        b: (m, d) targets. They get no gradient, and as nothing can spread them, their own variance and covariance do
            not enter (the paper has two trained branches and adds up both).
        total: 0-d, rows in the global batch.
        gamma: the standard deviation that every feature should at least have.

    Returns:
        Three 0-d tensors, the same on every rank; make each a contribution with
        :func:`jepa_scale.losses.statistics.as_contribution`.

        * invariance = mean over rows and features of (a − b)²: the paper's squared norm divided by d, so that a weight
          does not depend on the width
        * variance = mean_j max(0, gamma − √(var_j(a) + eps))
        * covariance = Σ_{i≠j} cov_ij(a)² / d

        Variances and covariances are divided by n − 1. Without rows all are 0; a single row has neither spread nor
        gradient beyond that of its invariance.
    """
    with without_autocast(a):
        a, b = a.float(), b.detach().float()
        moments = global_moments(a, a, total, (a - b).square().mean(dim=1).sum())
        invariance = moments.more[0] / at_least_one(total)
        covariances = moments.products / at_least_one(total - 1)
        spread = (covariances.diagonal() + eps).sqrt()
        variance = torch.relu(gamma - spread).mean()
        covariance = off_diagonal_squares(covariances) / len(covariances)
        return invariance, zero_if_none(variance, total), covariance
