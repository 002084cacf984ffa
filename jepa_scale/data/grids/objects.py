"""Objects in grids of colours, for the GridJEPA objective: connected components, their features, and their adjacency.

An *object* is a maximal set of cells of one colour that are connected by their sides, or by sides and corners; colour 0 is the
background. The grids of a call are concatenated and labelled at once, and everything else is a reduction over the cells sorted by object. There are no
loops over grids, cells or objects.

====== ============= ====================================================================================================
column feature       definition and unit
====== ============= ====================================================================================================
0      area          cells / 900 (the cells of a grid of 30 × 30, the largest of ARC)
1, 2   centroid      row and column of the mean cell, in units of 30 cells from the grid's upper left corner
3, 4   corner        top row and left column of the bounding box, in units of 30 cells
5, 6   extent        height and width of the bounding box, in units of 30 cells
7      fill          cells / cells of the bounding box, in (0, 1]
8      aspect        (width − height) / (width + height), in (−1, 1)
9      outline       sides of cells that do not border the object itself / (4 · cells), in (0, 1]
10, 11 symmetry      share of the cells whose mirror image in the box also belongs to the object: left-right, top-bottom
12     contact       share of the grid's 4 borders that the object touches
13–22  colour        1 in the slot of the object's colour 0 … 9, else 0 (the first slot is never used)
====== ============= ====================================================================================================

Units are cells, not fractions of the grid, so that a move by one cell changes the features equally in every grid.

GridJEPA's own features are the other choice. H and W are the rows and columns of the grid:

====== ============= ====================================================================================================
column feature       definition
====== ============= ====================================================================================================
0, 1   area, outline cells / (H · W); sides of cells that do not border the object itself / (H · W)
2, 3   extent        height / H, width / W of the bounding box
4      aspect        width / height
5, 6   colour        number of colours, always 1; the object's colour 1 … 9
7, 8   centroid      row / H and column / W of the mean cell
9–12   box           top row / H, left column / W, bottom row / H, right column / W
13–22  histogram     cells of the n-th of the object's colours / (H · W): of one colour, the area in column 13 and else 0
====== ============= ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

GEOMETRY = 13
COLOURS = 10
FEATURES = GEOMETRY + COLOURS
Features = Literal["cells", "gridjepa"]
SPREAD = (0.01, *[0.1] * 4, *[0.05] * 2, 0.125, 0.3, 0.2, *[0.125] * 2, 0.2, *[0.3] * COLOURS)
"""Approximate standard deviation of each feature of ``cells``, in generated grids and in ARC's."""
SIDE = 30.0
"""Unit of positions and extents, in cells."""


class Objects(NamedTuple):
    """The objects of G grids, grid by grid; within a grid by decreasing area, then by their first cell in reading order.

    Attributes:
        features: (n, 23) float32, see the module's table.
        boxes: (n, 4) int64, bounding boxes: top row, left column, bottom row, right column, all inclusive.
        grid: (n,) int64, index of each object's grid.
        slot: (n,) int64, index of each object within its grid, from 0.
        colours: (n,) int64, colour of each object, 1 … 9.
        counts: (G,) int64, objects of each grid that were kept.
        found: (G,) int64, objects of each grid before the limit to ``slots``.
        cells: (c,) int64, row · width + column of each cell in its grid, object after object, in reading order.
        sizes: (n,) int64, number of cells of each object.
    """

    features: np.ndarray
    boxes: np.ndarray
    grid: np.ndarray
    slot: np.ndarray
    colours: np.ndarray
    counts: np.ndarray
    found: np.ndarray
    cells: np.ndarray
    sizes: np.ndarray


