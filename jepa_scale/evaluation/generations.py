"""Files with the answers that an evaluation has generated, a line for each row of a split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = "generations"
_FILE = re.compile(r"step_(\d+)_(.+)\.jsonl")


def generations_file(run_dir: Path, step: int, split: str) -> Path:
    """Return the path of a split's generations: JSON Lines, one line per row of the split.

    A line has ``row``, ``prompt`` (the user's last message), ``wanted``, ``generated`` and ``tokens``, its length (both
    null if nothing was generated), ``stopped`` (by a token that closes an answer, not by the limit), ``values`` by
    metric, ``notes`` of the metrics, and ``unscored`` (why the row is not scored, '' if it is).
    """
    return run_dir / FOLDER / f"step_{step:08d}_{split}.jsonl"


def newest_generations(run_dir: Path, last: int) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """Return the generations of each split's newest evaluation: split → (its step, records).

    Evaluations after step ``last`` are left out: a resumed run has not reached them again. So is what is no record, as a file may
    be damaged.
    """
    found: dict[str, tuple[int, Path]] = {}
    for path in (run_dir / FOLDER).glob("*.jsonl"):
        match = _FILE.fullmatch(path.name)
        if match and int(match[1]) <= last and int(match[1]) >= found.get(match[2], (0,))[0]:
            found[match[2]] = int(match[1]), path
    return {split: (step, _records(path)) for split, (step, path) in sorted(found.items())}


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and {"row", "prompt", "wanted", "generated"} <= record.keys():
            records.append(record)
    return records
