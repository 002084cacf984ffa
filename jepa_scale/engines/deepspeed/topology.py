"""What DeepSpeed asks about teams of ranks (Megatron-LM's interface, which it calls ``mpu``)."""

from __future__ import annotations

import torch.distributed as dist

from jepa_scale.distributed.comm import Ranks, data_group, team_group


def topology_of(ranks: Ranks) -> Topology | None:
    """What ``deepspeed.initialize`` is to be told; None without teams."""
    from deepspeed.utils import groups

    # What an engine before this one was told. An EMA teacher's is to have no secondary shards: they would be out of date after
    # the first update.
    groups.mpu = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return Topology(ranks) if ranks.team > 1 else None


class Topology:
    """ZeRO shards over the ranks with different samples; what a rank of a team has of a split parameter is a parameter to it."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return data_group()

    def get_data_parallel_rank(self) -> int:
        return self.ranks.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.ranks.data_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return team_group()

    def get_model_parallel_rank(self) -> int:
        return self.ranks.rank % self.ranks.team

    def get_model_parallel_world_size(self) -> int:
        return self.ranks.team

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
