"""Changes of a sample's grids that leave what happens in them as it is: other colours, another place, another view of it.

Each is drawn once and applied to all grids of the sample, to the context and to the target alike.
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
    """One of the 7 rotations and reflections of a square that are not the identity."""
    which = int(rng.integers(1, 8))
    turned = [np.rot90(grid, which % 4) for grid in grids]
    return [np.ascontiguousarray(grid.T if which >= 4 else grid) for grid in turned]


def shift(grids: Grids, rng: np.random.Generator) -> list[np.ndarray]:
    """Move everything by the same number of rows and columns, as far as there is background at the borders of every grid; the
    grids' shapes stay."""
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
"""Name → grids of a sample and a generator → the same grids, changed. The arguments stay as they are."""
