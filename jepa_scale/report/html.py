"""Pictures on the pages of one run and of several: how they are embedded, and those that both pages have."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from jepa_scale.report.compare import Variant, projections, spectra
from jepa_scale.report.compare_plots import by_horizon, of_projection, of_spectrum
from jepa_scale.report.step_time import mean_parts
from jepa_scale.report.step_time_plots import stacked


def figure(name: str, png: bytes) -> str:
    """A captioned picture as HTML; it holds the PNG itself."""
    data = base64.b64encode(png).decode("ascii")
    name = escape(name)
    return (
        f'<figure><figcaption>{name}</figcaption><img alt="plot of {name}" src="data:image/png;base64,{data}"></figure>'
    )


def plots(title: str, images: Mapping[str, bytes], fold: bool = False) -> list[str]:
    """A section of pictures, by their captions; nothing where there are none."""
    if not images:
        return []
    inside = f'<div class="plots">{"".join(figure(name, png) for name, png in images.items())}</div>'
    return folded(title, inside) if fold else [f"<h2>{title}</h2>{inside}"]


def folded(title: str, inside: str) -> list[str]:
    """A section that is opened by a click."""
    return [f"<details><summary>{title}</summary>{inside}</details>"]


def shared_sections(of: Sequence[Variant]) -> list[str]:
    """Final values by horizon, representations and the parts of a step, of runs that have them."""
    horizons = {f"{split}: {metric} by horizon": png for (split, metric), png in by_horizon(of).items()}
    spectrum = {f"{name}, spectrum": of_spectrum(lines) for name, lines in spectra(of).items()}
    places = {
        f"{split}: {name}": of_projection(saved) for split, found in projections(of).items() for name, saved in found
    }
    return [
        *plots("Final values by horizon", horizons),
        *plots("Representations: spectra", spectrum),
        *plots("Representations: where they lie", places),
        *plots("Where a step's time goes", _breakdowns(of)),
    ]


def _breakdowns(of: Sequence[Variant]) -> dict[str, bytes]:
    """One picture, with a bar a variant: the mean over its runs."""
    bars: dict[str, dict[str, float]] = {}
    for variant in of:
        found = [parts for run in variant.runs if (parts := mean_parts(run.rows))]
        if found:
            names = dict.fromkeys(name for parts in found for name in parts)
            bars[variant.name] = {n: statistics.fmean(parts.get(n, 0.0) for parts in found) for n in names}
    return {"parts of a step, mean": stacked(bars)} if bars else {}
