"""What every benchmark writes: rows of a name, the median of its values and their range, and the machine beside them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from jepa_scale.utils.format import text_table


def row(name: str, values: list[float], unit: str, value: float | None = None) -> dict[str, Any]:
    """A row of ``values``; what stands for them is their median unless ``value`` says something else."""
    middle = statistics.median(values) if value is None else value
    return {"name": name, "value": middle, "unit": unit, "min": min(values), "max": max(values), "n": len(values)}


def as_table(rows: list[dict[str, Any]]) -> str:
    """For people to read."""
    cells = [[r["name"], *(f"{r[key]:,.4g}" for key in ("value", "min", "max")), r["unit"]] for r in rows]
    return text_table(["", "median", "min", "max", ""], cells)


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file of ``--json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
