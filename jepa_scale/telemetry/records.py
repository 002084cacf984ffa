"""Files of a run directory: reading, truncating and summarising the rows of metrics.

``metrics.jsonl`` has one JSON object a line: ``step``, ``split``, ``tokens`` and ``flops`` (trained so far, all ranks) and
the metrics. Rows that training logs have the split ``"train"``; rows of an evaluation have ``"eval/"`` and its split. JSON has
no NaN and no infinity; such values are written as ``null``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from jepa_scale.telemetry.metrics import describe
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.splits import TRAIN, current_splits

METRICS_FILE, SUMMARY_FILE, CONFIG_FILE = "metrics.jsonl", "summary.json", "config.yaml"
_NOT_VALUES = ("step", "split", "tokens", "flops")

logger = logging.getLogger(__name__)

HUGE = 1e300
"""Greatest number in rows, below the greatest float: sums and squares of an integer that is no float would fail."""
BUDGET_ERROR = 0.02
"""Relative deviation from a run's FLOPs budget up to which it is not reported."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as read from its directory.

    Attributes:
        rows: rows of ``metrics.jsonl`` in the order written.
        summary: ``summary.json``; if it is missing, a summary of the rows.
        config: the resolved config as a mapping (empty when missing or damaged). config_text: the same as YAML text.
    """

    directory: Path
    name: str
    rows: list[Row]
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str

    def value(self, split: str, metric: str, which: str = "final") -> float | None:
        """Return a value of the summary, ``None`` when the run doesn't have it; ``which`` is ``"final"`` or ``"best"``."""
        value = self.summary.get(which, {}).get(split, {}).get(metric)
        return value.get("value") if isinstance(value, dict) else value


def config_of(run_dir: Path) -> Path:
    """Return the path of the resolved config that a run has saved.

    Raises:
        InputError: there is none.
    """
    if not os.path.isfile(run_dir / CONFIG_FILE):
        raise InputError(f"{run_dir}: not a run directory (no config.yaml)")
    return run_dir / CONFIG_FILE


def clean(value: Any) -> float | int | None:
    """Convert a metric to a number that JSON can hold; NaN and infinities become ``None``.

    Tensors are refused, because reading one waits for the device. The training loop decides when to do that.
    """
    if value is None:
        return None
    assert isinstance(value, Real), f"a metric must be a Python number, not {type(value).__name__}"
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def read_rows(run_dir: Path) -> list[Row]:
    """Read the rows of ``metrics.jsonl``, with the present names of their splits.

    A line that a killed run left half-written is skipped, and so is what is no row. All values but the split are numbers or None:
    others, which a run never writes, are left out with a warning.

    Raises:
        InputError: the file cannot be read.
    """
    rows: list[Row] = []
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return rows
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("split"), str) or not _is_step(row.get("step")):
            continue
        split = row.pop("split")
        values = numbers(row)
        if foreign := row.keys() - values.keys():
            _warn_once(f"{path}, line {number}: {', '.join(sorted(foreign))}: no number, and left out")
        rows.append({"step": values.pop("step"), "split": split, **values})
    names = current_splits({row["split"] for row in rows})
    return [row | {"split": names[row["split"]]} for row in rows]


def numbers(values: Any) -> dict[str, Any]:
    """Return the values of a mapping that are numbers or None, as JSON of unknown origin may hold anything. NaN and infinities
    become None."""
    found = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = None if value is None or not abs(value) < HUGE else value
    return found


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < HUGE


@cache
def _warn_once(message: str) -> None:
    """Log a warning; rows are read again and again while a run is watched."""
    logger.warning(message)


def truncate_rows(run_dir: Path, step: int) -> list[Row]:
    """Remove damaged lines and the rows after ``step``, which a resumed run writes again; return the rows kept.

    At step 0 all rows are removed, because nothing was trained before it.
    """
    kept = [row for row in read_rows(run_dir) if 0 < step >= row["step"]]
    write_atomic(run_dir / METRICS_FILE, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
    return kept


def values_of(row: Row) -> dict[str, float | None]:
    """Return the metrics of a row, without ``step``, ``split``, ``tokens`` and ``flops``."""
    return {k: v for k, v in row.items() if k not in _NOT_VALUES}


def summarize(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return the final and best values of the metrics.

    ``final`` maps split → metric → last value. ``best`` maps split → metric → ``{"value", "step"}``, for the metrics that
    have a direction (:func:`jepa_scale.telemetry.metrics.describe`) and were finite at least once.
    """
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
    parameters: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the contents of ``summary.json``.

    The relative deviation from the budget is included (``flops_error``) if it is larger than ``BUDGET_ERROR``.

    Args:
        seconds: training time, without evaluations and saves.
        flops: FLOPs of training; 0 = not counted.
        budget: FLOPs that the config requests; 0 = none.
        parameters: all parameters of model and objective, and those that are trained; None = not known.
    """
    counts = dict(zip(("parameters", "trainable_parameters"), parameters or (), strict=False))
    spent: dict[str, Any] = {"flops": flops} if flops else {}
    if budget:
        spent["flops_budget"] = budget
        if abs(error := flops / budget - 1) > BUDGET_ERROR:
            spent["flops_error"] = error
    return {
        "name": name,
        "steps": steps,
        "tokens": tokens,
        **counts,
        **spent,
        "tokens_per_second": tokens / seconds if seconds > 0 else None,
        **summarize(rows),
        "environment": dict(environment),
    }


def load_run(run_dir: Path | str) -> RunRecord:
    """Read a run directory. For a killed run without a summary, the summary is made from the rows.

    Raises:
        InputError: not a directory, or neither rows nor a summary in it.
    """
    directory = Path(run_dir)
    if not os.path.isdir(directory):
        raise InputError(f"{directory}: no such run directory")
    rows = read_rows(directory)
    summary = read_summary(directory)
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


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read ``summary.json``, with the present names of splits; empty if it is missing or damaged.

    What a run never writes there is left out.
    """
    read = _mapping(run_dir / SUMMARY_FILE, json.loads)
    if not read:
        return {}
    summary = numbers(read)
    if isinstance(name := read.get("name"), str):
        summary["name"] = name
    if isinstance(environment := read.get("environment"), dict):
        summary["environment"] = environment
    for which, form in (("final", numbers), ("best", _best)):
        by_split = read.get(which)
        if isinstance(by_split, dict):
            names = current_splits(by_split)
            summary[which] = {names[split]: form(values) for split, values in by_split.items()}
    return summary


def _best(values: Any) -> dict[str, Any]:
    """Return the best values of a split, each a value and its step."""
    found = {name: numbers(value) for name, value in values.items()} if isinstance(values, dict) else {}
    return {name: value for name, value in found.items() if {"value", "step"} <= value.keys()}


def last_counts(rows: list[Row]) -> tuple[int, int, float]:
    """Return the latest numbers of steps, tokens and training seconds in the rows."""
    steps = max((row["step"] for row in rows), default=0)
    tokens = max((row.get("tokens") or 0 for row in rows), default=0)
    seconds = max((row.get("seconds") or 0.0 for row in rows if row["split"] == TRAIN), default=0.0)
    return steps, tokens, seconds


def last_flops(rows: list[Row]) -> int:
    """Return the latest number of training FLOPs in the rows; 0 if they have none."""
    return max((row.get("flops") or 0 for row in rows), default=0)


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
