"""Where a run's time went: the parts of its steps, as a table and as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps

from jepa_scale.picture import new_picture, save_picture
from jepa_scale.table import format_number, text_table
from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, describe, step_part
from jepa_scale.telemetry.records import FIT, Row


def breakdown_table(rows: Sequence[Row]) -> str:
    """Seconds per step of each part, mean over the run's steps, and its share; empty where nothing was measured.

    Steps before the first measured row have built caches, buffers and kernels: where there are more, they do not count.
    """
    found = _measured(rows)
    weighted = [(row, row["step"] - before["step"]) for before, row in zip(found, found[1:], strict=False)]
    if not weighted:
        weighted = [(row, 1) for row in found]
    steps = sum(n for _, n in weighted)
    if not steps:
        return ""
    names = [step_part(part) for part in STEP_PARTS if any(step_part(part) in row for row, _ in weighted)]
    means = {name: sum(n * (row.get(name) or 0.0) for row, n in weighted) / steps for name in names}
    total = sum(means.values())
    lines = [[name, format_number(mean), f"{mean / total:.1%}"] for name, mean in means.items()]
    return text_table(["part of a step", "s/step", "share"], [*lines, [STEP_TIME, format_number(total), "100.0%"]])


def plot_breakdown(rows: Sequence[Row], path: Path) -> None:
    """Seconds per step against optimizer steps, the parts stacked, as a PNG of 800 × 480 pixels."""
    found = _measured(rows)
    parts = [part for part in STEP_PARTS if any(step_part(part) in row for row in found)]
    figure, axes = new_picture()
    bottom = [0.0] * len(found)
    steps = [row["step"] for row in found]
    widths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    for part in parts:
        heights = [row.get(step_part(part)) or 0.0 for row in found]
        # a row is about the steps up to its own, since the row before
        colour = colormaps["tab10"](STEP_PARTS.index(part))
        axes.bar(steps, heights, width=[-w for w in widths], bottom=bottom, align="edge", color=colour, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(describe(STEP_TIME).label)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    save_picture(figure, path)


def _measured(rows: Sequence[Row]) -> list[Row]:
    by_step = {row["step"]: row for row in rows if row["split"] == FIT and row.get(STEP_TIME)}
    return [by_step[step] for step in sorted(by_step)]
