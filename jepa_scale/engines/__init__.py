"""Engines, which shard the model. The loop, the teacher and the checkpoint use only :mod:`jepa_scale.engines.base`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from jepa_scale.config.schema import EngineConfig, OptimConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.engines.weights import Weights
from jepa_scale.utils.errors import InputError

NAMES = ("deepspeed", "fsdp")


def resolve(name: str, ranks: ParallelContext) -> str:
    """Return an engine's name; ``"auto"`` becomes DeepSpeed under DeepSpeed's launcher and FSDP2 otherwise.

    Raises:
        InputError: no such engine.
    """
    if name == "auto":
        return "deepspeed" if ranks.launcher == "deepspeed" else "fsdp"
    if name not in NAMES:
        raise InputError(f"engine.name: unknown engine {name!r}; one of auto, {', '.join(NAMES)}")
    return name


def check_engine(name: str, options: EngineConfig, optim: OptimConfig, ranks: ParallelContext) -> None:
    """Check the engine's options before anything is built.

    Raises:
        InputError: ``engine.deepspeed`` is not a JSON that the DeepSpeed engine can use (FSDP2 doesn't read it), or the
            engine cannot shard over these ranks with the given options.
    """
    if name == "deepspeed":
        from jepa_scale.engines.deepspeed.engine import validate_deepspeed_config

        zero = validate_deepspeed_config(options.deepspeed)["zero_optimization"]
        if options.tp > 1 and zero.get("zero_hpz_partition_size", 1) > 1:
            raise InputError(
                f"engine.tp: {options.tp} and zero_hpz_partition_size in {options.deepspeed}: DeepSpeed would put its "
                "secondary shards on the ranks of a tensor-parallel group, which are neighbours; set one of them to 1"
            )
        if options.compile and zero["stage"] == 3:
            raise InputError(
                "engine.compile: ZeRO-3 gathers parameters by hooks in every layer of a block, and nearly each of them would "
                "be compiled separately; use FSDP2 (engine.name=fsdp) or a ZeRO stage below 3, or remove engine.compile"
            )
        if options.replicas > 1:
            raise InputError(
                "engine.replicas: only FSDP2 supports replicas; remove it, or shard ZeRO-3 within a node with "
                "zero_hpz_partition_size (configs/ds/zero3_hpz.json)"
            )
    if ranks.dp_size % options.replicas:
        raise InputError(
            f"engine.replicas: {options.replicas} does not divide the {ranks.dp_size} ranks with different samples "
            f"({ranks.world_size} ranks, engine.tp={options.tp}); set it to a divisor"
        )
    if optim.uses_muon and (options.tp > 1 or options.replicas > 1):
        key = "tp" if options.tp > 1 else "replicas"
        raise InputError(
            f"engine.{key}: Muon needs whole matrices, and gathers each from ranks with disjoint parts only; set it to 1, or "
            "optim.method to adamw"
        )


def create_engine(
    name: str,
    module: nn.Module,
    shard: Sequence[nn.Module],
    groups: Sequence[dict[str, Any]],
    optim_options: OptimConfig,
    engine_options: EngineOptions,
    ranks: ParallelContext,
    weights: Weights | None = None,
) -> Engine:
    """Shard ``module`` and build its optimizer. Collective.

    While the weights come from rank 0, a device holds one whole parameter at a time, beside the engine's shards.

    Args:
        name: ``"deepspeed"`` or ``"fsdp"``; the package of the other one is never imported.
        module: the root, in fp32. Parameters that tensor parallelism splits are this rank's parts.
        shard: sub-modules that are gathered and freed one at a time (the decoder blocks). Only FSDP2 uses them; ZeRO-3
            finds its own.
        groups: parameter groups of ``module``, from :func:`jepa_scale.optim.parameter_groups`.
        weights: initial weights; ``None`` = those of ``module`` on rank 0.
    """
    weights = weights or Weights(module, ranks)
    if name == "deepspeed":
        from jepa_scale.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, groups, optim_options, engine_options, ranks, weights)
    from jepa_scale.engines.fsdp.engine import FSDPEngine

    return FSDPEngine(module, shard, groups, optim_options, engine_options, ranks, weights)
