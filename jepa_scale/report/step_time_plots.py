"""Figures of the time of a step; in a file of their own, so that ranks need not import matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from jepa_scale.report.figure import new_figure, save_figure
from jepa_scale.report.step_time import measured
from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, describe, step_part
from jepa_scale.telemetry.records import Row
from jepa_scale.utils.format import format_number

MOST_LETTERS = 24
"""Maximum length of a run's name beside its bar."""


def stacked(bars: Mapping[str, Mapping[str, float]]) -> bytes:
    """Plot a stacked bar for each name, as a PNG of 800 pixels' width.

    ``bars`` maps names to the seconds per step of each part (:func:`jepa_scale.report.step_time.mean_parts`).
    """
    figure, axes = new_figure()
    figure.set_size_inches(5, 1.5 + 0.5 * len(bars))
    totals = [sum(parts.values()) for parts in bars.values()]
    left = [0.0] * len(bars)
    for part in (part for part in STEP_PARTS if any(part in parts for parts in bars.values())):
        lengths = [parts.get(part, 0.0) for parts in bars.values()]
        axes.barh(range(len(bars)), lengths, left=left, height=0.6, color=_colour(part), label=part)
        for y, (start, length) in enumerate(zip(left, lengths, strict=True)):
            if length > 0.12 * max(totals):  # there is room for its share
                share = f"{length / totals[y]:.0%}"
                axes.text(start + length / 2, y, share, ha="center", va="center", color="white", fontsize="small")
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for y, total in enumerate(totals):
        axes.text(total, y, f" {format_number(total)} s", va="center", fontsize="small")
    axes.set_xlim(0, 1.2 * max(totals))
    names = [name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…" for name in bars]
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.yaxis.grid(False)
    axes.set_xlabel("seconds per step")
    axes.legend(fontsize="small", frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    buffer = io.BytesIO()
    save_figure(figure, buffer)
    return buffer.getvalue()


def plot_breakdown(rows: Sequence[Row], path: Path) -> None:
    """Plot the parts of a step in seconds, stacked, against optimizer steps, as a PNG of 800 × 480 pixels."""
    save_figure(figure_of_breakdown(rows), path)


def figure_of_breakdown(rows: Sequence[Row]) -> Figure:
    """Draw a bar for each measured row; the axis of steps ends where the bars do."""
    found = measured(rows)
    parts = [part for part in STEP_PARTS if any(step_part(part) in row for row in found)]
    figure, axes = new_figure()
    bottom = [0.0] * len(found)
    steps = [row["step"] for row in found]
    widths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    for part in parts:
        heights = [row.get(step_part(part)) or 0.0 for row in found]
        # a row covers the steps since the row before, its own included
        widths_left = [-w for w in widths]
        axes.bar(steps, heights, width=widths_left, bottom=bottom, align="edge", color=_colour(part), label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xlim(steps[0] - widths[0], steps[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(describe(STEP_TIME).label)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return figure


def _colour(part: str) -> Any:
    return colormaps["tab10"](STEP_PARTS.index(part))
