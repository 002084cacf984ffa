"""Sums and moments over the global batch, for losses that are functions of them.

Engines sum gradients over ranks and micro-batches. So a loss L(S) of sums S over the global batch needs no
differentiable collective: the values of S are added up over the ranks without gradient, and each rank lets dL/dS flow
into its own part of S alone. What the ranks get, added up by the engine, is exactly dL/dθ.

When an optimizer step has several micro-batches, a first pass without gradient has collected every micro-batch's rows;
each micro-batch then takes part with all rows of its rank, its own with gradient and the others detached
(:func:`rows_of_step`). So neither loss nor gradient depends on world size, micro-batch size or accumulation.

This holds for functions of sums, not for sums of functions of sums: inside another :func:`global_sum` the result of one
must be detached, which is only right where that derivative vanishes (as it does for the mean in a centred moment).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_scale.distributed.comm import all_reduce_sum, data_size
from jepa_scale.losses.precision import without_autocast


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x.contiguous())  # collectives add up memory, whatever its strides say

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def global_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, in fp32; the gradient is the identity into this rank's x. Collective.

    Any shape, the same on every rank → that shape.
    """
    x = x.float()
    return x if data_size() == 1 else _GlobalSum.apply(x)


def global_sums(*parts: Tensor) -> list[Tensor]:
    """:func:`global_sum` of each of several tensors, in one all-reduce."""
    flat = global_sum(torch.cat([part.float().flatten() for part in parts]))
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def rows_of_step(rows: Tensor, others: list[Tensor], micro: int) -> Tensor:
    """All rows of this rank in an optimizer step, in the order of the micro-batches.

    Args:
        rows: (n, …) of this micro-batch, with gradient.
        others: the collected rows of each of the step's micro-batches, this one's included; they get no gradient. Empty
            when the step has one micro-batch. ``micro``: which of them this is.

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
    """A loss that is the same on every rank, as this micro-batch's contribution to it.

    The gradient is that of ``value``: this micro-batch's share of dL/dθ already. The number is ``value · part``, so that
    sums over ranks and micro-batches report the loss once.

    Args:
        value: 0-d. part: 0-d; the parts of all ranks and micro-batches sum to 1, e.g. this micro-batch's rows over all.
    """
    still = value.detach()
    return (value - still) + still * part


class Moments(NamedTuple):
    """Moments of paired rows a (n, d) and b (n, e) over the global batch. Sums, not yet divided by n.

    Attributes:
        mean_a: (d,). mean_b: (e,).
        squares_a: (d,), Σ (a − mean_a)². squares_b: (e,).
        products: (d, e), Σ (a − mean_a) (b − mean_b)ᵀ.
        more: what else was to be added up.
    """

    mean_a: Tensor
    mean_b: Tensor
    squares_a: Tensor
    squares_b: Tensor
    products: Tensor
    more: list[Tensor]


def global_moments(a: Tensor, b: Tensor, total: Tensor, *more: Tensor) -> Moments:
    """Means and centred second moments over the global batch, in fp32, in two all-reduces. Collective.

    The means come first and the rows are centred before they are squared, so that a large mean cancels nothing.

    Args:
        a: (m, d) of this rank (see :func:`rows_of_step`), m ≥ 0. b: (m, e), which may be a itself.
        total: 0-d, rows in the global batch. Without any, all moments are 0.
        more: tensors to add up over the ranks with the first all-reduce, as :func:`global_sum` does.
    """
    with without_autocast(a):
        a, b, n = a.float(), b.float(), at_least_one(total)
        sum_a, sum_b, *others = global_sums(a.sum(dim=0), b.sum(dim=0), *more)
        mean_a, mean_b = sum_a / n, sum_b / n
        # A centred moment is flat in the means: Σ (a − mean) = 0 over the global batch. This rank's part of it is not,
        # so the means have to be detached here.
        a, b = a - mean_a.detach(), b - mean_b.detach()
        squares_a, squares_b, products = global_sums(a.square().sum(dim=0), b.square().sum(dim=0), a.T @ b)
    return Moments(mean_a, mean_b, squares_a, squares_b, products, others)


def standardized(rows: Tensor, total: Tensor, eps: float = 1e-3) -> Tensor:
    """Rows with mean 0 and variance 1 over the global batch, in fp32. Collective.

    Args:
        rows: (m, …) of this rank and all its micro-batches in the step; each of the other dimensions' places has moments of
            its own. total: 0-d, rows in the global batch. eps: added to the standard deviation.

    Returns:
        The same shape. The moments get no gradient, so a loss of the result has no pull on the rows' mean or scale as such.
    """
    rows, n = rows.float(), at_least_one(total)
    with torch.no_grad():
        mean = global_sum(rows.sum(dim=0)) / n
        deviation = (global_sum((rows - mean).square().sum(dim=0)) / n).sqrt()
    return (rows - mean) / (deviation + eps)


def at_least_one(total: Tensor) -> Tensor:
    """0-d count → fp32, at least 1: a denominator for sums that are 0 when there is nothing to count."""
    return total.float().clamp(min=1)


def zero_if_none(value: Tensor, total: Tensor) -> Tensor:
    """A finite ``value``, or 0 when the global batch has no rows."""
    return value * (total > 0).float()


def off_diagonal_squares(matrix: Tensor) -> Tensor:
    """(d, d) → 0-d, the sum of the squares beside the diagonal. (The diagonal is struck out rather than subtracted: it
    may be larger than all the rest by more than fp32 can tell.)"""
    return matrix.square().fill_diagonal_(0).sum()
