"""Where a run's time went: the parts of its steps, as means and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, step_part
from jepa_scale.telemetry.records import FIT, Row
from jepa_scale.utils.format import format_number, text_table


def mean_parts(rows: Sequence[Row]) -> dict[str, float]:
    """Part of a step → its seconds per step, mean over the run's steps; empty where nothing was measured.

    Steps before the first measured row have built caches, buffers and kernels: where there are more, they do not count.
    """
    found = measured(rows)
    weighted = [(row, row["step"] - before["step"]) for before, row in zip(found, found[1:], strict=False)]
    if not weighted:
        weighted = [(row, 1) for row in found]
    steps = sum(n for _, n in weighted)
    parts = [part for part in STEP_PARTS if any(step_part(part) in row for row, _ in weighted)]
    return {part: sum(n * (row.get(step_part(part)) or 0.0) for row, n in weighted) / steps for part in parts}


def breakdown_table(rows: Sequence[Row]) -> str:
    """:func:`mean_parts` with each part's share, as text; empty where nothing was measured."""
    means = mean_parts(rows)
    if not means:
        return ""
    total = sum(means.values())
    lines = [[step_part(part), format_number(mean), f"{mean / total:.1%}"] for part, mean in means.items()]
    return text_table(["part of a step", "s/step", "share"], [*lines, [STEP_TIME, format_number(total), "100.0%"]])


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows of training whose steps were timed, by step; of a step that was done again, the last."""
    by_step = {row["step"]: row for row in rows if row["split"] == FIT and row.get(STEP_TIME)}
    return [by_step[step] for step in sorted(by_step)]
