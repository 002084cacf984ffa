"""The learned temperature of InfoNCE."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """exp of a parameter. The engine keeps the parameter within its bounds
    (:meth:`jepa_scale.objectives.base.Objective.bounds`) by clamping it after each update. A clamp in the forward would have no
    gradient outside the bounds, and the temperature would stay at a bound once it has passed it.

    Args:
        init: the temperature at the start. low, high: its bounds.
    """

    def __init__(self, init: float, low: float, high: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(init)))
        self.bounds = (math.log(low), math.log(high))

    def forward(self) -> Tensor:
        """Return the temperature, 0-d fp32."""
        return self.log_temperature.float().exp()[0]
