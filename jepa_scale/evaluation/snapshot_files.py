"""Files with the snapshots of a run's representations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def snapshot_file(run_dir: Path, split: str) -> Path:
    """Return the path of a split's snapshot."""
    return run_dir / "representations" / f"{split}.json"


def read_snapshots(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the values that :func:`jepa_scale.evaluation.snapshot.save_snapshot` wrote, by split. Damaged files are skipped."""
    found = {}
    for path in sorted((run_dir / "representations").glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(values, dict) and {"step", "spectra", "projections", "explained"} <= values.keys():
            found[path.stem] = values
    return found
