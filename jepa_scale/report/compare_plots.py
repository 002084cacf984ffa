"""Figures that compare runs, as PNG."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jepa_scale.report.compare import Variant, final_metrics
from jepa_scale.report.figure import COLOURS, new_figure, save_figure
from jepa_scale.report.lines import Curve, draw_lines, fit_values
from jepa_scale.report.plots import OF_HORIZON, plot
from jepa_scale.telemetry.metrics import describe
from jepa_scale.telemetry.records import values_of

LINKS = 60
"""Maximum number of pairs joined by a line in a projection; more would hide the points."""


def overlaid(of: Sequence[Variant]) -> dict[tuple[str, str], bytes]:
    """Plot the curves of all runs, one colour a variant: (split, metric) → PNG.

    Metrics that were logged only once are left out. Metrics by horizon are left to :func:`by_horizon`.
    """
    lines: dict[tuple[str, str], list[Curve]] = {}
    for variant in of:
        for run in variant.runs:
            points: dict[tuple[str, str], dict[int, float]] = {}
            for row in run.rows:
                for metric, value in values_of(row).items():
                    if not OF_HORIZON.fullmatch(metric):
                        points.setdefault((row["split"], metric), {})[row["step"]] = (
                            math.nan if value is None else float(value)
                        )
            for what, by_step in points.items():
                curve = Curve(run.name, sorted(by_step), [by_step[step] for step in sorted(by_step)], variant.name)
                if curve.finite:
                    lines.setdefault(what, []).append(curve)
    order = [what for what in final_metrics(of) if any(len(line.finite) > 1 for line in lines.get(what, []))]
    images = {}
    for what in order:
        buffer = io.BytesIO()
        plot(what[1], lines[what], buffer, [variant.name for variant in of])
        images[what] = buffer.getvalue()
    return images


def by_horizon(of: Sequence[Variant]) -> dict[tuple[str, str], bytes]:
    """Plot final values over the horizon, as the mean and the range over seeds: (split, metric) → PNG.

    Metrics with one horizon are left to the tables.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for split, metric in final_metrics(of):
        if match := OF_HORIZON.fullmatch(metric):
            found.setdefault((split, match[1]), set()).add(int(match[2]))
    return {
        what: _png(figure_by_horizon(of, *what, sorted(horizons)))
        for what, horizons in found.items()
        if len(horizons) > 1
    }


def figure_by_horizon(of: Sequence[Variant], split: str, metric: str, horizons: Sequence[int]) -> Figure:
    """Draw the final values of a metric at these horizons, a line for each variant."""
    figure, axes = new_figure()
    measured = {}
    for variant in of:
        values = {h: variant.values(split, f"{metric}_h{h}") for h in horizons}
        if any(values.values()):
            measured[variant.name] = {h: many for h, many in values.items() if many}
    lines = [
        Curve(name, list(values), [statistics.fmean(many) for many in values.values()])
        for name, values in measured.items()
    ]
    draw_lines(axes, lines, groups=[variant.name for variant in of])
    for line, values in zip(axes.lines, measured.values(), strict=True):
        low, high = [min(many) for many in values.values()], [max(many) for many in values.values()]
        axes.fill_between(list(values), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(horizons, [str(h) for h in horizons])
    axes.set_xlabel("horizon, tokens")
    axes.set_ylabel(describe(metric).label)
    finite = [value for values in measured.values() for many in values.values() for value in many]
    fit_values(axes, finite, describe(metric).unit.startswith("fraction"))
    return figure


def of_spectrum(lines: Sequence[tuple[str, Sequence[float]]], groups: Sequence[str] = ()) -> bytes:
    """Plot singular values divided by their sum, the largest first: one line a run, one colour a variant.

    The line of a collapsed model falls steeply at the start. ``groups`` are those of :func:`draw_lines`.
    """
    figure, axes = new_figure()
    spectra = [(name, [value for value in values if value > 0]) for name, values in lines]
    curves = [Curve(name, list(range(1, len(values) + 1)), values) for name, values in spectra]
    draw_lines(axes, curves, True, groups, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("singular value, the largest first")
    axes.set_ylabel("share of their sum")
    return _png(figure)


def of_projection(saved: Mapping[str, Any]) -> bytes:
    """Plot representations along their first two principal directions, one colour a kind; up to ``LINKS`` pairs are joined."""
    figure, axes = new_figure()
    kinds = list(saved["projections"].items())
    if len(kinds) == 2 and len(kinds[0][1]) == len(kinds[1][1]):
        every = max(1, len(kinds[0][1]) // LINKS)
        for (x0, y0), (x1, y1) in list(zip(kinds[0][1], kinds[1][1], strict=True))[::every]:
            axes.plot([x0, x1], [y0, y1], color="#bbbbbb", linewidth=0.5, zorder=1)
    for (kind, points), colour in zip(kinds, COLOURS, strict=False):
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=7,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=kind,
            zorder=2,
        )
    first, second = saved["explained"]
    axes.set_xlabel(f"first principal direction ({first:.0%} of the variance)")
    axes.set_ylabel(f"second ({second:.0%})")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    save_figure(figure, buffer)
    return buffer.getvalue()
