"""Sums and moments over the global batch, for losses that are functions of them.

Engines sum gradients over ranks and micro-batches. So a loss L(S) of sums S over the global batch needs no differentiable
collective. The values of S are summed over the ranks without gradient, and each rank propagates dL/dS into its own part of
S only. The engine's sum of these gradients is exactly dL/dθ.

When an optimizer step has several micro-batches, a gather pass without gradient collects the rows of all of them first.
Each micro-batch then computes the loss from all rows of its rank: its own with gradient, the others detached
(:func:`rows_of_step`). So neither loss nor gradient depends on world size, micro-batch size or accumulation.

This holds for functions of sums, not for sums of functions of sums. Within a :func:`global_sum` the result of another must
be detached. That is correct only where its derivative vanishes, as for the mean in a centred moment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_reduce_sum, dp_size
from jepa_scale.losses.precision import without_autocast


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x.contiguous())  # collectives ignore strides

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def global_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` over the data-parallel ranks, in fp32; its gradient is passed unchanged to this rank's ``x``. Collective.

    ``x`` has any shape, equal on every rank; the result has the same.
    """
    x = x.float()
    return x if dp_size() == 1 else _GlobalSum.apply(x)


def global_sums(*parts: Tensor) -> list[Tensor]:
    """:func:`global_sum` of each of several tensors, in one all-reduce."""
    flat = global_sum(torch.cat([part.float().flatten() for part in parts]))
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def rows_of_step(rows: Tensor, others: list[Tensor], micro: int) -> Tensor:
    """All rows of this rank in an optimizer step, in the order of the micro-batches.

    Args:
        rows: (n, …), the rows of this micro-batch, with gradient.
        others: the collected rows of each micro-batch of the step, this one included; they get no gradient. Empty when
            the step has one micro-batch. ``micro``: index of this micro-batch.

    Returns:
        (m, …), m ≥ n; in the wider dtype if they differ.
    """
    if not others:
        return rows
    assert others[micro].shape == rows.shape, (others[micro].shape, rows.shape, micro)
    parts = [other.detach() for other in others]
    parts[micro] = rows
    return torch.cat(parts)


def as_contribution(value: Tensor, part: Tensor) -> Tensor:
    """This micro-batch's contribution to a loss that is equal on every rank.

    The gradient is that of ``value``, which already is this micro-batch's share of dL/dθ. The value is ``value · part``,
    so that the sum over ranks and micro-batches is the loss, counted once.

    Args:
        value: 0-d. part: 0-d; the parts of all ranks and micro-batches sum to 1, e.g. the share of this micro-batch in all
            rows.
    """
    still = value.detach()
    return (value - still) + still * part


class Moments(NamedTuple):
    """Moments of paired rows a (n, d) and b (n, e) over the global batch. Second moments are sums, not divided by n.

    Attributes:
        mean_a: (d,). mean_b: (e,).
        squares_a: (d,), Σ (a − mean_a)². squares_b: (e,).
        products: (d, e), Σ (a − mean_a) (b − mean_b)ᵀ.
        more: sums of the further tensors.
    """

    mean_a: Tensor
    mean_b: Tensor
    squares_a: Tensor
    squares_b: Tensor
    products: Tensor
    more: list[Tensor]


def global_moments(a: Tensor, b: Tensor, total: Tensor, *more: Tensor) -> Moments:
    """Means and centred second moments over the global batch, in fp32, in two all-reduces. Collective.

    The means are computed first and the rows are centred before they are squared, so that a large mean costs no
    precision by cancellation.

    Args:
        a: (m, d), the rows of this rank (see :func:`rows_of_step`), m ≥ 0. b: (m, e), which may be ``a`` itself.
        total: 0-d, number of rows in the global batch. If it is 0, all moments are 0.
        more: further tensors, summed over the ranks by the first all-reduce as :func:`global_sum` does.
    """
    with without_autocast(a):
        a, b, n = a.float(), b.float(), at_least_one(total)
        sum_a, sum_b, *others = global_sums(a.sum(dim=0), b.sum(dim=0), *more)
        mean_a, mean_b = sum_a / n, sum_b / n
        # The derivative of a centred moment by the means is 0, as Σ (a − mean) = 0 over the global batch. For this rank's
        # part alone it is not 0, so the means are detached.
        a, b = a - mean_a.detach(), b - mean_b.detach()
        squares_a, squares_b, products = global_sums(a.square().sum(dim=0), b.square().sum(dim=0), a.T @ b)
    return Moments(mean_a, mean_b, squares_a, squares_b, products, others)


def standardized(rows: Tensor, total: Tensor, eps: float = 1e-3) -> Tensor:
    """Standardise rows to mean 0 and variance 1 over the global batch, in fp32. Collective.

    Args:
        rows: (m, …), the rows of all micro-batches of this rank in the step; moments are computed for each element of a row.
        total: 0-d, number of rows in the global batch.
        eps: added to the standard deviation.

    Returns:
        The same shape. No gradient flows through the moments.
    """
    rows, n = rows.float(), at_least_one(total)
    with torch.no_grad():
        mean = global_sum(rows.sum(dim=0)) / n
        deviation = (global_sum((rows - mean).square().sum(dim=0)) / n).sqrt()
    return (rows - mean) / (deviation + eps)


def at_least_one(total: Tensor) -> Tensor:
    """Return a 0-d count as fp32, at least 1: a denominator for sums that are 0 when the count is."""
    return total.float().clamp(min=1)


def zero_if_none(value: Tensor, total: Tensor) -> Tensor:
    """Return ``value``, which must be finite, or 0 when the global batch has no rows."""
    return value * (total > 0).float()


def off_diagonal_squares(matrix: Tensor) -> Tensor:
    """Sum of the squares of the elements off the diagonal. (d, d) → 0-d.

    The diagonal is set to zero rather than subtracted: it may be so large that fp32 would lose the rest.
    """
    return matrix.square().fill_diagonal_(0).sum()
