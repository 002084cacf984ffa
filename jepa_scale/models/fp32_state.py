"""State of a module that stays in fp32, whatever the module computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Fp32State(nn.Module):
    """A module whose own floating-point buffers keep their dtype when it is cast.

    They are moving averages and tables that training writes to: in bf16 an average with a decay of .95 would stand still.
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


@torch.no_grad()
def overwrite(buffer: Tensor, value: Tensor, when: Tensor) -> None:
    """Write ``value`` into the buffer where the 0-d bool ``when`` is true, without asking the device for it."""
    buffer.copy_(torch.where(when, value.to(buffer.dtype), buffer))
