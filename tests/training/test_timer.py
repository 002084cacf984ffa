"""The parts of a step add up to the step: by a clock that the test moves, and in whole runs by the run's own clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale import train
from jepa_scale.report.step_time import breakdown_table
from jepa_scale.telemetry.metrics import STEP_PARTS, describe, in_report_order, step_part
from jepa_scale.training.timer import StepTimer
from tests.text_runs import config_file

CPU = torch.device("cpu")


class Hand:
    """A clock that stands where it was put."""

    at = 0.0

    def __call__(self) -> float:
        return self.at


@given(st.lists(st.tuples(st.sampled_from([*STEP_PARTS, None]), st.integers(0, 1000)), min_size=1, max_size=30))
def test_parts_add_up_and_what_is_no_training_is_in_none(entered):
    hand = Hand()
    clock = StepTimer(CPU, now=hand)
    expected = dict.fromkeys(STEP_PARTS, 0)
    for part, passed in entered:
        clock.enter(part)
        hand.at += passed
        if part is not None:
            expected[part] += passed
    values = clock.read(4)
    assert values.pop("time_per_step") == pytest.approx(sum(expected.values()) / 4)
    assert values == {step_part(part): passed / 4 for part, passed in expected.items() if passed}
    hand.at += 8
    again = clock.read(1)  # the part that it was in goes on
    last = entered[-1][0]
    assert again == ({"time_per_step": 0} if last is None else {"time_per_step": 8, step_part(last): 8})


def test_switched_off_it_does_nothing():
    def now() -> float:
        raise AssertionError("the clock was looked at")

    clock = StepTimer(CPU, on=False, now=now)
    clock.enter("forward")
    assert clock.read(1) == {} and clock._marks == []


def test_the_table_is_a_mean_over_steps_without_the_first_row():
    row = {"split": "train", "time_per_step": 3.0, "time_data": 1.0, "time_forward": 2.0}
    later = [{**row, "step": 3, "time_data": 2.0}, {**row, "step": 6, "time_data": 5.0}]
    rows = [{**row, "step": 1, "time_data": 99.0}, *later, {"step": 6, "split": "eval/valid", "ppl": 2.0}]
    head, _, data, forward, total = breakdown_table(rows).splitlines()
    assert data.split() == ["time_data", "3.800", "65.5%"]  # (2 · 2 + 3 · 5) / 5
    assert forward.split() == ["time_forward", "2.000", "34.5%"]
    assert total.split() == ["time_per_step", "5.800", "100.0%"]
    assert breakdown_table(rows[:1]).splitlines()[2].split()[1] == "99.00"  # there is no other
    assert breakdown_table([{"step": 1, "split": "train", "loss": 1.0}]) == ""


def test_a_run_tells_where_its_time_went(tmp_path: Path, capsys):
    objective = {"name": "horizon", "tap_layer": 1, "horizons": [1, 2], "horizon_probs": [1, 1]}
    config = config_file(
        tmp_path, objective=objective, train={"eval_every": 2}, log={"breakdown": True, "report": True}
    )
    assert train.main(["--config", str(config)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fit = [row for row in rows if row["split"] == "train"]
    said = capsys.readouterr().out
    parts = [step_part(part) for part in STEP_PARTS if part != "gather"]  # it does not collect
    for row in fit:
        assert [name for name in row if name in map(step_part, STEP_PARTS)] == parts
        assert row["time_per_step"] == pytest.approx(sum(row[name] for name in parts))
        assert all(row[name] > 0 for name in parts)
    assert not any("time_per_step" in row for row in rows if row["split"] != "train")
    assert all(name in said for name in parts)
    plots = {path.stem for path in (tmp_path / "run" / "plots").iterdir()}
    assert "time_per_step" in plots and not plots & set(parts)
    assert "time_forward [s]" in (tmp_path / "run" / "report.html").read_text()
    assert describe("time_data").better == "lower"
    assert in_report_order({"time_data", "loss", "time_per_step"}) == ["loss", "time_per_step", "time_data"]


def test_without_the_key_no_row_has_it(tmp_path: Path):
    assert train.main(["--config", str(config_file(tmp_path, train={"steps": 1}))]) == 0
    assert "time_per_step" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.gpu
def test_on_a_gpu_the_device_is_asked():
    """A kernel that is launched in an instant and runs for long counts where it was launched."""
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    clock = StepTimer(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clock.enter("forward")
        begin.record()
        for _ in range(50):
            a = a @ a
        end.record()
        clock.enter("other")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = clock.read(1)
    assert values["time_forward"] == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.05)
    assert values["time_forward"] > 0.9 * values["time_per_step"]
