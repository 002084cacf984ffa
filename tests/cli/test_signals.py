"""A command that a signal stops: what it raises, and what is as before afterwards."""

import os
import signal

import pytest

from jepa_scale.cli.signals import SIGNALS, Stopped, stopped_by_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_an_exception_with_the_shells_exit_code(number, code):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(Stopped, match=f"^stopped by {number.name}$") as stopped, stopped_by_signals():
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("it was taken for a failure")
    assert stopped.value.exit_code == code
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_handlers_come_back_after_an_ordinary_end():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopped_by_signals():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before