def find_objects(
    grids: Sequence[np.ndarray], slots: int = 16, connectivity: int = 4, kind: Features = "cells"
) -> Objects:
    """Find the ``slots`` largest objects of each grid. A call costs about 0.2 ms even for one grid, so pass many at once.

    Args:
        grids: one or more grids, each (height, width) of colours 0 … 9 with at least one cell.
        slots: largest number of objects kept per grid.
        connectivity: 4: cells that share a side are connected. 8: cells that share a corner, too.
        kind: which of the module's two tables the features are.
    """
    shapes = np.array([grid.shape for grid in grids], dtype=np.int64)
    areas = shapes[:, 0] * shapes[:, 1]
    colours = np.concatenate([grid.ravel() for grid in grids])
    cells = np.flatnonzero(colours)  # index of each coloured cell in the concatenated grids
    grid = np.repeat(np.arange(len(grids)), areas)[cells]
    height, width = shapes[grid].T
    local = cells - (areas.cumsum() - areas)[grid]
    row = local // width
    column = local - row * width

    colour = colours[cells]
    last = len(colours) - 1
    right = (column + 1 < width) & (
        colours[np.minimum(cells + 1, last)] == colour
    )  # the right neighbour belongs to the same object
    below = (row + 1 < height) & (colours[np.minimum(cells + width, last)] == colour)
    joints = [(below, cells + width)]
    if connectivity == 8:
        for step, inside in ((1, column + 1 < width), (-1, column > 0)):
            beneath = cells + width + step
            same = (row + 1 < height) & inside & (colours[np.minimum(beneath, last)] == colour)
            joints.append((same, beneath))
    of = _components(cells, right, joints, len(colours))

    order = of.argsort(kind="stable")  # group cells by object, each in reading order
    row, column, of, cells = row[order], column[order], of[order], cells[order]
    size = np.bincount(of)
    n = len(size)
    firsts = size.cumsum() - size
    first = order[firsts]
    home, tall, wide = grid[first], height[first], width[first]
    top, bottom = row[firsts], row[firsts + size - 1]  # rows ascend within an object
    left, right_most = (extreme.reduceat(column, firsts) if n else firsts for extreme in (np.minimum, np.maximum))
    box_rows, box_columns = bottom - top + 1, right_most - left + 1

    owner = np.full(len(colours), -1)
    owner[cells] = of
    mirrored = owner[cells + (left + right_most)[of] - 2 * column] == of
    flipped = owner[cells + ((top + bottom)[of] - 2 * row) * wide[of]] == of
    neighbours = (right * 1.0 + below)[order]  # counts each side between two cells of an object once

    mean_row, mean_column = np.bincount(of, row, n) / size, np.bincount(of, column, n) / size
    inner = np.bincount(of, neighbours, n)
    own = colour[first].astype(np.int64)
    features = np.zeros((n, FEATURES), dtype=np.float32)
    if kind == "cells":
        geometry = [
            size / SIDE**2,
            mean_row / SIDE,
            mean_column / SIDE,
            top / SIDE,
            left / SIDE,
            box_rows / SIDE,
            box_columns / SIDE,
            size / (box_rows * box_columns),
            (box_columns - box_rows) / (box_columns + box_rows),
            1 - inner / (2 * size),
            np.bincount(of, mirrored, n) / size,
            np.bincount(of, flipped, n) / size,
            ((top == 0) * 1 + (left == 0) + (bottom == tall - 1) + (right_most == wide - 1)) / 4,
        ]
        features[np.arange(n), GEOMETRY + own] = 1
    else:
        area = tall * wide
        geometry = [size / area, (4 * size - 2 * inner) / area, box_rows / tall, box_columns / wide]
        geometry += [box_columns / box_rows, np.ones(n), own, mean_row / tall, mean_column / wide]
        geometry += [top / tall, left / wide, bottom / tall, right_most / wide]
        features[:, GEOMETRY] = size / area
    features[:, :GEOMETRY] = np.stack(geometry, axis=1)

    found = np.bincount(home, minlength=len(grids))
    slot = np.arange(n) - np.repeat(found.cumsum() - found, found)  # objects are in reading order of their first cells,
    chosen = np.lexsort((-size, home))[slot < slots]  # and sorting is stable
    sizes = size[chosen]
    cell = np.arange(sizes.sum()) + np.repeat(firsts[chosen] - (sizes.cumsum() - sizes), sizes)
    return Objects(
        features=features[chosen],
        boxes=np.stack([top, left, bottom, right_most], axis=1)[chosen],
        grid=home[chosen],
        slot=slot[slot < slots],
        colours=own[chosen],
        counts=np.minimum(found, slots),
        found=found,
        cells=local[order[cell]],
        sizes=sizes,
    )


def _components(
    cells: np.ndarray, right: np.ndarray, joints: Sequence[tuple[np.ndarray, np.ndarray]], total: int
) -> np.ndarray:
    """Return the object number of each coloured cell; objects are numbered in reading order of their first cells.

    Horizontal runs of one colour are joined where they touch in the next row. Every run points to an earlier run of its object.
    Pointers are followed and lowered until both ends of every joint agree. The number of rounds is about the logarithm of
    the longest chain (Shiloach & Vishkin, J. Algorithms 3, 1982).

    Args:
        cells: (c,) indices of the coloured cells among all cells, ascending.
        right: (c,) bool, whether the right neighbour belongs to the same object.
        joints: for each direction into the next row (c,) bool, whether the neighbour there does, and (c,) its index.
        total: number of all cells.
    """
    begins = np.ones(len(cells), dtype=bool)
    begins[1:] = ~right[:-1]
    run = begins.cumsum() - 1
    run_at = np.zeros(total, dtype=np.int64)
    run_at[cells] = run
    above = np.concatenate([run[touches] for touches, _ in joints])
    beneath = np.concatenate([run_at[neighbour[touches]] for touches, neighbour in joints])
    root = np.arange(run[-1] + 1 if len(run) else 0)
    while True:
        one, other = root[above], root[beneath]
        if (one == other).all():
            break
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        root = root[root]
        root = root[root]
    return ((root == np.arange(len(root))).cumsum() - 1)[root][run]


def near(boxes: np.ndarray, others: np.ndarray, reach: int = 1) -> np.ndarray:
    """Return (…, n, m) bool, whether two bounding boxes overlap after the first has grown by ``reach`` cells on every side.

    With ``reach`` = 1 these are the boxes that overlap or touch, by a side or by a corner.

    Args:
        boxes: (…, n, 4), in the format of :attr:`Objects.boxes`.
        others: (…, m, 4), in the same format.
    """
    one, other = boxes[..., :, None, :], others[..., None, :, :]
    meets = (one[..., :2] - reach <= other[..., 2:]) & (other[..., :2] <= one[..., 2:] + reach)
    return meets[..., 0] & meets[..., 1]
