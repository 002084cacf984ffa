"""FLOPs of what the losses do with rows, where it is a product of matrices. Counted as :mod:`jepa_scale.models.flops` counts.

Everything is told for one rank and one optimizer step of k micro-batches, and includes the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jepa_scale.packing import PackedBatch

StepFlops = Callable[[Sequence[PackedBatch]], int]
"""This rank's micro-batches of an optimizer step → what training on them costs this rank. Of plain integers that the host has."""


def contrast_flops(
    queries: int, capacity: int, dim: int, micros: int, world_size: int, trained: bool = True, queue: int = 0
) -> int:
    """Of :func:`jepa_scale.losses.infonce.contrast`.

    Args:
        queries: of this rank in the step. capacity: candidates of a micro-batch, rows that fill up included.
        trained: whether candidates get a gradient. queue: candidates of earlier steps.
    """
    # of all the rank's queries with all candidates, once
    scores = 2 * queries * (world_size * capacity * micros + queue) * dim
    own = scores * (1 + trained)  # backward, in the queries' own micro-batch
    elsewhere = scores * (micros - 1) * trained
    return scores + own + 2 * elsewhere


def moments_flops(rows: int, dim: int, micros: int, sides: int) -> int:
    """Of :func:`jepa_scale.losses.statistics.global_moments` of two (rows, dim), the rank's rows of the step; ``sides``: how
    many of the two get a gradient."""
    return micros * 2 * rows * dim * dim * (1 + sides)


def sigreg_flops(rows: int, dim: int, micros: int, slices: int = 256, knots: int = 8) -> int:
    """Of :func:`jepa_scale.losses.sigreg.sigreg` of the rank's rows of the step. ``knots``: those above 0."""
    projections = 2 * rows * slices * dim  # forward, once more in the backward, and back
    return micros * (3 * projections + 2 * 2 * rows * slices * knots)
