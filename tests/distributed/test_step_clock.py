"""On every engine the parts of all steps have their true durations, and add up to the time of the run's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.telemetry.metrics import step_part
from tests.distributed.launch import run_ranks
from tests.distributed.test_runs import config_file, rows, train_runs

DATA, OTHER = (1.0, 2.0), (1.5, 0.5)
"""Seconds of each rank; the rank whose data comes first waits for the other."""
CALLS = {"gather": 4.0, "loss": 3.0, "evaluation": 1000.0}
BACKWARD, OPTIMIZER = 5.0, 7.0
PARTS = {"data": 1.5, "other": 1.0, "gather": 8.0, "forward": 6.0, "backward": 10.0, "optimizer": 7.0}
"""Expected seconds of a step of two micro-batches, averaged over the ranks."""


def train_by_hand(ranks: ParallelContext, cases: list[tuple[str, str | None]]) -> None:
    """Train with a manual clock, which advances only in the data, the engine's calls, and the counting of the batch."""
    from jepa_scale.telemetry import run_log
    from jepa_scale.training import metrics as meter
    from jepa_scale.training import run as training
    from jepa_scale.training import trainer
    from jepa_scale.training.timer import StepTimer

    now = 0.0
    real_build, real_totals = training.build, trainer.global_totals

    def takes(seconds: float | Callable[[Any], float], call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now += seconds(args[0]) if callable(seconds) else seconds
            return call(*args, **kwargs)

        return timed

    def build(*args: Any) -> Any:
        run = real_build(*args)
        batches = run.batches

        def timed_batches(*args: Any) -> Iterator[Any]:
            nonlocal now
            for batch in batches(*args):
                now += DATA[ranks.rank]
                yield batch

        run.batches = timed_batches
        engine = run.engine
        engine.forward = takes(lambda task: CALLS.get(task, CALLS["evaluation"]), engine.forward)
        engine.backward = takes(BACKWARD, engine.backward)
        engine.step = takes(OPTIMIZER, engine.step)
        return run

    clock = SimpleNamespace(perf_counter=lambda: now)
    with (
        patch.object(training, "build", build),
        patch.object(trainer, "global_totals", takes(OTHER[ranks.rank], real_totals)),
        patch.object(StepTimer.__init__, "__defaults__", (True, lambda: now)),
        patch.object(meter, "time", clock),
        patch.object(run_log, "time", clock),
    ):
        train_runs(ranks, cases)


def test_parts_add_up_to_the_run_on_every_engine(tmp_path: Path):
    """The runs log two rows of two steps, with an evaluation after each."""
    files = []
    for engine in ("fsdp", "zero1", "zero2", "zero3"):
        path = config_file(tmp_path, "two_view_infonce", engine, accumulation=2, name=engine, steps=4, log_every=2)
        values = yaml.safe_load(path.read_text())
        values["train"]["eval_every"] = 2
        values["log"]["breakdown"] = True
        path.write_text(yaml.safe_dump(values))
        files.append((str(path), None))
    run_ranks(train_by_hand, 2, files)
    for engine in ("fsdp", "zero1", "zero2", "zero3"):
        fit = rows(tmp_path, engine)
        assert [row["step"] for row in fit] == [2, 4]
        for row in fit:
            assert {part: row[step_part(part)] for part in PARTS} == pytest.approx(PARTS)
            assert step_part("teacher") not in row  # it collects, and has no teacher
            assert row["time_per_step"] == pytest.approx(sum(PARTS.values()))
            assert row["time_data_slowest"] == max(DATA)
        passed = fit[1]["seconds"] - fit[0]["seconds"]
        assert 2 * fit[1]["time_per_step"] == pytest.approx(passed), engine
