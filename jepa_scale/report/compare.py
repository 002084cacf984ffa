"""Comparison of runs: grouping by config, differences between configs, and final values."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_scale.evaluation.snapshot_files import read_snapshots
from jepa_scale.telemetry.metrics import in_report_order
from jepa_scale.telemetry.records import RunRecord, load_run
from jepa_scale.utils.format import format_number
from jepa_scale.utils.splits import TRAIN

NO_MATTER = ("run", "log", "checkpoint")
"""Config sections that do not affect training, apart from the seed, which is in ``run``."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs of one config that differ only by their seed; may be a single run."""

    name: str
    runs: list[RunRecord]

    def values(self, split: str, metric: str) -> list[float]:
        """Return the finite final values of a metric over the runs that have it."""
        found = [run.value(split, metric) for run in self.runs]
        return [value for value in found if value is not None and math.isfinite(value)]

    def shown(self, split: str, metric: str) -> str:
        """Format the final values as ``mean ± standard deviation (least to greatest)``, or as a single value."""
        values = self.values(split, metric)
        if len(set(values)) < 2:
            return format_number(values[0] if values else None)
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        low, high = format_number(min(values)), format_number(max(values))
        return f"{format_number(mean)} ± {format_number(spread)} ({low} to {high})"


def load_runs(directories: Sequence[Path | str]) -> list[RunRecord]:
    """Load the run of each directory.

    Raises:
        InputError: one of the directories holds no run.
    """
    return [load_run(directory) for directory in directories]


def variants(runs: Sequence[RunRecord]) -> list[Variant]:
    """Group runs by config, in the order of the first run of each group. Names are unique."""
    by_config: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_config.setdefault(
            repr(sorted(_flat(_relevant(run.config)))) if run.config else str(run.directory), []
        ).append(run)
    names = [_common_name([run.name for run in group]) for group in by_config.values()]
    result = []
    for name, group in zip(names, by_config.values(), strict=True):
        unique = name if names.count(name) == 1 else str(group[0].directory)
        result.append(Variant(f"{unique} ({len(group)} seeds)" if len(group) > 1 else unique, group))
    return result


def differences(of: Sequence[Variant]) -> dict[str, list[str]]:
    """Map each config key that differs between variants to its value in each of them; ``-`` where it is not set."""
    flat = [dict(_flat(_relevant(variant.runs[0].config))) for variant in of]
    keys = dict.fromkeys(key for values in flat for key in values)
    table = {key: [repr(values[key]) if key in values else "-" for values in flat] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def final_metrics(of: Sequence[Variant]) -> list[tuple[str, str]]:
    """Return (split, metric) of each final value that any run has: evaluations first, then training."""
    found: dict[str, set[str]] = {}
    for variant in of:
        for run in variant.runs:
            for split, values in run.summary.get("final", {}).items():
                found.setdefault(split, set()).update(values)
    splits = sorted(found, key=lambda split: split == TRAIN)
    return [(split, metric) for split in splits for metric in in_report_order(found[split])]


def spectra(of: Sequence[Variant]) -> dict[str, list[tuple[str, list[float]]]]:
    """Map ``split: kind of representation`` to (name of the variant, spectrum) of each run that saved one."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for variant in of:
        for run in variant.runs:
            for split, saved in read_snapshots(run.directory).items():
                for kind, values in saved["spectra"].items():
                    found.setdefault(f"{split}: {kind}", []).append((variant.name, values))
    return found


def projections(of: Sequence[Variant]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Map each split to (name of the variant, :func:`jepa_scale.evaluation.snapshot.snapshot` of its first run)."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for variant in of:
        for split, saved in read_snapshots(variant.runs[0].directory).items():
            if saved["projections"]:
                found.setdefault(split, []).append((variant.name, saved))
    return found


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    return {section: values for section, values in config.items() if section not in NO_MATTER}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if not isinstance(value, Mapping) else {}


def _common_name(names: Sequence[str]) -> str:
    """Return the common beginning of run names without the label of the seed: lm_seed0, lm_seed1 → lm."""
    if len(names) == 1:
        return names[0]
    stem = os.path.commonprefix(list(names)).rstrip("0123456789")
    for ending in ("seed", "s"):
        for mark in ("_", "-", "."):
            stem = stem.removesuffix(f"{mark}{ending}")
    return stem.rstrip("_-. ") or names[0]
