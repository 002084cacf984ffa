import os
import signal

import pytest
import torch

from jepa_scale.training import preemption
from jepa_scale.training.preemption import EvaluationStopped, StopRequest
from tests.distributed.processes import until

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_request_and_handlers_come_back(number):
    inherited = signal.signal(number, signal.default_int_handler)  # the tests may run under nohup
    try:
        before = signal.getsignal(number)
        with StopRequest(CPU) as stop:
            assert not stop.requested
            stop.interrupts()
            assert signal.getsignal(number) is not before  # else the signal would end the tests
            os.kill(os.getpid(), number)
            assert stop.requested and stop.name == number.name
            with pytest.raises(EvaluationStopped):
                stop.interrupts()
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)


def test_nohup_keeps_its_meaning(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(CPU) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_parent_and_its_parent_are_ancestors_until_one_of_them_ends():
    """A process whose parent has ended gets another one: here the tests' own chain, and one with a link that never was."""
    chain = [os.getppid(), preemption.parent_of(os.getppid())]
    assert preemption.are_ancestors([]) and preemption.are_ancestors(chain[:1]) and preemption.are_ancestors(chain)
    assert not preemption.are_ancestors([os.getpid()]) and not preemption.are_ancestors([chain[0], os.getpid()])


def test_the_end_of_the_launcher_is_a_request(monkeypatch):
    """It ends between the first look at it and the second."""
    looks = []

    def are_ancestors(processes):
        looks.append((processes, stop.requested))
        return len(looks) == 1

    monkeypatch.setattr(preemption, "launcher_processes", lambda: [7])
    monkeypatch.setattr(preemption, "are_ancestors", are_ancestors)
    monkeypatch.setattr(preemption, "POLL", 0.01)
    with StopRequest(CPU) as stop:
        until(lambda: stop.requested, "request")
        assert stop.name == "the end of its launcher" and looks == 2 * [([7], False)]


def test_without_a_launcher_nothing_is_followed(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert preemption.launcher_processes() == []
    monkeypatch.setenv("WORLD_SIZE", "2")  # set by hand or by a SLURM script, where the shell may end before its ranks
    assert preemption.launcher_processes() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert preemption.launcher_processes() == [os.getppid()]


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
