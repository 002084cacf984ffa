import io
import logging
import time
from types import SimpleNamespace

import pytest

from jepa_scale.telemetry import progress as progress_module
from jepa_scale.telemetry.progress import Progress
from jepa_scale.utils.logging import configure


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drive(progress, start, total, log_every):
    for step in range(start + 1, total + 1):
        progress.step(step, (step - start) * 2.0)
        if step % log_every == 0:
            progress.values(step, 1.5, 2000.0, seconds=(step - start) * 2.0)
    progress.close()


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "jepa_scale")
    return caplog


def test_in_a_file_a_message_every_tenth(logged):
    drive(Progress("demo", 1000, stream=io.StringIO()), 0, 1000, log_every=10)
    lines = logged.messages
    assert len(lines) == 10
    assert all(c.isprintable() for line in lines for c in line)
    assert lines[0] == "demo  step 100/1000  10%  loss 1.500  2,000 tokens/s  0:30:00 left"
    assert lines[-1].endswith("0:00:00 left") and "1000/1000" in lines[-1]


def test_a_resumed_run_counts_time_left_from_its_own_steps(logged):
    drive(Progress("demo", 1000, start=900, stream=io.StringIO()), 900, 1000, log_every=50)
    drive(Progress("demo", 100, start=50, stream=io.StringIO()), 50, 60, log_every=10)
    assert logged.messages == [
        "demo  step 1000/1000  100%  loss 1.500  2,000 tokens/s  0:00:00 left",
        "demo  step 60/100  60%  loss 1.500  2,000 tokens/s  0:01:20 left",
    ]


def first_message(logged, containing):
    """Wait for a message of the progress thread; the test's time limit ends a wait in vain."""
    while not (found := [line for line in logged.messages if containing in line]):
        time.sleep(0.01)
    return found[0]


def test_a_step_that_takes_long_is_reported_while_it_runs(logged):
    progress = Progress("demo", 1000, stream=io.StringIO(), interval=0.05)
    assert first_message(logged, "so far").startswith("demo  step 1 of 1000: for 0:00:0")
    progress.close()


def test_steps_without_a_row_are_reported_with_the_values_of_the_last_one(logged):
    """The next row, and the next tenth, are far away."""
    progress = Progress("demo", 1000, stream=io.StringIO(), interval=0.05)
    progress.values(3, 1.5, 2000.0, seconds=6.0)
    progress.step(4, 8.0)
    expected = "demo  step 4/1000  0%  loss 1.500  2,000 tokens/s  0:33:12 left"
    assert first_message(logged, "step 4/1000") == expected
    progress.close()


def test_a_long_evaluation_is_named(logged):
    progress = Progress("demo", 1000, stream=io.StringIO(), interval=0.05)
    with progress.pause("evaluation"):
        assert first_message(logged, "evaluation").startswith("demo  evaluation after step 0 of 1000: for 0:00:0")
    progress.close()


def test_a_row_is_shown_if_the_last_message_is_half_an_interval_ago(logged, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress("demo", 10_000, stream=io.StringIO())
    for step in range(1, 101):  # a row a second
        now = float(step)
        progress.values(step, 1.5, 2000.0, seconds=now)
    progress.close()
    assert [line.split()[2] for line in logged.messages] == ["31/10000", "62/10000", "93/10000"]


def test_on_a_terminal_a_bar_with_loss_and_speed():
    out = Terminal()
    progress = Progress("demo", 20, start=5, stream=out)
    drive(progress, 5, 20, log_every=5)
    shown = out.getvalue()
    assert "demo" in shown and "20/20" in shown and "loss 1.500" in shown and "2,000 tokens/s" in shown
    assert "\r" in shown


def test_where_warnings_alone_are_wanted_there_is_no_bar():
    configure(logging.WARNING)
    out = Terminal()
    drive(Progress("demo", 20, stream=out), 0, 20, log_every=5)
    assert out.getvalue() == ""
