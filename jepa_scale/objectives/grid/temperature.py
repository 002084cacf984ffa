"""The learned temperature of InfoNCE."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """exp of a parameter. Its bounds are the engine's to keep (:meth:`jepa_scale.objectives.base.Objective.bounds`): after each
    update the parameter is put back between them. A clamp in the forward would have no gradient outside, and the
    temperature would stay at a bound once it is there.

    Args:
        init: the temperature at the start. low, high: its bounds.
    """

    def __init__(self, init: float, low: float, high: float) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(init)))
        self.bounds = (math.log(low), math.log(high))

    def forward(self) -> Tensor:
        """0-d fp32."""
        return self.log_temperature.float().exp()[0]
