import os
import signal

import pytest
import torch

from jepa_scale.training import preemption
from jepa_scale.training.preemption import EvaluationStopped, StopRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest(CPU) as stop:
        assert not stop.requested
        stop.interrupts()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
        with pytest.raises(EvaluationStopped):
            stop.interrupts()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest(CPU) as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_on_a_cpu_the_answer_is_that_of_this_step_and_elsewhere_of_the_last(monkeypatch):
    monkeypatch.setattr(preemption, "sent_to_host", lambda asked: lambda: bool(asked.value))
    stop = StopRequest(CPU)
    assert [stop.agreed(torch.tensor(float(n))) for n in (0, 2, 0)] == [False, True, False]
    lagging = StopRequest(CPU)
    asked = [torch.tensor(float(n)) for n in (0, 2, 0)]

    class Remote:
        """A value whose device is not the host's."""

        device = torch.device("cuda")

        def __init__(self, value):
            self.value = value

    assert [lagging.agreed(Remote(a)) for a in asked] == [False, False, True]
