"""FLOPs of the losses' matrix products over rows, counted as in :mod:`jepa_scale.models.flops`.

Every count is for one rank and one optimizer step of k micro-batches. It includes the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jepa_scale.packing import PackedBatch

StepFlops = Callable[[Sequence[PackedBatch]], int]
"""This rank's micro-batches of an optimizer step → FLOPs of this rank's training on them. It uses only integers that the
host has."""


def contrast_flops(
    queries: int, capacity: int, dim: int, micros: int, world_size: int, trained: bool = True, queue: int = 0
) -> int:
    """Return the FLOPs of :func:`jepa_scale.losses.infonce.contrast`.

    Args:
        queries: queries of this rank in the step. capacity: candidates of one rank's micro-batch, padding rows included.
        trained: whether candidates get a gradient. queue: candidates from earlier steps.
    """
    # the scores of all the rank's queries with all candidates, once
    scores = 2 * queries * (world_size * capacity * micros + queue) * dim
    own = scores * (1 + trained)  # backward, in the queries' own micro-batch
    elsewhere = scores * (micros - 1) * trained
    return scores + own + 2 * elsewhere


def moments_flops(rows: int, dim: int, micros: int, sides: int) -> int:
    """Return the FLOPs of :func:`jepa_scale.losses.statistics.global_moments` of two (rows, dim) tensors.

    Args:
        rows: the rank's rows of the step. sides: how many of the two tensors get a gradient.
    """
    return micros * 2 * rows * dim * dim * (1 + sides)


def sigreg_flops(rows: int, dim: int, micros: int, slices: int = 256, knots: int = 8, trained: bool = True) -> int:
    """Return the FLOPs of :func:`jepa_scale.losses.sigreg.sigreg`.

    Args:
        rows: the rank's rows of the step. knots: number of knots above 0. trained: whether the rows get a gradient.
    """
    projections = 2 * rows * slices * dim  # three times: forward, recomputation in the backward, gradient
    return micros * (projections + trained * (2 * projections + 2 * 2 * rows * slices * knots))
