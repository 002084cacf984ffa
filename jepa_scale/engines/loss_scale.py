"""Dynamic loss scaling for fp16, the same on every engine (Micikevicius et al., arXiv 1710.03740, section 3.2).

Gradients below 6e-8 are zero in fp16. The loss is multiplied by a large factor before the backward pass, and the fp32 gradients
are divided by it before they are clipped. If a gradient overflows, the step is skipped and the factor is halved; after
:data:`GROWTH_INTERVAL` steps without an overflow it is doubled.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
LEAST, MOST = 1.0, 2.0**24
"""Bounds of the factor. At the least one, a gradient that is not finite has another cause than the scale."""


class LossScale:
    """The factor and the number of steps since it was last changed, on the device: no step waits for the host.

    All ranks have the same, because they see the same global gradient norm.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), INITIAL, device=device)
        """0-d, fp32; a power of two, so that scaling rounds nothing."""
        self._steps = torch.zeros((), dtype=torch.int64, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        return loss.float() * self.factor

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Adapt the factor after a step.

        Args:
            norm: 0-d, the global gradient norm; the step was skipped if it is not finite.
        """
        finite = norm.isfinite()
        steps = torch.where(finite, self._steps + 1, 0)
        grows = steps >= GROWTH_INTERVAL
        self.factor.mul_(torch.where(finite, 1.0 + grows, 0.5)).clamp_(LEAST, MOST)
        self._steps.copy_(torch.where(grows, 0, steps))

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint. Waits for the device."""
        return {"factor": self.factor.item(), "steps": self._steps.item()}

    def load_state(self, state: dict[str, float]) -> None:
        self.factor.fill_(state["factor"])
        self._steps.fill_(int(state["steps"]))
