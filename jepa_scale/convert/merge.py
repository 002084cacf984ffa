"""Merge of a run's tensors into those of the plain model: adapters are added to their layers' weights, new rows are appended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jepa_scale.models.lora import ADAPTER, BASE_OF, NEW_OF
from jepa_scale.models.options import LoraOptions
from jepa_scale.utils.errors import InputError

Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
A, B = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors of the checkpoint that one tensor of the plain model is made of.

    Attributes:
        base: name in the checkpoint of the tensor without adapter and new rows.
        shape, dtype: shape and dtype of the result; fp32 where an adapter is added.
        nbytes: size of all tensors that are read.
        new: name of the rows appended to ``base``, empty if there are none.
        adapter: names of A, (r, inputs), and B, (outputs, r); empty if there are none.
        scale: factor of B·A.
    """

    base: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    new: str = ""
    adapter: tuple[str, ...] = ()
    scale: float = 0.0

    @property
    def reads(self) -> list[str]:
        """Names in the checkpoint of all tensors that are read."""
        return [name for name in (self.base, self.new, *self.adapter) if name]

    def make(self, read: dict[str, Tensor], transposed: bool) -> Tensor:
        """Return the plain model's tensor. The tensors used are removed from ``read``, and ``base``'s memory is reused.

        Args:
            read: tensors of the checkpoint by name.
            transposed: whether the layer stores its weight as (inputs, outputs), as GPT-2's layers do.
        """
        tensor = read.pop(self.base)
        if self.new:
            tensor = torch.cat([tensor.to(self.dtype), read.pop(self.new).to(self.dtype)])
        if self.adapter:
            a, b = (read.pop(name).float() for name in self.adapter)
            tensor = tensor.float()
            (tensor.t() if transposed else tensor).addmm_(b, a, alpha=self.scale)
        return tensor


def plain_sources(shapes: Shapes, prefix: str, lora: LoraOptions | None) -> dict[str, Source]:
    """Return the source of each tensor of the plain model, by the tensor's name there.

    Args:
        shapes: shape and dtype of each tensor of the checkpoint. prefix: prefix of the names to use; others are left out.

    Raises:
        InputError: only one of checkpoint and config has adapters, or their adapters differ.
    """
    names = {name for name in shapes if name.startswith(prefix)}
    adapted = any(A in name for name in names)
    if adapted != (lora is not None):
        raise InputError(
            "the checkpoint has LoRA adapters, config.yaml has no model.lora; use the config.yaml of the checkpoint's run"
            if adapted
            else "config.yaml has model.lora, the checkpoint has no adapters; use the config.yaml of the checkpoint's run"
        )
    found: dict[str, Source] = {}
    used: set[str] = set()
    for name in sorted(names):
        if lora is None or not (name.endswith((A, B)) or NEW_OF in name):
            source = _source(name, shapes, lora)
            found[name if lora is None else name.replace(BASE_OF, ".")] = source
            used.update(source.reads)
    if names - used:
        raise InputError(
            f"the checkpoint has {min(names - used)} without the tensors it belongs to; convert another checkpoint"
        )
    return found


def _source(name: str, shapes: Shapes, lora: LoraOptions | None) -> Source:
    size, dtype = shapes[name]
    nbytes = math.prod(size) * dtype.itemsize
    owner, is_layer, leaf = name.rpartition(BASE_OF)
    if lora is None or not is_layer:
        return Source(name, size, dtype, nbytes)
    new = f"{owner}{NEW_OF}{leaf}"
    if new in shapes and shapes[new][0][1:] == size[1:]:
        rows, its = shapes[new]
        wide = torch.promote_types(dtype, its)
        nbytes += math.prod(rows) * its.itemsize
        return Source(name, torch.Size([size[0] + rows[0], *size[1:]]), wide, nbytes, new)
    pair = (owner + A, owner + B)
    if leaf != "weight" or pair[0] not in shapes or pair[1] not in shapes:
        return Source(name, size, dtype, nbytes)
    (rank, inputs), (outputs, its_rank) = (shapes[n][0] for n in pair)
    if rank != lora.rank or its_rank != rank:
        raise InputError(f"the checkpoint's {pair[0]} has rank {rank}, model.lora.rank in config.yaml is {lora.rank}")
    if sorted(size) != sorted((inputs, outputs)):
        raise InputError(f"the checkpoint's {pair[0]} is of another matrix than {name}, which has shape {tuple(size)}")
    nbytes += sum(math.prod(shapes[n][0]) * shapes[n][1].itemsize for n in pair)
    return Source(name, size, torch.float32, nbytes, adapter=pair, scale=lora.scale)
