"""Augmentations of a sample's grids that preserve the sample's rule: permute colours, shift, rotate or reflect.

Each transform is drawn once per sample and applied to all its grids, context and target alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Grids = Sequence[np.ndarray]


def recolour(grids: Grids, rng: np.random.Generator) -> list[np.ndarray]:
    """Permute the colours 1 … 9; the background stays."""
    table = np.zeros(10, dtype=np.int8)
    table[1:] = rng.permutation(np.arange(1, 10))
    return [table[grid] for grid in grids]


def turn(grids: Grids, rng: np.random.Generator) -> list[np.ndarray]:
    """Apply one of the 7 rotations and reflections of a square other than the identity."""
    which = int(rng.integers(1, 8))
    turned = [np.rot90(grid, which % 4) for grid in grids]
    return [np.ascontiguousarray(grid.T if which >= 4 else grid) for grid in turned]


def shift(grids: Grids, rng: np.random.Generator) -> list[np.ndarray]:
    """Move the content of all grids by the same rows and columns, at most by the background margin common to all grids.

    The grids' shapes do not change.
    """
    coloured = [grid > 0 for grid in grids if grid.any()]
    if not coloured:
        return list(grids)
    steps = []
    for axis in (0, 1):
        lines = [np.asarray(grid.any(axis=1 - axis)) for grid in coloured]
        before = min(int(line.argmax()) for line in lines)
        after = min(int(line[::-1].argmax()) for line in lines)
        steps.append(int(rng.integers(-before, after + 1)))
    return [np.roll(grid, steps, axis=(0, 1)) for grid in grids]


TRANSFORMS: dict[str, Callable[[Grids, np.random.Generator], list[np.ndarray]]] = {
    "colour": recolour,
    "translation": shift,
    "symmetry": turn,
}
"""Transforms by name: (grids of a sample, generator) → transformed grids. The input grids are not modified."""
