"""Plots of a run's metrics as PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jepa_scale.report.figure import new_figure, save_figure
from jepa_scale.report.lines import Curve, draw_lines, fit_values
from jepa_scale.report.step_time_plots import plot_breakdown
from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, describe, in_report_order, step_part
from jepa_scale.telemetry.records import Row, values_of
from jepa_scale.utils.splits import TRAIN

_LOG_SPAN = 30.0  # ratio of largest to smallest value from which a falling metric gets a logarithmic axis
OF_HORIZON = re.compile(r"(.+)_h(\d+)")


def curves(rows: list[Row]) -> dict[str, list[Curve]]:
    """Return the curves of each metric, one for each split, in the order of a report; the split of training comes first.

    Metrics by horizon (``retrieval_top1_h8``) become one metric, ``retrieval_top1_by_horizon``, with a curve for each horizon.
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for metric, value in values_of(row).items():
            label = row["split"]
            if found := OF_HORIZON.fullmatch(metric):
                metric, label = f"{found[1]}_by_horizon", f"{label}, {found[2]} tokens"
            by_step = points.setdefault(metric, {}).setdefault(label, {})
            by_step[row["step"]] = math.nan if value is None else float(value)
    order = in_report_order(set(points))
    result = {}
    for metric in order:
        splits = sorted(points[metric].items(), key=lambda item: item[0] != TRAIN)  # stable: TRAIN first
        result[metric] = [
            Curve(split, sorted(by_step), [by_step[s] for s in sorted(by_step)]) for split, by_step in splits
        ]
    return result


def plot(metric: str, lines: list[Curve], path: Path | BinaryIO, groups: Sequence[str] = ()) -> None:
    """Plot the curves of one metric against optimizer steps, as a PNG of 800 × 480 pixels.

    The plot is legible at a width of 360 pixels, and inverted on a dark page.
    """
    save_figure(figure_of(metric, lines, groups), path)


def figure_of(metric: str, lines: list[Curve], groups: Sequence[str] = ()) -> Figure:
    """Draw the curves of one metric, of which at least one has a finite value.

    The axis of steps goes from the first to the last measured one. ``groups`` are those of :func:`draw_lines`.
    """
    figure, axes = new_figure()
    finite = [v for line in lines for v in line.finite]
    log = wants_log_axis(metric, finite)
    draw_lines(axes, lines, log, groups)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(describe(metric).label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    steps = [step for line in lines for step in line.steps]
    if min(steps) < max(steps):
        axes.set_xlim(min(steps), max(steps))
    if log:
        axes.set_yscale("log")
    else:
        fit_values(axes, finite, describe(metric).unit.startswith("fraction"))
    return figure


def wants_log_axis(metric: str, values: list[float]) -> bool:
    """Return whether a metric needs a logarithmic axis, as a loss or gradient norm that falls over orders of magnitude does."""
    falls = describe(metric).better == "lower" or metric.endswith("grad_norm")
    return falls and bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_SPAN


def plot_all(rows: list[Row], directory: Path) -> dict[str, Path]:
    """Write a PNG for every metric with a curve, one that was finite after two steps or more, and return metric → file.

    The parts of a step's time share one figure. Other PNG files in the folder are removed, so that it shows this run only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    stacked = {step_part(part) for part in STEP_PARTS}  # in one figure, that of their sum
    for metric, lines in curves(rows).items():
        lines = [line for line in lines if line.finite]
        if metric not in stacked and any(len(line.finite) > 1 for line in lines):
            files[metric] = directory / f"{file_name(metric)}.png"
            if metric == STEP_TIME:
                plot_breakdown(rows, files[metric])
            else:
                plot(metric, lines, files[metric])
    for old in set(directory.glob("*.png")) - set(files.values()):
        old.unlink()
    return files


def file_name(metric: str) -> str:
    """Return the metric's name without characters that a file name cannot hold."""
    return re.sub(r"[^\w.-]+", "_", metric)
