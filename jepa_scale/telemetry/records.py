"""The run directory on disk: how its rows are written, cut at a resume, read back and summed up.

``metrics.jsonl`` has one JSON object a line: ``step``, ``split``, ``tokens`` and ``flops`` (trained so far, all ranks) and
the values. Rows of the running training have the split ``"fit"``; evaluation rows have the name of what was
evaluated. JSON has no NaN and no infinity: such a value is written as ``null``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from jepa_scale.telemetry.metrics import FIT, describe
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

METRICS_FILE, SUMMARY_FILE, CONFIG_FILE = "metrics.jsonl", "summary.json", "config.yaml"
_NOT_VALUES = ("step", "split", "tokens", "flops")

BUDGET_ERROR = 0.02
"""How far a run may be from its budget of FLOPs, relatively, without a word."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its directory tells it.

    Attributes:
        rows: rows of ``metrics.jsonl`` in the order written. summary: ``summary.json``, or what the rows give
            without it.
        config: the resolved config as a mapping (empty when missing or damaged); config_text: the same as
            YAML text.
    """

    directory: Path
    name: str
    rows: list[Row]
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str

    def value(self, split: str, metric: str, which: str = "final") -> float | None:
        """A summary value (``which`` is ``"final"`` or ``"best"``), ``None`` when the run doesn't have it."""
        value = self.summary.get(which, {}).get(split, {}).get(metric)
        return value.get("value") if isinstance(value, dict) else value


def config_of(run_dir: Path) -> Path:
    """The resolved config that a run has saved.

    Raises:
        InputError: there is none.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(f"{run_dir}: not a run directory (no config.yaml)")
    return run_dir / CONFIG_FILE


def clean(value: Any) -> float | int | None:
    """A metric as valid JSON: NaN and infinities become ``None``. A tensor is refused: reading it would wait
    for the device, which is the loop's to decide."""
    if value is None:
        return None
    assert isinstance(value, Real), f"a metric must be a Python number, not {type(value).__name__}"
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def read_rows(run_dir: Path) -> list[Row]:
    """The whole rows of ``metrics.jsonl``; a line that a killed run left half-written is skipped."""
    rows: list[Row] = []
    try:
        lines = (run_dir / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("split"), str):
            rows.append(row)
    return rows


def truncate_rows(run_dir: Path, step: int) -> list[Row]:
    """Drop the rows after ``step``, which a resumed run will write again, and damaged lines; returns what is
    kept.

    Nothing is kept at step 0: no training lies before it.
    """
    kept = [row for row in read_rows(run_dir) if 0 < step >= row["step"]]
    write_atomic(run_dir / METRICS_FILE, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return kept


def values_of(row: Row) -> dict[str, float | None]:
    """The metrics of a row, without the columns that say where it stands."""
    return {k: v for k, v in row.items() if k not in _NOT_VALUES and (v is None or isinstance(v, int | float))}


def summarize(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """``final``: split → metric → last value. ``best``: split → metric → ``{"value", "step"}``, of the
    metrics that have a good direction (:func:`jepa_scale.telemetry.metrics.describe`) and were finite at
    least once."""
    final: dict[str, dict[str, float | None]] = {}
    best: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for name, value in values_of(row).items():
            final.setdefault(row["split"], {})[name] = value
            better = describe(name).better
            if value is None or better is None:
                continue
            of_split = best.setdefault(row["split"], {})
            old = of_split.get(name)
            if old is None or (value < old["value"] if better == "lower" else value > old["value"]):
                of_split[name] = {"value": value, "step": row["step"]}
    return {"final": final, "best": best}


def make_summary(
    name: str,
    rows: list[Row],
    steps: int,
    tokens: int,
    seconds: float,
    environment: Mapping[str, Any],
    flops: int = 0,
    budget: float = 0.0,
) -> dict[str, Any]:
    """The contents of ``summary.json``. ``seconds`` is training time, without evaluations and saves; ``budget``: the FLOPs that
    were asked for. By how much the run misses it is told where that is more than ``BUDGET_ERROR``."""
    spent: dict[str, Any] = {"flops": flops} if flops else {}
    if budget:
        spent["flops_budget"] = budget
        if abs(error := flops / budget - 1) > BUDGET_ERROR:
            spent["flops_error"] = error
    return {
        "name": name,
        "steps": steps,
        "tokens": tokens,
        **spent,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
        **summarize(rows),
        "environment": dict(environment),
    }


def load_run(run_dir: Path | str) -> RunRecord:
    """Read a run directory, also one of a run that was killed: without a summary the rows make one.

    Raises:
        InputError: not a directory, or neither rows nor a summary in it.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory")
    rows = read_rows(directory)
    summary = _mapping(directory / SUMMARY_FILE, json.loads)
    if not rows and not summary:
        raise InputError(f"{directory}: not a run directory, it has no {METRICS_FILE} and no {SUMMARY_FILE}")
    config_file = directory / CONFIG_FILE
    config = _mapping(config_file, yaml.safe_load)
    run = config.get("run")
    name = summary.get("name") or (run.get("name") if isinstance(run, dict) else None) or directory.resolve().name
    if not summary:
        steps, tokens, seconds = last_counts(rows)
        summary = make_summary(str(name), rows, steps, tokens, seconds, {}, last_flops(rows))
    text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    return RunRecord(directory, str(name), rows, summary, config, text)


def last_counts(rows: list[Row]) -> tuple[int, int, float]:
    """Steps, tokens and training seconds as far as the rows tell."""
    steps = max((row["step"] for row in rows), default=0)
    tokens = max((row.get("tokens") or 0 for row in rows), default=0)
    seconds = max((row.get("seconds") or 0.0 for row in rows if row["split"] == FIT), default=0.0)
    return steps, tokens, seconds


def last_flops(rows: list[Row]) -> int:
    """FLOPs of training as far as the rows tell; 0 if they don't."""
    return max((row.get("flops") or 0 for row in rows), default=0)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
