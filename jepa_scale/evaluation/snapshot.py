"""A small snapshot of the representations at an evaluation, for the report: their spectrum and a projection onto two
dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_scale.evaluation.snapshot_files import snapshot_file
from jepa_scale.utils.io import write_atomic

ROWS = 1000
"""Most rows of each kind that are used, evenly spread: enough for a smooth spectrum, computed in a fraction of a second."""
POINTS = 400
"""Most rows of each kind that are projected."""
VALUES = 256
"""Most singular values that are kept; the largest ones."""


@torch.no_grad()
def snapshot(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compute the values of the report's figures of representations.

    Args:
        rows: name of a kind → (n, d), e.g. of predictions and of targets. Rows with the same index belong together.

    Returns:
        Plain Python numbers. ``spectra``: name → singular values of the centred rows over their sum, largest first, at most
        ``VALUES``. ``projections``: name → (m, 2) coordinates of at most ``POINTS`` rows along the first two principal
        directions of all kinds together; kinds of another width than the first are left out. ``explained``: the two
        directions' shares of the variance. Kinds with a value that is not finite are left out of all.
    """
    kept = {name: _some(x, ROWS).double() for name, x in rows.items() if len(x) > 1 and bool(x.isfinite().all())}
    spectra = {name: _spectrum(x)[:VALUES].tolist() for name, x in kept.items()}
    width = next((x.shape[1] for x in kept.values()), 0)
    alike = {name: x for name, x in kept.items() if x.shape[1] == width > 1}
    projections, explained = {}, [0.0, 0.0]
    if alike:
        every = torch.cat(list(alike.values()))
        mean = every.mean(dim=0)
        _, singular, directions = torch.linalg.svd(every - mean, full_matrices=False)
        variance = singular.square()
        explained = (variance[:2] / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist()
        axes = directions[:2].T  # (d, 2)
        axes = axes * torch.where(axes.sum(dim=0) < 0, -1.0, 1.0)  # a fixed sign, as directions have none
        projections = {name: ((_some(x, POINTS) - mean) @ axes).tolist() for name, x in alike.items()}
    return {"spectra": spectra, "projections": projections, "explained": explained}


def save_snapshot(rows: Mapping[str, Tensor], run_dir: Path, step: int, split: str) -> None:
    """Write ``representations/<split>.json`` of a run; it replaces the file of an earlier evaluation."""
    path = snapshot_file(run_dir, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {name: len(x) for name, x in rows.items()}
    write_atomic(path, json.dumps({"step": step, "rows": counts, **snapshot(rows)}, allow_nan=False) + "\n")


def _some(rows: Tensor, count: int) -> Tensor:
    """Return at most ``count`` rows, evenly spread: the same indices for kinds with the same number of rows."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


def _spectrum(x: Tensor) -> Tensor:
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    return values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
