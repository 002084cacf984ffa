"""Objects of a grid, cell by cell in plain Python: the reference of :mod:`jepa_scale.data.grids.objects`, for its tests and for
the benchmark of its speed."""

from __future__ import annotations

from typing import Any

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def flood_fill(grid: list[list[int]], connectivity: int = 4, kind: str = "cells") -> list[dict[str, Any]]:
    """Every object of a grid, the largest first, of equals the first in reading order."""
    steps = SIDES if connectivity == 4 else SIDES + CORNERS
    height, width = len(grid), len(grid[0])
    seen = [[False] * width for _ in range(height)]
    objects = []
    for row in range(height):
        for column in range(width):
            colour = grid[row][column]
            if colour == 0 or seen[row][column]:
                continue
            seen[row][column] = True
            waiting, cells = [(row, column)], []
            while waiting:
                r, c = waiting.pop()
                cells.append((r, c))
                for y, x in ((r + down, c + aside) for down, aside in steps):
                    if 0 <= y < height and 0 <= x < width and not seen[y][x] and grid[y][x] == colour:
                        seen[y][x] = True
                        waiting.append((y, x))
            objects.append({"colour": colour, "first": row * width + column, "cells": sorted(cells)})
    objects.sort(key=lambda o: (-len(o["cells"]), o["first"]))
    for found in objects:
        of_kind = features if kind == "cells" else gridjepa_features
        found["features"] = of_kind(found["colour"], found["cells"], height, width)
    return objects


def features(colour: int, cells: list[tuple[int, int]], height: int, width: int) -> list[float]:
    """The 23 features, each from its definition."""
    own, n = set(cells), len(cells)
    rows, columns = [r for r, _ in cells], [c for _, c in cells]
    top, bottom, left, right = min(rows), max(rows), min(columns), max(columns)
    tall, broad = bottom - top + 1, right - left + 1
    outline = sum((y, x) not in own for r, c in cells for y, x in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)))
    mirrored = sum((r, left + right - c) in own for r, c in cells)
    flipped = sum((top + bottom - r, c) in own for r, c in cells)
    contact = (top == 0) + (left == 0) + (bottom == height - 1) + (right == width - 1)
    geometry = [n / 900, sum(rows) / n / 30, sum(columns) / n / 30, top / 30, left / 30, tall / 30, broad / 30]
    geometry += [n / (tall * broad), (broad - tall) / (broad + tall), outline / (4 * n)]
    geometry += [mirrored / n, flipped / n, contact / 4]
    return geometry + [float(colour == slot) for slot in range(10)]


def gridjepa_features(colour: int, cells: list[tuple[int, int]], height: int, width: int) -> list[float]:
    """GridJEPA's 23 features, each from its definition."""
    own, n, area = set(cells), len(cells), height * width
    rows, columns = [r for r, _ in cells], [c for _, c in cells]
    top, bottom, left, right = min(rows), max(rows), min(columns), max(columns)
    outline = sum((r + down, c + aside) not in own for r, c in cells for down, aside in SIDES)
    found = [n / area, outline / area, (bottom - top + 1) / height, (right - left + 1) / width]
    found += [
        (right - left + 1) / (bottom - top + 1),
        1.0,
        float(colour),
        sum(rows) / n / height,
        sum(columns) / n / width,
    ]
    found += [top / height, left / width, bottom / height, right / width]
    return found + [n / area] + [0.0] * 9
