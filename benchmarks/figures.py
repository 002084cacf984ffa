"""Panels of curves that can be read on a telephone: one under the other, 800 pixels wide."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe & Ito's, without the yellow."""


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` axes, each 800 × 480 pixels."""
    figure = Figure(figsize=(5, 3 * count), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
