"""On every engine the parts of all steps add up to the training time that the run's own clock has counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jepa_scale.telemetry.metrics import STEP_PARTS, step_part
from tests.distributed.launch import run_ranks
from tests.distributed.test_runs import config_file, rows, train_runs


def test_parts_add_up_to_the_run_on_every_engine(tmp_path: Path):
    files = []
    for engine in ("fsdp", "zero1", "zero2", "zero3"):
        path = config_file(tmp_path, "two_view_infonce", engine, accumulation=2, name=engine, steps=6, log_every=2)
        values = yaml.safe_load(path.read_text())
        values["train"]["eval_every"] = 2
        values["log"]["breakdown"] = True
        path.write_text(yaml.safe_dump(values))
        files.append((str(path), None))
    run_ranks(train_runs, 2, files)
    for engine in ("fsdp", "zero1", "zero2", "zero3"):
        fit = rows(tmp_path, engine)
        for row in fit:
            parts = {part: row[step_part(part)] for part in STEP_PARTS if step_part(part) in row}
            assert parts.keys() == set(STEP_PARTS) - {"teacher"}  # it collects, and has no teacher
            assert row["time_per_step"] == pytest.approx(sum(parts.values()))
            assert row["time_data"] <= row["time_data_slowest"] <= 2 * row["time_data"]
        # From row to row both clocks leave evaluations out. The row's own writing is in the next row of one, in this row of the other.
        passed = fit[-1]["seconds"] - fit[0]["seconds"]
        assert 2 * sum(row["time_per_step"] for row in fit[1:]) == pytest.approx(passed, rel=0.1, abs=0.02), engine
