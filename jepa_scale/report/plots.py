"""Plots of a run's metrics as PNG files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from matplotlib.ticker import EngFormatter, MaxNLocator

from jepa_scale.report.figure import COLOURS, new_figure, save_figure
from jepa_scale.report.step_time_plots import plot_breakdown
from jepa_scale.telemetry.metrics import STEP_PARTS, STEP_TIME, describe, in_report_order, step_part
from jepa_scale.telemetry.records import Row, values_of
from jepa_scale.utils.splits import TRAIN

_LOG_SPAN = 30.0  # ratio of largest to smallest value from which a falling metric gets a logarithmic axis
OF_HORIZON = re.compile(r"(.+)_h(\d+)")


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


def plot(metric: str, lines: list[Curve], path: Path | BinaryIO) -> None:
    """Plot the curves of one metric against optimizer steps, as a PNG of 800 × 480 pixels.

    The plot is legible at a width of 360 pixels, and inverted on a dark page.
    """
    figure, axes = new_figure()
    groups = list(dict.fromkeys(line.group or line.label for line in lines))
    named: set[str] = set()
    for line in lines:
        group = line.group or line.label
        number = groups.index(group)
        few = len(line.finite) <= 25
        axes.plot(
            line.steps,
            line.values,
            color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number < len(COLOURS) else "--",
            linewidth=1.4,
            marker="o" if few else None,
            markersize=3.5,
            label=None if group in named else group,
        )
        named.add(group)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(describe(metric).label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    finite = [v for line in lines for v in line.finite]
    if wants_log_axis(metric, finite):
        axes.set_yscale("log")
    elif finite and max(abs(v) for v in finite) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    save_figure(figure, path)


def wants_log_axis(metric: str, values: list[float]) -> bool:
    """Return whether a metric needs a logarithmic axis, as a loss or gradient norm that falls over orders of magnitude does."""
    falls = describe(metric).better == "lower" or metric.endswith("grad_norm")
    return falls and bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_SPAN


def plot_all(rows: list[Row], directory: Path) -> dict[str, Path]:
    """Write a PNG for every metric that was finite at least once, and return metric → file.

    The parts of a step's time share one figure. Other PNG files in the folder are removed, so that it shows this run only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    stacked = {step_part(part) for part in STEP_PARTS}  # in one figure, that of their sum
    for metric, lines in curves(rows).items():
        lines = [line for line in lines if line.finite]
        if lines and metric not in stacked:
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
