"""Comparison of runs that must be equal: on other engines, ranks and micro-batches, and resumed from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import checkpoint, newest, tensors
from tests.distributed.small_runs import rows as rows_without_timing
from tests.distributed.test_runs import rows, train_runs

Tolerance = Callable[[str], tuple[float | None, float]]
ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")
MACHINE = {"data_wait", "packing_efficiency", "seconds", "tokens_per_second", "flops", "split"}
"""Metrics that may differ. FLOPs do because, with several micro-batches, the gather pass has some."""


def assert_same_run(
    got: Path,
    case: str,
    expected: Path,
    name: str,
    steps: int | None,
    fit: Tolerance,
    valid: Tolerance,
    same_tokens: bool = True,
) -> dict[str, float]:
    """Assert that run ``case`` in ``got`` has the training rows and the last evaluation of run ``name`` in ``expected``.

    Args:
        steps: number of logged steps; None = five or more.
        fit, valid: name of a metric → relative and absolute tolerance; the wider one applies.
        same_tokens: whether the tokens of a step do not depend on its micro-batches.

    Returns:
        The metrics of the last evaluation.
    """
    theirs, ours = rows(expected, name), rows(got, case)
    elsewhere = MACHINE if same_tokens else {*MACHINE, "tokens"}
    assert len(theirs) == len(ours) and (len(ours) == steps if steps else len(ours) >= 5)
    for a, b in zip(theirs, ours, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - elsewhere:
            assert b[key] == pytest.approx(a[key], *fit(key)), f"{case}, step {a['step']}: {key}"
    splits = [{row["split"]: row for row in rows(folder, run, None)} for folder, run in ((expected, name), (got, case))]
    assert splits[0].keys() == splits[1].keys() > {"train"}
    for split in splits[0].keys() - {"train"}:
        a, b = (of[split] for of in splits)
        assert a.keys() == b.keys()
        for key in a.keys() - elsewhere:
            assert b[key] == pytest.approx(a[key], *valid(key)), f"{case}: {split} {key}"
    return b


def resumed_bitwise(
    files: dict[str, str], folder: Path, step: int, ranks: int = 2
) -> dict[str, dict[str, torch.Tensor]]:
    """Train runs, resume each from ``step`` in new processes, and assert bitwise equality of rows and last checkpoints.

    Args:
        files: name of a run in ``folder`` → its config, which saves at ``step``.

    Returns:
        Name → tensors of its newest checkpoint.
    """
    run_ranks(train_runs, ranks, [(file, None) for file in files.values()])
    again = []
    for case, file in files.items():
        values = yaml.safe_load(Path(file).read_text())
        values["run"]["name"] = f"{case}-again"
        copy = folder / f"{case}-again"
        copy.with_suffix(".yaml").write_text(yaml.safe_dump(values))
        shutil.copytree(folder / case, copy)
        again.append((str(copy.with_suffix(".yaml")), str(copy / f"checkpoints/step_{step:08d}")))
    run_ranks(train_runs, ranks, again)
    found = {}
    for case in files:
        whole, resumed = folder / case, folder / f"{case}-again"
        assert rows_without_timing(whole) == rows_without_timing(resumed), case
        found[case], theirs = (tensors(checkpoint(run, newest(whole))) for run in (whole, resumed))
        assert found[case].keys() == theirs.keys()
        for name, tensor in found[case].items():
            assert (tensor == theirs[name]).all(), f"{case}: {name}"
    return found
