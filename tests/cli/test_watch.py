"""What ``jepa-scale watch`` shows of runs, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.cli.watch import CURVE, LEVELS, Screen, curve, view
from jepa_scale.telemetry.monitor import read_status
from tests.distributed.processes import ENVIRONMENT, REPOSITORY
from tests.telemetry.test_monitor import NOW, folder


def test_a_view_says_how_far_and_how_well(tmp_path):
    run = folder(tmp_path / "small", [3.0, 2.0, 1.0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 20, "split": "eval/valid", "tokens": 5, "ppl": 7.5}\n{"step": 30, "split": "eval/valid", "ppl": 6.5}\n'
        )
    first, second, third, fourth = view(read_status(run, stall=60, now=NOW))
    assert first == f"small  {'█' * 7}{'·' * 17} 30%  step 30 of 100  0:02:20 left"
    assert second.split() == ["loss", "1.000", "█▅▁", "50.00", "tokens/s"]
    assert third == "  eval/valid at step 30: ppl 6.500"
    assert fourth.startswith("  no checkpoint  last word ")


def test_an_alarm_has_a_line_of_its_own(tmp_path):
    assert (
        view(read_status(folder(tmp_path / "run", [3.0], age=90), stall=60, now=NOW))[-1]
        == "  ALARM: nothing written for 0:01:30"
    )


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_a_curve_keeps_the_order(values):
    bars = curve(values)
    assert len(bars) == min(CURVE, len(values))
    if 1 < len(values) <= CURVE:
        for a, b, low, high in zip(values, values[1:], bars, bars[1:], strict=False):
            assert LEVELS.index(low) <= LEVELS.index(high) if a <= b else LEVELS.index(low) >= LEVELS.index(high)


def test_lines_are_shown_in_place(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda **_: os.terminal_size((10, 3)))
    stream = io.StringIO()
    screen = Screen(stream)
    screen.show(["a" * 20, "b"])
    screen.show(["c"])
    assert stream.getvalue() == f"\x1b[2K{'a' * 10}\n\x1b[2Kb\n\x1b[0J\x1b[2F\x1b[2Kc\n\x1b[0J"


@pytest.mark.parametrize("terminal", [True, False])
def test_of_a_run_that_has_ended(tmp_path, terminal):
    """As a process of its own, on a terminal and in a pipe."""
    run = folder(tmp_path / "run", [3.0, 2.0], steps=20, ended=True)
    command = [sys.executable, "-m", "jepa_scale", "watch", str(run)]
    environment = {**os.environ, **ENVIRONMENT}
    if not terminal:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and "\x1b" not in done.stdout, done
        assert "step 20 of 20" in done.stdout and "ended" in done.stdout
        return
    controller, terminal_end = pty.openpty()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=terminal_end)
    os.close(terminal_end)
    said = b""

    def read():
        nonlocal said
        while True:
            try:
                said += os.read(controller, 4096)
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(300) == 0
    reader.join(300)
    os.close(controller)
    assert "█" * 24 + " 100%  step 20 of 20  ended" in said.decode()
