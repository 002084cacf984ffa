"""The process group: how it starts under each launcher, and the few collectives that losses and metrics need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is. ``launcher`` is ``"deepspeed"``, ``"torchrun"`` or ``"python"``."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launcher() -> str:
    """Which launcher started this process, read off the environment that each of them sets."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_SIZE" in os.environ and "WORLD_SIZE" in os.environ:  # deepspeed/launcher/launch.py
        return "deepspeed"
    return "torchrun" if "WORLD_SIZE" in os.environ else "python"


def setup(timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group (a group of one when no launcher started us) and pick this rank's device."""
    how = launcher()
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
        if on_gpu:
            options["device_id"] = device
        if how == "python":  # no rendezvous of anybody's: a private store, so that runs side by side never meet
            options["store"] = dist.HashStore()
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=rank, world_size=world_size, **options)
    return Ranks(rank, world_size, local_rank, device, how)


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, returned as a new tensor. No gradient."""
    y = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(y)
    return y


def all_gather_rows(x: Tensor) -> Tensor:
    """Concatenate (n, …) of every rank, in rank order, to (world·n, …); n must be equal on all ranks. No gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """All-gather whose gradient is summed over ranks. (PyTorch's own differentiable collectives are being renamed from
    release to release, and gloo has no reduce-scatter.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        if grad.is_cuda:
            own = grad.new_empty((ctx.rows, *grad.shape[1:]))
            dist.reduce_scatter_tensor(own, grad)
            return own
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_rows_with_grad(x: Tensor) -> Tensor:
    """As :func:`all_gather_rows`; the gradient of each rank's rows is summed over the ranks that used them."""
    return x if world_size() == 1 else _GatherRows.apply(x)


def pad_rows(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """(n, …) → (rows, …) filled up with ``value``, so that ranks with fewer rows can take part in a gather."""
    missing = rows - x.shape[0]
    assert missing >= 0, (x.shape, rows)
    return x if missing == 0 else torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
