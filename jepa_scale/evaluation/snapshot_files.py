"""Where a run keeps what it saw of its representations, and how that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def snapshot_file(run_dir: Path, split: str) -> Path:
    return run_dir / "representations" / f"{split}.json"


def read_snapshots(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Split → what :func:`jepa_scale.evaluation.snapshot.save_snapshot` wrote; a damaged file is as none."""
    found = {}
    for path in sorted((run_dir / "representations").glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(values, dict) and {"step", "spectra", "projections", "explained"} <= values.keys():
            found[path.stem] = values
    return found
