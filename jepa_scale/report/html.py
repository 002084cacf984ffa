"""HTML of figures, and the sections that the pages of one run and of several runs share."""

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
    """Return a figure with its caption as HTML, with the PNG embedded."""
    data = base64.b64encode(png).decode("ascii")
    name = escape(name)
    return (
        f'<figure><figcaption>{name}</figcaption><img alt="plot of {name}" src="data:image/png;base64,{data}"></figure>'
    )


def plots(title: str, images: Mapping[str, bytes], fold: bool = False) -> list[str]:
    """Return a section of figures, caption → PNG; empty without figures."""
    if not images:
        return []
    inside = f'<div class="plots">{"".join(figure(name, png) for name, png in images.items())}</div>'
    return folded(title, inside) if fold else [f"<h2>{title}</h2>{inside}"]


def folded(title: str, inside: str) -> list[str]:
    """Return a section that a click opens."""
    return [f"<details><summary>{title}</summary>{inside}</details>"]


def shared_sections(of: Sequence[Variant]) -> list[str]:
    """Return the sections on horizons, representations and the parts of a step, for the runs that have them."""
    horizons = {f"{split}: {metric} by horizon": png for (split, metric), png in by_horizon(of).items()}
    spectrum = {
        f"{name}, spectrum": of_spectrum(lines, [variant.name for variant in of]) for name, lines in spectra(of).items()
    }
    scatter_plots = {
        f"{split}: {name}": of_projection(saved) for split, found in projections(of).items() for name, saved in found
    }
    return [
        *plots("Final values by horizon", horizons),
        *plots("Representations: spectra", spectrum),
        *plots("Representations: principal directions", scatter_plots),
        *plots("Where a step's time goes", _breakdowns(of)),
    ]


def _breakdowns(of: Sequence[Variant]) -> dict[str, bytes]:
    """Return one figure with a bar for each variant, the mean over its runs."""
    bars: dict[str, dict[str, float]] = {}
    for variant in of:
        found = [parts for run in variant.runs if (parts := mean_parts(run.rows))]
        if found:
            names = dict.fromkeys(name for parts in found for name in parts)
            bars[variant.name] = {n: statistics.fmean(parts.get(n, 0.0) for parts in found) for n in names}
    return {"parts of a step, mean": stacked(bars)} if bars else {}
