"""Shard views: a rank's part of a tensor as blocks with offsets, the form of PyTorch's distributed checkpoint (DCP).

ZeRO splits flattened parameters at any element, FSDP2 splits rows, tensor parallelism splits rows or columns. Each rank's
part is a union of rectangular blocks. DCP saves such blocks, and reshards them when a checkpoint is loaded. So there is one
checkpoint format for every engine and world size: a plain DCP checkpoint with each parameter's name and whole shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class ShardView:
    """Shard views of this rank in one tensor, which DCP writes and reads into.

    Attributes:
        shape: shape of the whole tensor. dtype: dtype of its elements.
        parts: for each shard, its offset in the whole tensor and a view of its elements in the owner's memory. Loading
            writes through the views. A shard that several ranks hold must be equal on all of them; it is written once.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self.shape, self.dtype, self.parts = torch.Size(shape), dtype, parts

    @classmethod
    def whole(cls, tensor: Tensor) -> ShardView:
        """One shard view of a whole tensor."""
        return cls(tensor.shape, tensor.dtype, [((0,) * tensor.dim(), tensor)])

    @classmethod
    def of_range(cls, shape: Sequence[int], start: int, flat: Tensor) -> ShardView:
        """Shard views of the elements [start, start + len(flat)) of the tensor flattened in row-major order.

        Args:
            flat: (n,) contiguous; n may be 0.
        """
        assert flat.dim() == 1 and start + len(flat) <= math.prod(shape), (tuple(shape), start, len(flat))
        return cls(shape, flat.dtype, list(_blocks(tuple(shape), start, flat)))

    @classmethod
    def of_dtensor(cls, tensor: DTensor) -> ShardView:
        """Shard view of the local shard of a DTensor."""
        local = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        assert tuple(sizes) == tuple(local.shape), (sizes, local.shape)
        return cls(tensor.shape, tensor.dtype, [(tuple(offsets), local)] if local.numel() else [])

    def within(self, dim: int, start: int, size: int) -> ShardView:
        """Return the same elements as a part of a larger tensor, from ``start`` in dimension ``dim`` of size ``size``."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        parts = [((*at[:dim], at[dim] + start, *at[dim + 1 :]), block) for at, block in self.parts]
        return ShardView(shape, self.dtype, parts)

    def copy(self) -> ShardView:
        """Return a copy in host memory."""
        parts = [(offset, block.detach().to("cpu", copy=True)) for offset, block in self.parts]
        return ShardView(self.shape, self.dtype, parts)

    def size(self) -> torch.Size:
        return self.shape

    @property
    def nbytes(self) -> int:
        """Size of this rank's shards in bytes."""
        return sum(block.numel() * block.element_size() for _, block in self.parts)

    # -- torch.distributed._checkpointable._Checkpointable ------------------------------------------------------------

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=block.shape),
                    properties=TensorProperties.create_from_tensor(block),
                    size=self.shape,
                ),
            )
            for offset, block in self.parts
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(offset), sizes=block.shape) for offset, block in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, block in self.parts:
            if torch.Size(offset) == index.offset:
                return block
        raise AssertionError(f"{index.fqn}: this rank has no shard at {index.offset}")


class Checkpointable(Protocol):
    """Object whose tensors a checkpoint keeps: the engine, a teacher, a queue.

    The engine's state contains all parameters and persistent buffers of the root module. Objects outside the root module
    are passed to the saver and to ``load`` beside the engine.
    """

    def sharded_state(self) -> dict[str, ShardView]:
        """Return name → shard views of this rank, which loading writes through.

        Names are unique among all objects, and every rank has every name.
        """

    def post_load(self, updates: int) -> None:
        """Finish loading after the views were written; ``updates`` is the optimizer's count. Collective."""


def state_of(parts: Sequence[Checkpointable]) -> dict[str, ShardView]:
    """Return the tensors of all objects together."""
    state: dict[str, ShardView] = {}
    for part in parts:
        more = part.sharded_state()
        assert not state.keys() & more.keys(), sorted(state.keys() & more.keys())[:3]
        state |= more
    return state


def _blocks(shape: tuple[int, ...], start: int, flat: Tensor) -> Any:
    """Split a range of a row-major tensor into rectangular blocks, and yield the offset and view of each.

    A range is the rest of a row, whole rows, and the beginning of a row; the two partial rows are split recursively. There
    are at most 2 · dimensions − 1 blocks.
    """
    if not len(flat):
        return
    if len(shape) <= 1:
        yield ((start,) if shape else ()), flat.view(-1 if shape else ())
        return
    row = math.prod(shape[1:])
    first, skip = divmod(start, row)
    at = 0
    if skip or len(flat) < row:
        at = min(row - skip, len(flat))
        for offset, block in _blocks(shape[1:], skip, flat[:at]):
            yield (first, *offset), block.unsqueeze(0)
        first += 1
    rows = (len(flat) - at) // row
    if rows:
        yield (first,) + (0,) * (len(shape) - 1), flat[at : at + rows * row].view(rows, *shape[1:])
        at += rows * row
    for offset, block in _blocks(shape[1:], 0, flat[at:]):
        yield (first + rows, *offset), block.unsqueeze(0)
