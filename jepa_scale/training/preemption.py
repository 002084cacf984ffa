"""Requests to stop a run: SIGTERM or SIGUSR1, as a scheduler sends them, or SIGINT (Ctrl-C), to any rank."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from jepa_scale.distributed.comm import total_of_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Record of a signal that asks this process to stop. The ranks agree on stopping by a reduction in the training loop,
    because a signal may reach only one of them, and the others would then wait for it.

    ``with StopRequest(device) as stop:`` installs the signal handlers and restores the earlier ones at the end. A second SIGINT
    raises KeyboardInterrupt, so that Ctrl-C twice stops at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.requested = False
        self._device = device
        self._asked: Callable[[], bool] | None = None  # the result of the call before
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name


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
