import io
import logging

import pytest

from jepa_scale.telemetry.progress import Progress
from jepa_scale.utils.logging import configure


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drive(progress, start, total, log_every):
    for step in range(start + 1, total + 1):
        progress.step(step)
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
