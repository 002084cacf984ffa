"""Engines: who shards the model. The loop, the teacher and the checkpoint know :mod:`jepa_scale.engines.base` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from jepa_scale.config import OptimConfig
from jepa_scale.distributed import Ranks, world_size
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.errors import InputError

NAMES = ("deepspeed", "fsdp")


def resolve(name: str, ranks: Ranks) -> str:
    """``"auto"`` is DeepSpeed under DeepSpeed's own launcher and FSDP2 otherwise.

    Raises:
        InputError: no such engine.
    """
    if name == "auto":
        return "deepspeed" if ranks.launcher == "deepspeed" else "fsdp"
    if name not in NAMES:
        raise InputError(f"engine.name: unknown engine {name!r}; one of auto, {', '.join(NAMES)}")
    return name


def check_engine(name: str, deepspeed: str | Path) -> None:
    """Look at what the engine will need, before anything is built.

    Raises:
        InputError: ``deepspeed`` is not a JSON that the DeepSpeed engine can use (FSDP2 doesn't read it).
    """
    if name == "deepspeed":
        from jepa_scale.engines.deepspeed import validate_deepspeed_config

        validate_deepspeed_config(deepspeed)


def create_engine(
    name: str,
    module: nn.Module,
    shard: Sequence[nn.Module],
    groups: Sequence[dict[str, Any]],
    optim_options: OptimConfig,
    engine_options: EngineOptions,
    ranks: Ranks,
) -> Engine:
    """Shard ``module`` and build its optimizer. Collective; rank 0's weights go to every rank.

    Args:
        name: ``"deepspeed"`` or ``"fsdp"``; the package of the other one is never imported.
        module: the root, whole and in fp32 on every rank.
        shard: modules of it that are gathered and freed one at a time (the decoder blocks); FSDP2 needs to know them,
            ZeRO-3 finds its own.
        groups: what :func:`jepa_scale.optim.parameter_groups` made of ``module``.
    """
    module.to(ranks.device)
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.data = whole
    if name == "deepspeed":
        from jepa_scale.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, groups, optim_options, engine_options, ranks)
    from jepa_scale.engines.fsdp import FSDPEngine

    return FSDPEngine(module, shard, groups, optim_options, engine_options, ranks)
