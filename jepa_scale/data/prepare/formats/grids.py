"""Rows of grids of colours for GridJEPA: checks, and windows of context and target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jepa_scale.data.prepare.base import BadRecord, Record, WindowOptions
from jepa_scale.data.prepare.formats.source import Items
from jepa_scale.utils.errors import InputError

CONTEXT = 3
"""Largest number of grids before the target in a sliding window over frames, unless an option gives another."""
COLOURS = 10


def grid_fault(grid: Any) -> tuple[str, str] | None:
    """Return (reason, detail) of the fault of a grid, None if the grid is valid."""
    if not isinstance(grid, list) or not all(isinstance(row, list) for row in grid):
        return "not a grid", f"must be a list of rows of colours, got {str(grid)[:40]}"
    if not grid or not grid[0]:
        return "empty grid", f"{len(grid)}×0 cells"
    for number, row in enumerate(grid):
        if len(row) != len(grid[0]):
            return "ragged grid", f"row {number} has {len(row)} cells, row 0 has {len(grid[0])}"
        for colour in row:
            if type(colour) is not int:
                return "not an integer colour", f"row {number} holds {colour!r}"
            if not 0 <= colour < COLOURS:
                return "colour outside 0-9", f"row {number} holds {colour}"
    return None


def looks_like_grid(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) for row in value)


def looks_like_grids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(looks_like_grid(grid) for grid in value)


def window_of(options: WindowOptions) -> tuple[int, int]:
    """Return the largest number of grids before the target, and the distance from the last of them to the target."""
    return options.context_window or CONTEXT, options.target_offset or 1


def refuse_windows(options: WindowOptions, what: str) -> None:
    """Refuse the options of windows for data that have none.

    Raises:
        InputError: one of them is set.
    """
    for key in WindowOptions.model_fields:
        if getattr(options, key) is not None:
            raise InputError(f"data.{key}: is for rows of frames, and {what} has no frames; remove the key")


def windows(where: str, frames: Any, field: str = "frames", context: int = CONTEXT, offset: int = 1) -> Items:
    """Yield windows over frames: ``context`` consecutive grids, and as their target the one ``offset`` grids later.

    With too few grids for that, the last one is the target of all grids that are so far before it. A record is named
    ``where#frames[n]`` after its target.
    """
    if not isinstance(frames, list):
        yield BadRecord(where, "not a grid", f"{field} must be a list of grids")
        return
    if len(frames) <= offset:
        yield BadRecord(
            where, "too few frames", f"{field} holds {len(frames)}, a context and a target need {offset + 1}"
        )
        return
    fault = first_fault({f"{field}[{n}]": grid for n, grid in enumerate(frames)})
    if fault:
        yield BadRecord(where, *fault)
        return
    for stop in range(min(context, len(frames) - offset), len(frames) - offset + 1):
        target = stop + offset - 1
        grids = {"context": frames[max(0, stop - context) : stop], "target": frames[target]}
        yield Record(f"{where}#{field}[{target}]", grids)


def pair(where: str, context: Any, target: Any, names: tuple[str, str]) -> Record | BadRecord:
    """Make a record of a context (a list of grids) and its target; a bad record if a grid is invalid."""
    if not isinstance(context, list) or not context:
        return BadRecord(where, "not a grid", f"{names[0]} must be a list of one or more grids")
    many = names[0] == "context"
    grids = {f"{names[0]}[{n}]" if many else names[0]: grid for n, grid in enumerate(context)}
    fault = first_fault({**grids, names[1]: target})
    return BadRecord(where, *fault) if fault else Record(where, {"context": context, "target": target})


def first_fault(grids: Mapping[str, Any]) -> tuple[str, str] | None:
    faults: Iterator[tuple[str, tuple[str, str] | None]] = ((name, grid_fault(grid)) for name, grid in grids.items())
    for name, fault in faults:
        if fault:
            return fault[0], f"{name}: {fault[1]}"
    return None
