"""Generated sequences of grids in which every object moves, changes colour, grows or reflects by its own rule.

They are training data that need no download. Each frame is determined by the frames before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jepa_scale.data.sampling.rng import generator

SIDES = (8, 12)
"""Smallest and largest height and width of a grid."""
OBJECTS = (2, 5)
"""Smallest and largest number of objects in a grid."""
COLOURS = 9


@dataclass(slots=True)
class _Object:
    """A sprite and the rules that change it from one frame to the next.

    Attributes:
        mask: (h, w) bool.
        top, left: row and column of its upper left corner.
        colour: 1 … 9.
        step: rows and columns that it moves per frame; the direction reverses at a border.
        recolour: number added to its colour per frame, cyclically.
        grow: side on which its outermost line is repeated (0 … 3: up, left, down, right), or −1.
        reflect: axis (0, 1) along which it is flipped, or −1.
    """

    mask: np.ndarray
    top: int
    left: int
    colour: int
    step: list[int]
    recolour: int
    grow: int
    reflect: int

    def advance(self, height: int, width: int) -> None:
        if self.grow >= 0:
            self._grow(height, width)
        if self.reflect >= 0:
            self.mask = np.flip(self.mask, axis=self.reflect)
        self.colour = (self.colour - 1 + self.recolour) % COLOURS + 1
        self.top, self.step[0] = _bounce(self.top, self.step[0], height - self.mask.shape[0])
        self.left, self.step[1] = _bounce(self.left, self.step[1], width - self.mask.shape[1])

    def _grow(self, height: int, width: int) -> None:
        axis, after = self.grow % 2, self.grow >= 2
        if self.mask.shape[axis] == (height, width)[axis]:
            return
        line = self.mask.take([-1 if after else 0], axis=axis)
        self.mask = np.concatenate([self.mask, line] if after else [line, self.mask], axis=axis)
        if not after:
            self.top, self.left = self.top - (axis == 0), self.left - (axis == 1)
        self.top = min(max(self.top, 0), height - self.mask.shape[0])
        self.left = min(max(self.left, 0), width - self.mask.shape[1])


def _bounce(at: int, step: int, room: int) -> tuple[int, int]:
    """Return position and step after one step within 0 … room; the step reverses at either end."""
    if not 0 <= at + step <= room:
        step = -step
    return min(max(at + step, 0), room), step


def frames(seed: int, number: int, count: int) -> list[np.ndarray]:
    """Generate sequence ``number`` of a seed: ``count`` int8 grids of one shape. A pure function of its arguments."""
    rng = generator(f"grid_rules/{seed}/{number}")
    height, width = (int(n) for n in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    objects = [_draw(rng, height, width) for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))]
    made = []
    for _ in range(count):
        grid = np.zeros((height, width), dtype=np.int8)
        for each in objects:  # later ones lie on top
            rows, columns = each.mask.shape
            grid[each.top : each.top + rows, each.left : each.left + columns][each.mask] = each.colour
        made.append(grid)
        for each in objects:
            each.advance(height, width)
    return made


def _draw(rng: np.random.Generator, height: int, width: int) -> _Object:
    mask = _shape(rng)
    rules = rng.permutation(4)[: int(rng.integers(1, 3))].tolist()  # one or two of: move, recolour, grow, reflect
    step = rng.integers(-1, 2, 2).tolist()
    if step == [0, 0]:
        step[int(rng.integers(2))] = 1
    return _Object(
        mask=mask,
        top=int(rng.integers(height - mask.shape[0] + 1)),
        left=int(rng.integers(width - mask.shape[1] + 1)),
        colour=int(rng.integers(1, COLOURS + 1)),
        step=step if 0 in rules else [0, 0],
        recolour=int(rng.integers(1, COLOURS)) if 1 in rules else 0,
        grow=int(rng.integers(4)) if 2 in rules else -1,
        reflect=int(rng.integers(2)) if 3 in rules else -1,
    )


def _shape(rng: np.random.Generator) -> np.ndarray:
    """Draw a connected shape of up to 4 × 4 cells: a rectangle, its outline, or the cells visited by a random walk."""
    rows, columns = (int(n) for n in rng.integers(1, 5, 2))
    mask = np.ones((rows, columns), dtype=bool)
    kind = int(rng.integers(3))
    if kind == 1:
        mask[1:-1, 1:-1] = False
    if kind == 2:
        mask[:] = False
        row, column = int(rng.integers(rows)), int(rng.integers(columns))
        for move in rng.integers(0, 4, 2 * rows * columns).tolist():
            mask[row, column] = True
            row = min(max(row + (move == 0) - (move == 1), 0), rows - 1)
            column = min(max(column + (move == 2) - (move == 3), 0), columns - 1)
        mask = mask[mask.any(axis=1)][:, mask.any(axis=0)]
    return mask
