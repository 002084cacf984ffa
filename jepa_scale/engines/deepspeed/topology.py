"""The process groups of tensor and data parallelism for DeepSpeed, in Megatron-LM's interface, which it calls ``mpu``."""

from __future__ import annotations

import torch.distributed as dist

from jepa_scale.distributed.comm import ParallelContext, dp_group, tp_group
from jepa_scale.engines.deepspeed import internals


def topology_of(ranks: ParallelContext) -> Topology | None:
    """Return the ``mpu`` of ``deepspeed.initialize``, or None without tensor parallelism.

    Also reset the global groups of an earlier engine.
    """
    internals.forget_groups()
    return Topology(ranks) if ranks.tp_size > 1 else None


class Topology:
    """The process groups of a rank.

    ZeRO shards over the data-parallel ranks. To ZeRO, a rank's part of a parameter that tensor parallelism splits is an
    ordinary parameter.
    """

    def __init__(self, ranks: ParallelContext) -> None:
        self.ranks = ranks

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return dp_group()

    def get_data_parallel_rank(self) -> int:
        return self.ranks.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.ranks.dp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return tp_group()

    def get_model_parallel_rank(self) -> int:
        return self.ranks.rank % self.ranks.tp_size

    def get_model_parallel_world_size(self) -> int:
        return self.ranks.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
