"""A polite request to stop: SIGTERM (a scheduler's, Ctrl-C's SIGINT counts, too) or SIGUSR1 to any rank."""

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
    """Remembers that this process was asked to stop. The ranks agree on it in the loop, by a reduction: a signal may reach
    one of them alone, and none may leave the others waiting.

    ``with StopRequest(device) as stop:`` puts the handlers in place and takes them away again. A second SIGINT raises
    KeyboardInterrupt: somebody at the keyboard will not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self.requested = False
        self._device = device
        self._asked: Callable[[], bool] | None = None  # whether any rank was, in the call before
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
        """Whether the ranks have agreed to stop.

        Args:
            asked: 0-d, how many ranks were asked to, the same on every rank. On a GPU the answer is that of the call
                before, which was sent to the host when it was made: reading this one would make the host wait for the device,
                and so would ``item`` of the one before, for all that the device has been given since. As it is the host is at
                most a step ahead.
        """
        if asked.device.type == "cpu":
            return bool(asked.item())
        agreed = self._asked is not None and self._asked()
        self._asked = sent_to_host(asked)
        return agreed

    def interrupts(self) -> None:
        """Between the forwards of an evaluation; collective.

        Raises:
            EvaluationStopped: all ranks have agreed to stop.
        """
        if total_of_ranks(torch.tensor(float(self.requested), device=self._device)).item():
            raise EvaluationStopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name


def sent_to_host(value: Tensor) -> Callable[[], bool]:
    """Send a 0-d tensor of a GPU to the host; whoever asks for it waits for what the device was given before, and no more."""
    arrived = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(arrived.item())

    return read


class EvaluationStopped(Exception):
    """All ranks have agreed to stop, in the middle of an evaluation."""
