"""Resolution of ``engine.precision`` for the devices of a run."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from jepa_scale.distributed.comm import ParallelContext, all_ranks_objects

logger = logging.getLogger(__name__)


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a resolved precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for products of bf16 matrices.

    A CPU without them took 25 times as long for a step as in fp32 (docs/performance.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def resolve_precision(asked: Literal["auto", "fp32", "bf16"], ranks: ParallelContext) -> Literal["fp32", "bf16"]:
    """Return the precision to use. Collective.

    ``auto`` becomes bf16 if every rank's device has instructions for it, else fp32. Other values are returned unchanged.
    Rank 0 warns of bf16 on a CPU without instructions for it.
    """
    if asked == "fp32":
        return asked
    everywhere = all(all_ranks_objects(has_bf16(ranks.device)))
    if asked == "auto":
        return "bf16" if everywhere else "fp32"
    if not everywhere and ranks.is_main and ranks.device.type == "cpu":
        logger.warning(
            "engine.precision: this CPU has no instructions for bf16, which may take 25 times as long as fp32; "
            "set it to fp32 or auto"
        )
    return asked
