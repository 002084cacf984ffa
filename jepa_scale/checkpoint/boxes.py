"""Pieces of sharded tensors as PyTorch's distributed checkpoint (DCP) knows them: boxes with an offset.

ZeRO cuts the flattened parameters anywhere, FSDP2 cuts rows, tensor parallelism columns. All of them are unions of
axis-parallel boxes, which DCP saves, finds again and cuts anew for whoever loads. So there is one checkpoint format,
a plain DCP checkpoint with a parameter's name and true shape, whatever engine and world size wrote it.
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


class Boxes:
    """What this rank has of one tensor; DCP writes it and reads into it.

    Attributes:
        shape: of the whole tensor. dtype: of its elements.
        parts: offset of each box in the whole, and the box's elements as a view into their owner's memory: loading
            writes through it. Ranks that have the same box hold the same elements; it is written once.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: list[tuple[tuple[int, ...], Tensor]]) -> None:
        self.shape, self.dtype, self.parts = torch.Size(shape), dtype, parts

    @classmethod
    def whole(cls, tensor: Tensor) -> Boxes:
        """All of a tensor."""
        return cls(tensor.shape, tensor.dtype, [((0,) * tensor.dim(), tensor)])

    @classmethod
    def of_range(cls, shape: Sequence[int], start: int, flat: Tensor) -> Boxes:
        """The elements [start, start + len(flat)) of the flattened tensor, in row-major order.

        Args:
            flat: (n,) contiguous; n may be 0.
        """
        assert flat.dim() == 1 and start + len(flat) <= math.prod(shape), (tuple(shape), start, len(flat))
        return cls(shape, flat.dtype, list(_boxes(tuple(shape), start, flat)))

    @classmethod
    def of_dtensor(cls, tensor: DTensor) -> Boxes:
        """The local shard of a DTensor."""
        local = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        assert tuple(sizes) == tuple(local.shape), (sizes, local.shape)
        return cls(tensor.shape, tensor.dtype, [(tuple(offsets), local)] if local.numel() else [])

    def within(self, dim: int, start: int, size: int) -> Boxes:
        """The same elements where this tensor is a part of a larger one: it has ``[start, …)`` of the ``size`` of ``dim``."""
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        parts = [((*at[:dim], at[dim] + start, *at[dim + 1 :]), box) for at, box in self.parts]
        return Boxes(shape, self.dtype, parts)

    def copy(self) -> Boxes:
        """The same elements in host memory of their own."""
        parts = [(offset, box.detach().to("cpu", copy=True)) for offset, box in self.parts]
        return Boxes(self.shape, self.dtype, parts)

    def size(self) -> torch.Size:
        return self.shape

    @property
    def nbytes(self) -> int:
        """Of this rank's boxes."""
        return sum(box.numel() * box.element_size() for _, box in self.parts)

    # -- torch.distributed._checkpointable._Checkpointable ------------------------------------------------------------

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=box.shape),
                    properties=TensorProperties.create_from_tensor(box),
                    size=self.shape,
                ),
            )
            for offset, box in self.parts
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(offset), sizes=box.shape) for offset, box in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for offset, box in self.parts:
            if torch.Size(offset) == index.offset:
                return box
        raise AssertionError(f"{index.fqn}: this rank has no box at {index.offset}")


class Stateful(Protocol):
    """Whatever a checkpoint keeps: the engine, a teacher, a queue. Parameters and persistent buffers of the root module are
    in the engine's state by themselves; what lives outside of it is handed to the saver and to ``load`` beside it."""

    def state(self) -> dict[str, Boxes]:
        """Name → this rank's part, as views that loading writes through. Names are unique among all parts, and every rank
        has every name."""

    def loaded(self, updates: int) -> None:
        """The views were written to; ``updates`` is the optimizer's count. Collective."""


def state_of(parts: Sequence[Stateful]) -> dict[str, Boxes]:
    """All parts' tensors."""
    state: dict[str, Boxes] = {}
    for part in parts:
        more = part.state()
        assert not state.keys() & more.keys(), sorted(state.keys() & more.keys())[:3]
        state |= more
    return state


def _boxes(shape: tuple[int, ...], start: int, flat: Tensor) -> Any:
    """Cut a range of a row-major tensor into boxes: the rest of a row, whole rows, the beginning of a row, and the same
    within those two rows; at most 2 · dimensions − 1 of them."""
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
        for offset, box in _boxes(shape[1:], skip, flat[:at]):
            yield (first, *offset), box.unsqueeze(0)
        first += 1
    rows = (len(flat) - at) // row
    if rows:
        yield (first,) + (0,) * (len(shape) - 1), flat[at : at + rows * row].view(rows, *shape[1:])
        at += rows * row
    for offset, box in _boxes(shape[1:], 0, flat[at:]):
        yield (first + rows, *offset), box.unsqueeze(0)
