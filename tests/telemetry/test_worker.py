"""Loggers run beside the training: events hold them, so that no verdict depends on time."""

from __future__ import annotations

import threading
import time

import pytest

from jepa_scale.telemetry import worker
from jepa_scale.telemetry.loggers import Loggers
from jepa_scale.telemetry.worker import Worker

HANG = 600


class Slow:
    """Waits in its first row, or where else it is told to, until the test lets it go on."""

    def __init__(self, at="log"):
        self.at, self.arrived, self.free, self.steps = at, threading.Event(), threading.Event(), []

    def hold(self, where):
        if where == self.at and not self.free.is_set():
            self.arrived.set()
            assert self.free.wait(HANG)

    def start(self):
        self.hold("start")
        return self

    def log(self, step, values):
        self.hold("log")
        self.steps.append(step)

    def close(self, exit_code):
        self.hold("close")
        self.steps.append(f"closed with {exit_code}")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(worker, "WAITING", 3)


def test_a_run_goes_on_while_a_logger_waits_and_all_rows_arrive_in_the_end():
    slow, loggers = Slow(), Loggers()
    loggers.add("slow", slow.start)
    for step in range(1, 51):
        loggers.log(step, {"train/loss": 1.0})  # the first one waits until it is set free below
    assert slow.arrived.wait(HANG) and slow.steps == []
    slow.free.set()
    loggers.close(1)
    assert slow.steps == [*range(1, 51), "closed with 1"]


def test_rows_beyond_the_bound_are_left_out_and_that_is_told_once(small, caplog):
    slow, loggers = Slow(), Loggers()
    loggers.add("slow", slow.start)
    loggers.log(1, {})
    assert slow.arrived.wait(HANG)  # it has taken row 1, and the queue is empty
    for step in range(2, 9):
        loggers.log(step, {})
    (message,) = caplog.messages
    assert "slow: takes rows more slowly than they come; from step 5 on some are left out" in message
    slow.free.set()
    loggers.close(0)
    assert slow.steps == [1, 2, 3, 4, "closed with 0"]


def test_a_row_is_handed_over_without_waiting(small, monkeypatch):
    """The queue is full and its reader is held, so a blocking call would wait: the queue is not asked for one."""
    slow = Slow()
    held = Worker("slow", slow.start)
    held.log(1, {})
    assert slow.arrived.wait(HANG)
    waits = []
    put = held._rows.put
    monkeypatch.setattr(held._rows, "put", lambda row, block=True, timeout=None: waits.append(block) or put(row, False))
    for step in range(2, 7):
        held.log(step, {})
    assert waits and not any(waits)
    slow.free.set()
    held.finish(0)
    held.join(time.monotonic() + HANG)


def test_a_logger_that_does_not_start_in_time_gets_its_rows_later(monkeypatch, caplog):
    monkeypatch.setattr("jepa_scale.telemetry.loggers.START_SECONDS", 0.0)
    slow, loggers = Slow("start"), Loggers()
    loggers.add("slow", slow.start)
    loggers.log(1, {})
    assert caplog.messages == ["slow: has not started in 0 s; the run begins, and its rows wait"]
    slow.free.set()
    loggers.close(0)
    assert slow.steps == [1, "closed with 0"]


@pytest.mark.parametrize("at", ["start", "log", "close"])
def test_the_end_of_a_run_does_not_wait_for_ever(monkeypatch, caplog, at):
    slow = Slow(at)
    held = Worker("slow", slow.start)
    held.log(1, {})
    assert slow.arrived.wait(HANG) if at != "close" else True
    held.finish(0)
    if at == "close":
        assert slow.arrived.wait(HANG)
    held.join(time.monotonic() - 1)
    (message,) = caplog.messages
    assert message.startswith("slow: has not closed, and ") and message.endswith("metrics.jsonl has them")
    slow.free.set()
    held._thread.join(HANG)
    assert len(caplog.messages) == 1


def test_secrets_in_messages_are_hidden(monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "0123secret")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tokensecret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    assert worker.reason(ConnectionError("no: 0123secret tokensecret\nmore")) == "ConnectionError: no: *** ***"
