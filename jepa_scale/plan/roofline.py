"""How long a step takes at least: the roofline of each operator, and of each link.

An operator takes no less than its FLOPs at the GPU's peak, nor than its bytes at the memory's bandwidth (Williams et al. 2009,
Roofline: an insightful visual performance model). It is a bound: real kernels reach a part of it, which ``efficiency`` may say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jepa_scale.plan.communication import Traffic
from jepa_scale.plan.hardware import Gpu
from jepa_scale.plan.layout import Layout
from jepa_scale.plan.ledger import OpCost

STEPPED = 28
"""Bytes that AdamW reads and writes an element: parameter, gradient and two moments in, parameter and moments out, fp32."""
AVERAGED = 12
"""Bytes that a teacher's update does."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        compute: forward, backward and optimizer. hidden: communication that computing covers, or could. exposed:
            communication during which nothing is computed. model_flops: of this rank's share, recomputation left out.
    """

    compute: float
    hidden: float
    exposed: float
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hidden) + self.exposed

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization (Chowdhery et al., arXiv 2204.02311, appendix B)."""
        return self.model_flops / self.seconds / self.peak

    @property
    def bound(self) -> str:
        """What a step waits for."""
        return "communication" if self.hidden > self.compute or self.exposed > self.compute else "compute"


def estimate(
    ops: Sequence[OpCost],
    accumulation: int,
    stepped: int,
    averaged: int,
    traffic: Sequence[Traffic],
    model_flops: float,
    gpu: Gpu,
    layout: Layout,
    tf32: bool,
    efficiency: float = 1.0,
) -> Estimate:
    """
    Args:
        ops: of one micro-batch. stepped: elements that this rank's optimizer steps. averaged: of its teacher.
        efficiency: share of the roofline that operators reach; links are taken to reach all of theirs.
    """
    peak = gpu.flops(layout.precision, tf32)
    passes = sum(max(op.flops / peak, op.bytes / gpu.bandwidth) for op in ops) * accumulation
    updates = (STEPPED * stepped + AVERAGED * averaged) / gpu.bandwidth
    hidden = sum(t.sent / gpu.reach(t.ranks, t.span) for t in traffic if t.overlaps)
    exposed = sum(t.sent / gpu.reach(t.ranks, t.span) for t in traffic if not t.overlaps)
    return Estimate((passes + updates) / efficiency, hidden, exposed, model_flops, peak)
