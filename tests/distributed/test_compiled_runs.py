"""Whole runs of every objective with ``engine.compile`` have the same curve. After three steps and the first evaluation nothing
is compiled, although all batches have different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data.corpus import write_text
from tests.distributed.compiled import train_compiled
from tests.distributed.launch import run_ranks
from tests.distributed.test_grid_runs import OBJECTIVES as GRID
from tests.distributed.test_grid_runs import config_file as grid_file
from tests.distributed.test_grid_runs import write_grids
from tests.distributed.test_horizon_runs import OBJECTIVES as HORIZON
from tests.distributed.test_horizon_runs import config_file as horizon_file
from tests.distributed.test_runs import config_file as facts_file
from tests.distributed.test_runs import rows, train_runs
from tests.distributed.test_span_runs import OBJECTIVES as SPAN
from tests.distributed.test_span_runs import config_file as span_file

STEPS, EVALUATED = 10, 5
CASES = ["concept"]
"""This case reads the last tokens of a varying number of segments. tests/models/test_compiling.py tests a single block."""
OTHERS = ["two_view", "vicreg", "ema", "decoder"]
"""Forms of ``two_view``, ``horizon`` with its teacher, ``span`` and ``grid``; ``lm`` compiles only what all of them compile."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_text(folder / "text", [30, 1, 40, 8], valid=18)
    write_grids(folder / "grids")
    return folder


def case_file(folder: Path, data: Path, case: str, compiled: bool) -> str:
    """Write the config of a case. Its micro-batches have more than one token, because one token would need another graph."""
    name = f"{case}-{'compiled' if compiled else 'plain'}"
    if case in HORIZON:
        file = horizon_file(folder, name, data / "text", case, "fsdp")
    elif case in SPAN:
        file = span_file(folder, name, data / "text", case, "fsdp")
    elif case in GRID:
        file = grid_file(folder, name, data / "grids", case, "fsdp")
    else:
        backbone, objective = ("gpt2", "concept") if case == "gpt2" else ("native", case)
        file = str(facts_file(folder, objective, "fsdp", name=name, backbone=backbone))
    values: dict[str, Any] = yaml.safe_load(Path(file).read_text())
    values["train"] |= {"steps": STEPS, "epochs": 0, "eval_every": EVALUATED}
    if case in HORIZON:
        values["train"] |= {"micro_tokens": 120, "batch_tokens": 240}
    values["engine"]["compile"] = compiled
    Path(file).write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("cases", [CASES, pytest.param(OTHERS, marks=pytest.mark.matrix)], ids=["one", "others"])
def test_nothing_is_compiled_after_three_steps(data, tmp_path, cases):
    plain, compiled = ([case_file(tmp_path, data, case, how) for case in cases] for how in (False, True))
    run_ranks(train_runs, 1, [(file, None) for file in plain])
    (graphs,) = run_ranks(train_compiled, 1, compiled)
    for case in cases:
        counts = graphs[f"{case}-compiled"]
        assert len(counts) == STEPS and counts[3] > 0, f"{case}: nothing was compiled"
        first, second = counts[3:EVALUATED], counts[EVALUATED:]  # the evaluation between them has graphs of its own
        assert len(set(first)) == len(set(second)) == 1, f"{case}: graphs before each step: {counts}"
        for a, b in zip(rows(tmp_path, f"{case}-plain"), rows(tmp_path, f"{case}-compiled"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-4), f"{case}, step {a['step']}"
