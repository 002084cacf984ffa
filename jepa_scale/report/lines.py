"""Lines of a plot: colours by group, lines that coincide, and axes that show the measured range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from jepa_scale.report.figure import COLOURS
from jepa_scale.utils.format import format_number

WIDTH, MARKER = 1.4, 3.5
"""Width of a line and diameter of a marker, in points."""
FEW = 25
"""Number of points up to which each has a marker."""
CLOSE, SHARED = 0.01, 0.25
"""Two lines coincide if they are within ``CLOSE`` of the plotted range at ``SHARED`` of the steps that both have."""
DASH = 4.0
"""Length of a dash in widths of the line."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: ``values[i]`` after optimizer step ``steps[i]``, NaN where it was not finite."""

    label: str
    steps: list[int]
    values: list[float]
    group: str = ""
    """Lines of one group share a colour and an entry in the legend; empty = a group of its own."""

    @property
    def finite(self) -> list[float]:
        return [v for v in self.values if math.isfinite(v)]


def draw_lines(axes: Axes, lines: Sequence[Curve], log: bool = False, groups: Sequence[str] = (), **style: Any) -> None:
    """Draw the curves, a colour and an entry in the legend for each group.

    Groups that coincide get dashes that take turns along the line, and rings around each other's markers, so that none of them
    hides another.

    Args:
        log: whether the axis of the values is logarithmic. style: of all lines, in place of the defaults.
        groups: all groups of a page, in the order of its colours, though some may have no curve here.
    """
    groups = list(dict.fromkeys([*groups, *(line.group or line.label for line in lines)]))
    turns = _turns(lines, log)
    named: set[str] = set()
    for line in lines:
        group = line.group or line.label
        number = groups.index(group)
        turn, of = turns[group]
        dashes = (turn * DASH, (DASH, (of - 1) * DASH)) if of > 1 else "-" if number < len(COLOURS) else "--"
        wanted = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": dashes,
            "linewidth": WIDTH,
            "marker": "o" if len(line.finite) <= FEW else None,
            "markersize": MARKER + 2.5 * (of - 1 - turn),
            "clip_on": False,  # the axes end where the values do
            "label": None if group in named else group,
        }
        axes.plot(line.steps, line.values, **(wanted | style))
        named.add(group)


def _turns(lines: Sequence[Curve], log: bool) -> dict[str, tuple[int, int]]:
    """Return each group's number among those that it coincides with, directly or through others, and how many these are."""
    finite = [v for line in lines for v in line.finite if v > 0 or not log]
    if log:
        finite = [math.log(v) for v in finite]
    span = max(finite) - min(finite) if finite else 0.0
    together: dict[str, list[str]] = {line.group or line.label: [line.group or line.label] for line in lines}
    for one, other in combinations(lines, 2):
        first, second = together[one.group or one.label], together[other.group or other.label]
        if first is not second and _coincide(one, other, CLOSE * span, log):
            first += second
            together |= dict.fromkeys(second, first)
    drawn = list(together)
    return {group: (sorted(of, key=drawn.index).index(group), len(of)) for group, of in together.items()}


def _coincide(one: Curve, other: Curve, tolerance: float, log: bool) -> bool:
    _, first, second = np.intersect1d(one.steps, other.steps, assume_unique=True, return_indices=True)
    a, b = np.array(one.values, dtype=float)[first], np.array(other.values, dtype=float)[second]
    known = np.isfinite(a) & np.isfinite(b) & ((a > 0) & (b > 0) if log else True)
    if not known.any():
        return False
    a, b = (np.log(a[known]), np.log(b[known])) if log else (a[known], b[known])
    return float((np.abs(a - b) <= tolerance).mean()) >= SHARED


def fit_values(axes: Axes, values: Sequence[float], fraction: bool = False) -> None:
    """Let the linear axis of values show what was measured.

    It leaves out negative values where none was measured, and for a ``fraction`` values above 1. Values that a table shows as
    one number have one tick.
    """
    low, high = min(values), max(values)
    if format_number(low) == format_number(high):
        axes.yaxis.set_major_locator(FixedLocator([values[-1]]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: format_number(float(value)))
        around = 0.05 * max(abs(low), abs(high)) or 1.0
        axes.set_ylim(low - around, high + around)
        return
    if max(abs(low), abs(high)) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0.0) if low >= 0 else bottom, min(top, 1.0) if fraction and high <= 1 else top)
