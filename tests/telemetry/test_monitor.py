"""State of runs, read from folders written by the test and from a real run."""

from __future__ import annotations

import json
import os

import pytest

from jepa_scale import train
from jepa_scale.cli.main import main
from jepa_scale.telemetry.monitor import read_status
from jepa_scale.utils.errors import InputError
from tests.text_runs import config_file

NOW = 1_000_000.0


def folder(path, losses, steps=100, ended=False, age=5.0, seconds_per_step=2.0, every=10):
    """A run whose rows are ``every`` steps apart, last written ``age`` seconds before ``NOW``."""
    path.mkdir()
    (path / "config.yaml").write_text(f"run: {{name: {path.name}}}\ntrain: {{steps: {steps}}}\n")
    rows = [
        {
            "step": every * i,
            "split": "train",
            "loss": loss,
            "tokens_per_second": 50.0,
            "seconds": every * i * seconds_per_step,
        }
        for i, loss in enumerate(losses, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        (path / "summary.json").write_text("{}")
    for file in path.iterdir():
        os.utime(file, (NOW - age, NOW - age))
    return path


def test_time_left_is_steps_left_times_the_pace(tmp_path):
    status = read_status(folder(tmp_path / "run", [3.0, 2.0, 1.5]), stall=60, now=NOW)
    assert (status.step, status.steps, status.loss, status.tokens_per_second) == (30, 100, 1.5, 50.0)
    assert status.seconds_left == (100 - 30) * 2.0
    assert status.silent == 5.0 and not status.ended and not status.alarm and status.checkpoint is None
    assert "step 30 of 100" in status.line() and "0:02:20 left" in status.line() and "no checkpoint" in status.line()


def test_pace_is_that_of_the_last_rows(tmp_path):
    run = folder(tmp_path / "run", [1.0] * 40, steps=1000)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:20]:
        row["seconds"] -= 10_000  # a slow first half
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_status(run, stall=60).seconds_left == (1000 - 400) * 2.0


def test_a_loss_that_is_not_finite_is_an_alarm(tmp_path, capsys):
    run = folder(tmp_path / "run", [3.0, None], ended=True)
    assert read_status(run, stall=60, now=NOW).alarm == "loss not finite at step 20"
    assert main(["watch", str(run), "--once"]) == 1
    assert "ALARM: loss not finite at step 20" in capsys.readouterr().out


def test_silence_is_an_alarm_unless_the_run_has_ended(tmp_path):
    silent = folder(tmp_path / "silent", [3.0], age=61)
    assert read_status(silent, stall=60, now=NOW).alarm == "nothing written for 0:01:01"
    assert not read_status(silent, stall=62, now=NOW).alarm
    assert not read_status(folder(tmp_path / "ended", [3.0], age=61, ended=True), stall=60, now=NOW).alarm


def test_a_rank_that_enters_a_phase_is_not_silent(tmp_path):
    run = folder(tmp_path / "run", [3.0], age=1000)
    (run / "watchdog").mkdir()
    sign = run / "watchdog" / "rank_00000.json"
    sign.write_text("[]")
    os.utime(sign, (NOW - 3, NOW - 3))
    assert read_status(run, stall=60, now=NOW).silent == 3


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    run = folder(tmp_path / "run", [3.0], ended=True)
    assert read_status(run, stall=60, now=NOW).ended
    os.utime(run / "metrics.jsonl", (NOW, NOW))
    assert not read_status(run, stall=60, now=NOW).ended


def test_a_real_run_and_no_run(tmp_path, capsys):
    config = config_file(tmp_path)
    assert train.main(["--config", str(config), "train.steps=0", "train.epochs=1"]) == 0
    capsys.readouterr()
    assert main(["watch", str(tmp_path / "run")]) == 0  # it has ended: nothing to wait for
    said = capsys.readouterr().out
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert f"step {steps} of {steps}" in said and "ended" in said and f"checkpoint {steps}" in said
    with pytest.raises(InputError, match="not a run directory"):
        read_status(tmp_path, stall=60)
    assert main(["watch", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", ["run: null\ntrain: [1]\n", "run: {name: 7}\ntrain: {steps: many}\n", "train: {steps: true}\n"]
)
def test_a_config_that_was_changed_by_hand(tmp_path, config):
    run = folder(tmp_path / "run", [3.0, 2.0])
    (run / "config.yaml").write_text(config)
    status = read_status(run, stall=60, now=NOW)
    assert (status.step, status.steps) == (20, None) and status.name in ("run", "7")
