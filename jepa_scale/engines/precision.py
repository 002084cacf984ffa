"""Resolution of ``engine.precision`` for the devices of a run."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from jepa_scale.distributed.comm import ParallelContext, all_ranks_objects
from jepa_scale.utils.devices import refuse_fp16

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a resolved precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for products of bf16 matrices.

    A CPU without them took 25 times as long for a step as in fp32 (docs/performance.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has("bf16")


def has_fp16(device: torch.device) -> bool:
    """Return whether the device has instructions for products of fp16 matrices."""
    return device.type == "cuda" or _cpu_has("fp16")


def _cpu_has(dtype: str) -> bool:
    return any(there for name, there in torch.cpu.get_capabilities().items() if dtype in name)


def resolve_precision(asked: Precision, ranks: ParallelContext) -> Precision:
    """Return the precision to use, which is not ``auto``. Collective.

    ``auto`` becomes bf16 if every rank's device has instructions for it, else fp32. Other values are returned unchanged.
    Rank 0 warns of bf16 on a CPU without instructions for it.

    Raises:
        InputError: fp16 on a CPU without instructions for it, unless the environment has ``JEPA_SCALE_FP16_ON_CPU=1``.
    """
    if asked == "fp32":
        return asked
    there = has_fp16 if asked == "fp16" else has_bf16
    everywhere = all(all_ranks_objects(there(ranks.device)))
    if asked == "auto":
        return "bf16" if everywhere else "fp32"
    if not everywhere and asked == "fp16":
        refuse_fp16()
    if not everywhere and ranks.is_main and ranks.device.type == "cpu":
        logger.warning(
            f"engine.precision: this CPU has no instructions for {asked}, which may take 25 times as long as fp32; "
            "set it to fp32 or auto"
        )
    return asked
