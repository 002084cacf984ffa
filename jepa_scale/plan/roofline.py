"""Lower bound of the time of a step: the roofline of each operator, and the bandwidth of each link.

An operator takes at least its FLOPs at the GPU's peak rate, and at least its bytes at the memory bandwidth (Williams et al.
2009, Roofline: an insightful visual performance model). Real kernels reach a part of this bound, which ``efficiency`` sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jepa_scale.plan.communication import Traffic
from jepa_scale.plan.hardware import Gpu
from jepa_scale.plan.layout import Layout
from jepa_scale.plan.memory_tracker import OpCost

UPDATED = 28
"""Bytes that AdamW reads (parameter, gradient, two moments) and writes (parameter, two moments) per element, in fp32."""
AVERAGED = 12
"""Bytes that a teacher's update reads and writes per element, in fp32."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        compute: seconds of forward, backward and optimizer.
        hidden: seconds of communication that can overlap with computation.
        exposed: seconds of communication during which nothing is computed.
        model_flops: FLOPs of this rank's share of the model, without recomputation.
        peak: FLOP/s of the GPU.
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
        """The bottleneck of the step: ``"communication"`` or ``"compute"``."""
        return "communication" if self.hidden > self.compute or self.exposed > self.compute else "compute"


def estimate(
    ops: Sequence[OpCost],
    accumulation: int,
    updated: int,
    averaged: int,
    traffic: Sequence[Traffic],
    model_flops: float,
    gpu: Gpu,
    layout: Layout,
    tf32: bool,
    efficiency: float = 1.0,
    links: float = 1.0,
    latency: float = 0.0,
) -> Estimate:
    """Estimate the time of a step on one rank.

    Args:
        ops: operators of one micro-batch.
        updated: number of elements that this rank's optimizer updates.
        averaged: number of elements that this rank's teacher updates.
        model_flops: FLOPs of this rank's share of the model, without recomputation.
        efficiency: fraction of the roofline that operators reach.
        links: fraction of their bandwidth that links reach. latency: seconds that each collective takes besides.
    """
    peak = gpu.flops(layout.precision, tf32)
    passes = sum(max(op.flops / peak, op.bytes / gpu.bandwidth) for op in ops) * accumulation
    updates = (UPDATED * updated + AVERAGED * averaged) / gpu.bandwidth

    def seconds(overlaps: bool) -> float:
        chosen = [t for t in traffic if t.overlaps is overlaps]
        return sum(t.sent / (gpu.reach(t.ranks, t.span) * links) + t.calls * latency for t in chosen)

    hidden, exposed = seconds(True), seconds(False)
    return Estimate((passes + updates) / efficiency, hidden, exposed, model_flops, peak)
