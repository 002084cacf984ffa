"""Losses and statistics are computed in fp32, whatever precision the model runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``x`` for the duration of a block; tensors without data (``meta``) know none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
