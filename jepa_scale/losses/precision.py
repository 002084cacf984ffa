"""Context for computing losses and statistics in fp32, independent of the precision of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast on the device of ``x``; for ``meta`` tensors it does nothing."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
