"""Module state that training writes to: it stays in fp32, and a teacher's copy has an average of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Fp32State(nn.Module):
    """A module whose own floating-point buffers keep their dtype when it is cast.

    They are moving averages and tables that training writes to. In bf16 an average with a decay of .95 would never move, and
    DeepSpeed casts the whole module, buffers included.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        result = super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype and buffer.dtype.is_floating_point:
                self._buffers[name] = buffer.to(after.device)
        return result


class AveragedState(Fp32State):
    """A module with state that depends on its weights, such as codes and moments, and with averages of that state.

    A teacher's weights are averages, so its copy of the module must use averages of the state. As a teacher copies the
    student's buffers unchanged, the student keeps these averages too, with the teacher's momentum.

    Attributes:
        of_teacher: whether this is a teacher's copy; set on the copy.
    """

    of_teacher = False

    def register_averaged(self, name: str, value: Tensor) -> None:
        """Register the buffers ``name`` and ``average_<name>``."""
        self.register_buffer(name, value)
        self.register_buffer(f"average_{name}", value.clone())

    def read(self, name: str) -> Tensor:
        """Return the state, or in a teacher's copy its average."""
        value = getattr(self, f"average_{name}" if self.of_teacher else name)
        assert isinstance(value, Tensor)
        return value

    @torch.no_grad()
    def write(self, name: str, value: Tensor, momentum: float, fresh: Tensor, when: Tensor) -> None:
        """Write the state and update its average: m · average + (1 − m) · value.

        Args:
            fresh: bool, broadcast to the value; where it is true, this is the first value and the average is set to it.
            when: 0-d bool; if it is false nothing is written.
        """
        average = getattr(self, f"average_{name}")
        overwrite(average, torch.where(fresh, value, torch.lerp(average, value, 1.0 - momentum)), when)
        overwrite(getattr(self, name), value, when)


@torch.no_grad()
def overwrite(buffer: Tensor, value: Tensor, when: Tensor) -> None:
    """Write ``value`` into the buffer if the 0-d bool ``when`` is true, without a host sync."""
    buffer.copy_(torch.where(when, value.to(buffer.dtype), buffer))
