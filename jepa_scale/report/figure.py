"""Style of all figures of a report: legible at a width of 360 pixels, and inverted on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe & Ito's colours without the yellow: distinct for all kinds of colour vision, and dark enough for thin lines on
# white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def new_figure() -> tuple[Figure, Axes]:
    """Create a figure of 800 × 480 pixels with one pair of axes."""
    figure = Figure(figsize=(5, 3), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, path: Path | BinaryIO) -> None:
    """Save a figure as PNG, with a legend if it has several labels and no legend yet."""
    (axes,) = figure.axes
    if axes.get_legend() is None and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Software": None})
