"""Requests to stop a run: SIGTERM or SIGUSR1, as a scheduler sends them, SIGINT (Ctrl-C) or SIGHUP (a closed terminal), to any
rank; or the end of its launcher."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from jepa_scale.distributed.comm import total_of_ranks
from jepa_scale.distributed.environment import launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
POLL = 1.0
"""Seconds between two checks of whether the launcher still runs."""


class StopRequest:
    """Record of a signal that asks this process to stop. The ranks agree on stopping by a reduction in the training loop,
    because a signal may reach only one of them, and the others would then wait for it.

    ``with StopRequest(device) as stop:`` installs the signal handlers and restores the earlier ones at the end. A second SIGINT
    raises KeyboardInterrupt, so that Ctrl-C twice stops at once. SIGHUP stays ignored under ``nohup``.

    The end of the launcher is a request, too. The ``deepspeed`` command passes no SIGTERM on to its ranks, and no launcher passes
    on a SIGKILL; the ranks would train on, and nobody would know.
    """

    def __init__(self, device: torch.device) -> None:
        self.requested = False
        self._device = device
        self._asked: Callable[[], bool] | None = None  # the result of the call before
        self.name = ""
        self._before: dict[int, Any] = {}
        self._closed = threading.Event()
        self._launcher = launcher_processes()

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        if self._launcher:
            threading.Thread(target=self._follow_launcher, name="launcher", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, asked: Tensor) -> bool:
        """Return whether the ranks have agreed to stop.

        On a GPU the result is that of the previous call, which was sent to the host then. To read the current value, the host
        would have to wait for the device. ``item`` on the previous tensor would wait, too, for all work queued since. This way
        the host is at most one step ahead.

        Args:
            asked: 0-d, number of ranks with a request, the same on every rank.
        """
        if asked.device.type == "cpu":
            return bool(asked.item())
        agreed = self._asked is not None and self._asked()
        self._asked = sent_to_host(asked)
        return agreed

    def interrupts(self) -> None:
        """Check for a request between the forwards of an evaluation. Collective.

        Raises:
            EvaluationStopped: a rank has a request to stop.
        """
        if total_of_ranks(torch.tensor(float(self.requested), device=self._device)).item():
            raise EvaluationStopped

    def _follow_launcher(self) -> None:
        while not self._closed.wait(POLL):
            if not are_ancestors(self._launcher):
                self.requested, self.name = True, self.name or "the end of its launcher"
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name


def launcher_processes() -> list[int]:
    """Return the processes whose end means that this rank's launcher is gone: its parent, and the parent's parent where that is
    the ``deepspeed`` command. Empty without a launcher."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    if launcher() != "deepspeed":
        return []
    above = parent_of(parent)
    return [parent, above] if above is not None and _is_deepspeed_command(above) else [parent]


def are_ancestors(processes: Sequence[int]) -> bool:
    """Return whether these are this process's parent, the parent's parent, and so on. The child of a process that has ended
    gets another parent."""
    child = os.getpid()
    for process in processes:
        if (os.getppid() if child == os.getpid() else parent_of(child)) != process:
            return False
        child = process
    return True


def parent_of(process: int) -> int | None:
    """Return the parent's process id, None if it is not known (no ``/proc``, or the process has ended)."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_deepspeed_command(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")[:4]
    except OSError:
        return False
    return any(
        word.endswith(("/deepspeed", "deepspeed/launcher/runner.py", "deepspeed.launcher.runner")) for word in words
    )


def sent_to_host(value: Tensor) -> Callable[[], bool]:
    """Send a 0-d tensor of a GPU to the host, and return a function that reads it. The function waits for work queued before
    this call only."""
    arrived = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(arrived.item())

    return read


class EvaluationStopped(Exception):
    """Raised on all ranks when they have agreed to stop during an evaluation."""
