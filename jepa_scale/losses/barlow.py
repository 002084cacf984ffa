"""Barlow Twins (Zbontar et al., arXiv 2103.03230, equations 1 and 2), with statistics over the global batch."""

from __future__ import annotations

from torch import Tensor

from jepa_scale.losses.precision import without_autocast
from jepa_scale.losses.statistics import at_least_one, global_moments, off_diagonal_squares, zero_if_none


def barlow(a: Tensor, b: Tensor, total: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Distance between the cross-correlation C of paired rows and the identity, in fp32. Collective.

    C_ij is the mean over the global batch of the product of feature i of ``a`` and feature j of ``b``. Both features are
    batch-normalised first (biased variance + ``eps``, no affine map).

    Args:
        a, b: (m, d), the rows of all micro-batches of this rank in the step
            (:func:`jepa_scale.losses.statistics.rows_of_step`), m ≥ 0. Both get a gradient.
        total: 0-d, number of rows in the global batch.

    Returns:
        Two 0-d tensors, equal on every rank; make each a contribution with
        :func:`jepa_scale.losses.statistics.as_contribution`.

        * align = mean_i (1 − C_ii)²
        * off_diagonal = mean_{i≠j} C_ij², 0 if d is 1

        Both are means over elements, as in LitJEPA, so neither depends on the width. The paper has sums: its weight λ of the
        other elements is λ · (d − 1) here. Without rows both are 0. A single row has no correlation: the values are 1 and 0,
        without gradient.
    """
    with without_autocast(a):
        n = at_least_one(total)
        moments = global_moments(a, b, total)
        scale_a = (moments.squares_a / n + eps).rsqrt()
        scale_b = (moments.squares_b / n + eps).rsqrt()
        correlation = moments.products / n * scale_a[:, None] * scale_b
        d = len(correlation)
        align = (1 - correlation.diagonal()).square().mean()
        off_diagonal = off_diagonal_squares(correlation) / max(d * (d - 1), 1)
        return zero_if_none(align, total), zero_if_none(off_diagonal, total)
