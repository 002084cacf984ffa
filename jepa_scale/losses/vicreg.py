"""VICReg (Bardes et al., arXiv 2105.04906, equations 1 to 6), with statistics over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_scale.losses.precision import without_autocast
from jepa_scale.losses.statistics import at_least_one, global_moments, off_diagonal_squares, zero_if_none


def vicreg(a: Tensor, b: Tensor, total: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance of predictions to their targets, and variance and covariance of the predictions, in fp32. Collective.

    Args:
        a: (m, d), the predictions of all micro-batches of this rank in the step
            (:func:`jepa_scale.losses.statistics.rows_of_step`), m ≥ 0.
        b: (m, d), the targets. They get no gradient, so their variance and covariance are not part of the loss (the paper
            trains two branches and sums both).
        total: 0-d, number of rows in the global batch.
        gamma: standard deviation below which a feature is penalised.

    Returns:
        Three 0-d tensors, equal on every rank; make each a contribution with
        :func:`jepa_scale.losses.statistics.as_contribution`.

        * invariance = mean over rows and features of (a − b)²: the paper's squared norm divided by d, so that a weight
          does not depend on the width
        * variance = mean_j max(0, gamma − √(var_j(a) + eps))
        * covariance = Σ_{i≠j} cov_ij(a)² / d

        Variances and covariances are divided by n − 1. Without rows all terms are 0. For a single row only the invariance
        has a gradient.
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
