"""Set-up of the process group under each launcher, and the collectives that losses and metrics need.

With tensor parallelism of degree N, N consecutive ranks form a tensor-parallel group: they process the same samples and
share the work of each layer. They are consecutive because the group communicates in every layer, and consecutive ranks are
on one host. Losses and metrics are summed over the *data-parallel ranks*, one rank of each tensor-parallel group.
Checkpoints, signals and files concern all ranks.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_scale.distributed.environment import Place, launcher, read_place, started_by_launcher
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Rank and device of this process.

    Attributes:
        launcher: ``"deepspeed"``, ``"torchrun"`` or ``"python"``.
        tp_size: degree of tensor parallelism.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str
    tp_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Index of this rank's part of the global batch, of ``dp_size`` parts."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size


def setup(timeout_minutes: float = 30.0) -> ParallelContext:
    """Join the process group and select the device of this rank; without a launcher the group has one process.

    Raises:
        InputError: the launcher's environment variables do not fit together.
    """
    how = launcher()
    if dist.is_initialized():
        place = Place(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    else:
        place = read_place()
    rank, world_size, local_rank = place.rank, place.world_size, place.local_rank
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
        if on_gpu:
            options["device_id"] = device
        if how == "python" or place.alone:  # no launcher: a private store, so that concurrent runs cannot meet
            options["store"] = dist.HashStore()
        elif not started_by_launcher():
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            logger.info(f"rank {rank} of {world_size}, by the environment: waits for the others at {where}")
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank, world_size=world_size, **options)
    return ParallelContext(rank, world_size, local_rank, device, how)


def teardown() -> None:
    global _groups
    _groups = _Groups()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Groups:
    """Process groups of this rank.

    Attributes:
        dp: the data-parallel ranks, those with the same position in their tensor-parallel groups; None = all ranks.
        tp: the tensor-parallel group; None = this rank alone.
        size: degree of tensor parallelism.
    """

    dp: dist.ProcessGroup | None = None
    tp: dist.ProcessGroup | None = None
    size: int = 1


_groups = _Groups()


def init_tp_group(ranks: ParallelContext, size: int) -> ParallelContext:
    """Form tensor-parallel groups of ``size`` consecutive ranks, and return ``ranks`` with this degree. Collective.

    Raises:
        InputError: the number of ranks is not a multiple of ``size``.
    """
    global _groups
    if ranks.world_size % size:
        raise InputError(
            f"engine.tp: {size} does not divide the {ranks.world_size} ranks of this run; start a multiple of {size}"
        )
    if size != _groups.size:
        neighbours = [list(range(first, first + size)) for first in range(0, ranks.world_size, size)]
        columns = [list(range(place, ranks.world_size, size)) for place in range(size)]
        tp, dp = (_own_group(members, ranks.rank) if size > 1 else None for members in (neighbours, columns))
        _groups = _Groups(dp, tp, size)
    return replace(ranks, tp_size=size)


def _own_group(partition: list[list[int]], rank: int) -> dist.ProcessGroup:
    groups = [dist.new_group(members) for members in partition]  # every rank must create every group
    return next(group for group, members in zip(groups, partition, strict=True) if rank in members)


def dp_group() -> dist.ProcessGroup | None:
    """Process group of the data-parallel ranks, which have different samples; None = all ranks."""
    return _groups.dp


def tp_group() -> dist.ProcessGroup | None:
    """Tensor-parallel group of this rank, all of whose ranks have the same samples; None = this rank alone."""
    return _groups.tp


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def dp_size() -> int:
    """Number of data-parallel ranks, which is the number of parts of the global batch."""
    return world_size() // _groups.size


def dp_rank() -> int:
    """Index of this rank's part of the global batch."""
    return rank() // _groups.size


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the data-parallel ranks, as a new tensor. No gradient."""
    y = x.detach().clone()
    if dp_size() > 1:
        dist.all_reduce(y, group=_groups.dp)
    return y


def total_of_ranks(x: Tensor) -> Tensor:
    """Sum over all ranks, as a new tensor. No gradient."""
    y = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(y)
    return y


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate (n, …) of all data-parallel ranks, in rank order, to (ranks·n, …). No gradient.

    n must be equal on all ranks.
    """
    if dp_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(dp_size())]
    dist.all_gather(parts, x.detach().contiguous(), group=_groups.dp)
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """All-gather whose gradient is summed over the ranks.

    PyTorch's differentiable collectives change their names between releases, and gloo has no reduce-scatter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        if grad.device.type != "cpu":
            own = grad.new_empty((ctx.rows, *grad.shape[1:]))
            dist.reduce_scatter_tensor(own, grad, group=_groups.dp)
            return own
        dist.all_reduce(grad, group=_groups.dp)
        return grad[dp_rank() * ctx.rows : (dp_rank() + 1) * ctx.rows]


def all_gather_rows_with_grad(x: Tensor) -> Tensor:
    """Concatenate as :func:`all_gather_rows`; the gradient of each row is summed over the ranks."""
    return x if dp_size() == 1 else _GatherRows.apply(x)


def pad_rows(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """Pad (n, …) with ``value`` to (rows, …), so that ranks with fewer rows can take part in a gather."""
    missing = rows - x.shape[0]
    assert missing >= 0, (x.shape, rows)
    return x if missing == 0 else torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all data-parallel ranks, in rank order."""
    if dp_size() == 1:
        return [value]
    values: list[Any] = [None] * dp_size()
    dist.all_gather_object(values, value, group=_groups.dp)
    return values


def all_ranks_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
