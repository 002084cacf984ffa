"""Results of the bench: the measured values of every arm, and its paired differences to its baseline and to its control."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jepa_scale.bench.compare import Difference, paired
from jepa_scale.bench.runs import CONTROL, Run, function_of
from jepa_scale.bench.task import BASELINE, DERIVED, Measure, Task, function_name
from jepa_scale.telemetry import load_run
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

log = logging.getLogger(__name__)

ALL_CASES = "all cases"
"""Name of the case of what is derived from all of them."""
Values = dict[str, dict[int, Mapping[str, float]]]
"""Arm → seed → name → value."""


@dataclass(frozen=True, slots=True)
class Result:
    """One measure of one arm in one case.

    Attributes:
        arm: its name, with ``/control`` for a control.
        seeds, values: of each seed, in the same order.
        flops: FLOPs of a run, the mean over seeds, divided by those of the baseline.
        to_baseline: difference to ``lm``; None for ``lm`` itself.
        to_control: difference to the arm's control; None where there is none.
    """

    task: str
    case: str
    measure: str
    better: Literal["higher", "lower"]
    arm: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    flops: float
    to_baseline: Difference | None = None
    to_control: Difference | None = None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def verdict(self) -> str:
        """``better`` than the baseline and the control, as far as there are, ``worse`` than one of them, or ``same``."""
        found = {each.verdict(self.better) for each in (self.to_baseline, self.to_control) if each}
        return "" if not found else found.pop() if len(found) == 1 else "worse" if "worse" in found else "same"

    def as_row(self) -> dict[str, Any]:
        """Return the row of the JSON file."""
        row: dict[str, Any] = {
            "name": f"{self.task}/{self.case}/{self.arm}/{self.measure}",
            "value": self.mean,
            "unit": "",
            "min": min(self.values),
            "max": max(self.values),
            "n": len(self.values),
            "better": self.better,
            "seeds": list(self.seeds),
            "values": list(self.values),
            "flops_to_baseline": self.flops,
        }
        for name, each in (("to_baseline", self.to_baseline), ("to_control", self.to_control)):
            if each:
                interval = {"difference": each.mean, "low": each.low, "high": each.high}
                row[name] = {**interval, "verdict": each.verdict(self.better)}
        return row


def measure_run(run: Run, task: Task) -> dict[str, float]:
    """Return what was measured of a finished run, ``<split or function>/<metric>`` → value, and its ``flops``.

    Functions are called once; their results are kept beside the run.
    """
    summary = load_run(run.directory).summary
    found: dict[str, float] = {"flops": float(summary["flops"])}
    for split, metrics in summary["final"].items():
        if split.startswith("eval/"):
            found |= {f"{split}/{name}": float(value) for name, value in metrics.items()}
    for name in task.measured_by:
        of = function_name(name)
        file = run.directory.with_name(f"{run.directory.name}.{of}.json")
        if not file.is_file():
            write_atomic(file, json.dumps(_measured(run, name)))
        values = json.loads(file.read_text(encoding="utf-8"))
        found |= {f"{of}/{metric}": value for metric, value in values.items()}
    return found


def _measured(run: Run, name: str) -> dict[str, float]:
    import torch  # slow to import

    from jepa_scale.inference import load

    measure = partial(function_of(name, "measures", "measure"), load(run.directory), run.data, run.data_seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.config.get("engine", {}).get("threads") or threads)  # threads that wait for a core spin
    try:
        found: dict[str, float] = measure(**run.options)
    finally:
        torch.set_num_threads(threads)
    return found


def results_of(name: str, task: Task, runs: Sequence[Run], measured: Mapping[str, Mapping[str, float]]) -> list[Result]:
    """Return the results of a task, case by case, measure by measure, arm by arm; last what is derived from all cases.

    A measure that only some arms have, such as one of their heads, is compared among those. An arm of which only some seeds have
    it is left out, with a warning. So is a derived figure that no arm has.

    Args:
        measured: name of a run → what :func:`measure_run` returned.

    Raises:
        InputError: no run has a measure that is not derived.
    """
    by_case: dict[str, Values] = {}
    for run in runs:
        by_case.setdefault(run.case, {}).setdefault(run.arm, {})[run.seed] = measured[run.name]
    if task.derived_by:
        by_case[ALL_CASES] = _derived(task, runs, measured)
    results = []
    for case, arms in by_case.items():
        for label, measure in task.measures.items():
            missing = {
                arm: [seed for seed, values in seeds.items() if measure.of not in values] for arm, seeds in arms.items()
            }
            having = {arm for arm, seeds in missing.items() if not seeds}
            for arm, seeds in missing.items():
                if 0 < len(seeds) < len(arms[arm]):
                    log.warning(f"{name}/{case}/{arm}: is left out of {label}, which the seeds {seeds} do not have")
            for arm in (arm for arm in arms if arm in having):
                shared = task.arms[arm].control if arm in task.arms else None
                control = (shared if isinstance(shared, str) else arm) + CONTROL
                others = tuple(other if other in having and other != arm else None for other in (BASELINE, control))
                results.append(_result((name, case, label), measure, arm, others, arms))
    having = {result.measure for result in results}
    for label in (label for label in task.measures if label not in having):
        if task.measures[label].of.startswith(f"{DERIVED}/"):
            # it may need other cases, or values that no run has reached
            log.warning(f"{name}: {label} is left out; it could not be derived from the runs of any arm and seed")
            continue
        known = sorted({key for of_run in measured.values() for key in of_run})
        raise InputError(
            f"{name}: measures.{label}.of: no run has {task.measures[label].of!r}; there are {', '.join(known)}"
        )
    return results


def _derived(task: Task, runs: Sequence[Run], measured: Mapping[str, Mapping[str, float]]) -> Values:
    """Return what ``derived_by`` makes of all cases of each arm and seed, with the FLOPs of all of them."""
    assert task.derived_by
    derive = function_of(task.derived_by, "measures", "derive")
    cases: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        cases.setdefault(run.arm, {}).setdefault(run.seed, []).append(run)
    found: Values = {}
    for arm, seeds in cases.items():
        for seed, of_seed in seeds.items():
            values = derive([(run.options, measured[run.name]) for run in of_seed])
            flops = sum(measured[run.name]["flops"] for run in of_seed)
            named = {f"{DERIVED}/{metric}": value for metric, value in values.items()}
            found.setdefault(arm, {})[seed] = {**named, "flops": flops}
    return found


def _result(
    names: tuple[str, str, str], measure: Measure, arm: str, others: tuple[str | None, ...], arms: Values
) -> Result:
    seeds = tuple(arms[arm])

    def of(other: str, key: str) -> tuple[float, ...]:
        return tuple(arms[other][seed][key] for seed in seeds)

    values = of(arm, measure.of)
    to_baseline, to_control = (paired(values, of(other, measure.of)) if other else None for other in others)
    flops = sum(of(arm, "flops")) / sum(of(BASELINE, "flops"))
    return Result(*names, measure.better, arm, seeds, values, flops, to_baseline, to_control)


def write_json(path: Path, results: Sequence[Result], machine: Mapping[str, Any]) -> None:
    """Write all results as rows, with the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [result.as_row() for result in results]
    write_atomic(path, json.dumps({"machine": dict(machine), "rows": rows}, indent=1) + "\n")
