import sys
from pathlib import Path

import pytest

from jepa_scale.utils.logging import say


def test_a_line_on_stderr(capsys):
    say("hello")
    assert capsys.readouterr().err == "hello\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_room_for_the_line(capsys, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    say("hello")
    say("hello", full)
    with pytest.raises(OSError):  # else this test shows nothing
        full.close()
