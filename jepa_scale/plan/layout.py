"""The layout of a run on its ranks: the engine, and the number of ranks over which it shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jepa_scale.config.schema import EngineConfig
from jepa_scale.engines.precision import compute_dtype
from jepa_scale.utils.errors import InputError

CHECKPOINTING = ("none", "full", "selective")


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a run: ranks = replicas × shards × tp. The tp ranks of a tensor-parallel group share their
    micro-batches.

    Attributes:
        engine: ``"fsdp"`` or ``"deepspeed"``; stage: of ZeRO, 3 under FSDP2.
        zero: ``zero_optimization`` of the DeepSpeed JSON; empty under FSDP2.
    """

    engine: str
    stage: int
    world_size: int
    tp: int = 1
    replicas: int = 1
    precision: str = "fp32"
    checkpointing: str = "none"
    compile: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_ranks(self) -> int:
        """Number of ranks that train on different micro-batches."""
        return self.world_size // self.tp

    @property
    def shards(self) -> int:
        """Number of ranks over which state is sharded."""
        return self.world_size // (self.tp * self.replicas)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.precision)

    @property
    def width(self) -> int:
        """Bytes of an element in the compute dtype."""
        return self.dtype.itemsize

    def __str__(self) -> str:
        name = "FSDP2" if self.engine == "fsdp" else f"ZeRO-{self.stage}"
        sizes = [f"{self.shards} shards"] + [f"{self.replicas} replicas"] * (self.replicas > 1)
        sizes += [f"tp {self.tp}"] * (self.tp > 1)
        more = f", checkpointing {self.checkpointing}" if self.checkpointing != "none" else ""
        return f"{name} {self.precision} on {self.world_size:,} ranks ({' × '.join(sizes)}){more}"


def layout_of(
    section: EngineConfig,
    world_size: int,
    tp: int | None = None,
    replicas: int | None = None,
    checkpointing: str | None = None,
) -> Layout:
    """Return the layout that ``engine:`` gives for a number of ranks.

    ``engine.tp``, ``engine.replicas`` and ``engine.activation_checkpointing`` hold where the arguments are ``None``.

    Raises:
        InputError: the ranks cannot be divided so, or the engine does not accept the DeepSpeed JSON.
    """
    tp = tp or section.tp
    replicas = replicas or section.replicas
    checkpointing = checkpointing or section.activation_checkpointing
    if checkpointing not in CHECKPOINTING:
        raise InputError(f"engine.activation_checkpointing: {checkpointing!r}; one of {', '.join(CHECKPOINTING)}")
    for name, value in (("--world-size", world_size), ("--tp", tp), ("--replicas", replicas)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    if world_size % (tp * replicas):
        raise InputError(
            f"--world-size {world_size}: is no multiple of tp × replicas = {tp} × {replicas}; make it one of {tp * replicas}"
        )
    engine = "fsdp" if section.name == "auto" else section.name
    more: dict[str, Any] = {"stage": 3}
    if engine == "deepspeed":
        from jepa_scale.engines.deepspeed.engine import validate_deepspeed_config

        if replicas > 1:
            raise InputError("--replicas: is for FSDP2; give engine.name=fsdp, or leave it out")
        zero = validate_deepspeed_config(section.deepspeed)["zero_optimization"]
        more = {"stage": zero["stage"], "zero": zero}
    return Layout(
        engine,
        world_size=world_size,
        tp=tp,
        replicas=replicas,
        precision="bf16" if section.precision == "auto" else section.precision,  # the plan is for GPUs
        checkpointing=checkpointing,
        compile=section.compile,
        **more,
    )
