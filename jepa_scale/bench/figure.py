"""The figure of a task: each arm's difference to its baseline and to its control, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jepa_scale.bench.results import Result
from jepa_scale.bench.runs import CONTROL
from jepa_scale.bench.task import BASELINE
from jepa_scale.report.figure import COLOURS, new_figure, save_figure

LABELS = {"to_baseline": f"to {BASELINE}", "to_control": "to its control"}


def draw(results: Sequence[Result], path: Path) -> bool:
    """Draw the differences of one task's first measure, a row for each case and arm; returns False if there are none."""
    first = results[0].measure if results else ""
    shown = [
        r for r in results if r.measure == first and not r.arm.endswith(CONTROL) and (r.to_baseline or r.to_control)
    ]
    if not shown:
        return False
    figure, axis = new_figure()
    figure.set_size_inches(6.4, 1.2 + 0.45 * len(shown))
    for number, (key, name) in enumerate(LABELS.items()):
        drawn = [(height, found) for height, r in enumerate(reversed(shown)) if (found := getattr(r, key)) is not None]
        for index, (height, found) in enumerate(drawn):
            y = height + (0.5 - number) * 0.3
            label = name if index == 0 else None  # an entry in the legend each
            axis.plot([found.low, found.high], [y, y], color=COLOURS[number], linewidth=2.5, solid_capstyle="butt")
            axis.plot([found.mean], [y], "o", color=COLOURS[number], markersize=5, label=label)
    several = len({r.case for r in shown}) > 1
    names = [f"{r.case}, {r.arm}" if several else r.arm for r in reversed(shown)]
    axis.set_yticks(range(len(shown)), names)
    axis.set_ylim(-0.5, len(shown) - 0.5)
    axis.margins(x=0.08)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"difference in {first.replace('_', ' ')} ({shown[0].better} is better)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return True
