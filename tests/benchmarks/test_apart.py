"""A program in a process of its own, with an environment of its own."""

import io
import os

import pytest

from benchmarks.peer_programs.apart import Apart


def test_methods_are_called_over_there_until_it_is_closed():
    there = Apart({}, io.StringIO)
    assert there.write("four") == 4
    assert there.getvalue() == "four"
    there.close()
    assert there._process.exitcode == 0


def test_it_is_started_with_its_environment_and_leaves_ours_as_it_was():
    before = dict(os.environ)
    there = Apart({"OF_THE_OTHER": "its"}, os.getenv, "OF_THE_OTHER")
    assert dict(os.environ) == before
    assert there.upper() == "ITS"
    with pytest.raises((EOFError, ConnectionResetError)):
        there.no_such_method()
