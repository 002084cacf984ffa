"""Breakdown of the time of a step into parts, as means and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, step_part
from jepa_scale.telemetry.records import Row
from jepa_scale.utils.format import format_number, text_table
from jepa_scale.utils.splits import TRAIN


def mean_parts(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds per step of each part, averaged over the steps of the run; empty if nothing was measured.

    The steps up to the first measured row also create caches, buffers and kernels. They are left out if there are later rows.
    """
    found = measured(rows)
    weighted = [(row, row["step"] - before["step"]) for before, row in zip(found, found[1:], strict=False)]
    if not weighted:
        weighted = [(row, 1) for row in found]
    steps = sum(n for _, n in weighted)
    parts = [part for part in STEP_PARTS if any(step_part(part) in row for row, _ in weighted)]
    return {part: sum(n * (row.get(step_part(part)) or 0.0) for row, n in weighted) / steps for part in parts}


def breakdown_table(rows: Sequence[Row]) -> str:
    """Return the means of :func:`mean_parts` with each part's share as a text table; empty if nothing was measured."""
    means = mean_parts(rows)
    if not means:
        return ""
    total = sum(means.values())
    lines = [[step_part(part), format_number(mean), f"{mean / total:.1%}"] for part, mean in means.items()]
    return text_table(["part of a step", "s/step", "share"], [*lines, [STEP_TIME, format_number(total), "100.0%"]])


def measured(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of training with timed steps, ordered by step; the last row of a step that was repeated."""
    by_step = {row["step"]: row for row in rows if row["split"] == TRAIN and row.get(STEP_TIME)}
    return [by_step[step] for step in sorted(by_step)]
