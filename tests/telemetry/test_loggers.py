import importlib.util
import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.telemetry import RunLog, load_run
from jepa_scale.telemetry.loggers import Loggers
from jepa_scale.utils.splits import split_key

CONFIG = "run:\n  name: demo\noptim:\n  lr: 0.00123456\n"
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def run_log(directory, start_step=0, **log):
    ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
    return RunLog(directory, LogConfig(progress=False, **log), ranks, "demo", 10, CONFIG, start_step=start_step)


def scalars(directory):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_events_read_back_and_are_superseded_at_a_resume(tmp_path):
    with run_log(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.trained(step, {"loss": float(step), "skipped": None})
        log.evaluated(3, "eval/test", {"mrr": 0.25})
    with run_log(tmp_path, tensorboard=True, start_step=2) as log:
        log.trained(3, {"loss": 30.0})
    events = scalars(tmp_path)
    assert events["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "train/skipped" not in events and "speed/tokens_per_second" in events
    assert events.get("eval/test/mrr", []) == []  # step 3 was undone
    with run_log(tmp_path, tensorboard=True, start_step=0) as log:  # no checkpoint was found
        log.trained(1, {"loss": 10.0})
    assert scalars(tmp_path)["train/loss"] == [(1, 10.0)]


def test_tensorboard_gets_nan_as_nan(tmp_path):
    with run_log(tmp_path, tensorboard=True) as log:
        log.trained(1, {"loss": math.nan})
    assert math.isnan(scalars(tmp_path)["train/loss"][0][1])


class Broken:
    def __init__(self, at=None):
        self.at, self.calls = at, []

    def log(self, step, values):
        self.calls.append(step)
        if self.at == "log":
            raise ConnectionError("no route, key 0123secret")

    def close(self, exit_code):
        self.calls.append("close")
        if self.at in ("log", "close"):
            raise RuntimeError("cannot close either")


def test_a_logger_that_raises_is_reported_once_and_dropped(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    bad, good = Broken(at="log"), Broken()
    with run_log(tmp_path) as log:
        log._loggers.add("bad", lambda: bad)
        log._loggers.add("good", lambda: good)
        for step in (1, 2, 3):
            log.trained(step, {"loss": 1.0})
    assert bad.calls == [1, "close"] and good.calls == [1, 2, 3, "close"]
    warnings = caplog.messages
    assert len(warnings) == 1 and "bad" in warnings[0] and "ConnectionError" in warnings[0]
    assert "0123secret" not in warnings[0]
    assert len(load_run(tmp_path).rows) == 3 and (tmp_path / "summary.json").is_file()


def test_a_logger_that_cannot_start_or_close_is_reported(caplog):
    loggers = Loggers()

    def fail():
        raise ImportError("no such client")

    loggers.add("absent", fail)
    loggers.add("sticky", lambda: Broken(at="close"))
    loggers.log(1, {"train/loss": 1.0})
    loggers.close(0)
    warnings = caplog.messages
    assert len(warnings) == 2 and "absent" in warnings[0] and "sticky" in warnings[1]


def wandb_rows(file):
    """Return the rows in a ``.wandb`` file: records of :mod:`wandb.proto`, in blocks of LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the block ends in zeros
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
                rows.append({key: json.loads(value) for key, value in items if key[0] != "_"})
    return rows


WANDB_RUN = """
import sys, torch
from pathlib import Path
from jepa_scale.telemetry import RunLog, loggers
from jepa_scale.config.schema import LogConfig
from jepa_scale.distributed.comm import ParallelContext
loggers.START_SECONDS = loggers.CLOSE_SECONDS = 600.0
directory, start = Path(sys.argv[1]), int(sys.argv[2])
log = LogConfig(progress=False, wandb=True, tensorboard=True, project="probe")
ranks = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
with RunLog(directory, log, ranks, "demo", 10, {config!r}, start_step=start) as log:
    log.trained(start + 1, {{"loss": 1.2345678, "lr": 0.001, "grad_norm": None}})
    log.evaluated(start + 1, "eval/test", {{"mrr": 0.8765432}})
"""


@needs_wandb
def test_wandb_logs_offline_without_asking_and_a_resume_keeps_its_id(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "WANDB_MODE": "offline"}  # no stored login

    def run(start, **more):
        command = [sys.executable, "-c", WANDB_RUN.format(config=CONFIG), str(tmp_path), str(start)]
        return subprocess.run(
            command,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )

    done = run(0)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "", done
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    (stored,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    content = stored.read_bytes()
    for expected in (b"train/loss", b"1.2345678", b"eval/test/mrr", b"0.8765432", b"0.00123456", b"probe"):
        assert expected in content, expected

    # the same names and values, in all three
    rows = wandb_rows(stored)
    events = scalars(tmp_path)
    assert {"train/loss", "optimizer/lr", "speed/tokens_per_second", "speed/seconds"} <= rows[0].keys()
    assert {"step", "eval/test/mrr"} == rows[1].keys()
    for chart, curve in events.items():
        assert [(row["step"], round(row[chart], 4)) for row in rows if chart in row] == curve
    assert events.keys() == set().union(*rows) - {"step"}
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    plain = {split_key(chart)[1] for chart in events}
    assert plain == {key for row in written for key, v in row.items() if v is not None} - {"step", "split", "tokens"}

    # Online is asked for and no key is known: no prompt, no failure, and the run goes on under its id.
    done = run(1, WANDB_MODE="online")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "no API key" in done.stderr, done
    assert (tmp_path / "wandb_id.txt").read_text().strip() == name
    assert len({p.parent for p in (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")}) == 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 1, 2, 2]
