"""The plan of a conversion: the tensors of each file. It is a pure function of checkpoint and model, so a restart makes the
same plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from jepa_scale.convert.merge import Shapes, Source
from jepa_scale.convert.skeleton import PREFIX
from jepa_scale.convert.tensor_file import Entry

MODEL = "model/"
"""Prefix of the model's tensors in a checkpoint; the others are the optimizer's."""
HEADS_FILE = "jepa_heads.safetensors"


@dataclass(frozen=True, slots=True)
class Unit:
    """One tensor of the model, and the tensors of a file that are made of it.

    Attributes:
        source: name in the checkpoint that the tensor has without adapters. nbytes: bytes to read for it.
        name: name in the model that is written; empty if ``foreign``.
        entries: tensors of the file. Most often there is one. transformers stores the experts of a mixture in one tensor in
            memory, but separately in files.
        made_of: tensors of the checkpoint to merge; None = the tensor ``source``, unchanged.
        transposed: whether the layer stores the tensor as (inputs, outputs).
        foreign: whether the tensor belongs to an objective or an adapter and not to the plain model; it is written unchanged.
    """

    source: str
    nbytes: int
    entries: tuple[Entry, ...]
    name: str = ""
    made_of: Source | None = None
    transposed: bool = False
    foreign: bool = False

    @property
    def reads(self) -> list[str]:
        """Names in the checkpoint of all tensors that are read."""
        return [self.source] if self.made_of is None else self.made_of.reads

    def take(self, read: dict[str, Tensor]) -> Tensor:
        """Return the model's tensor. The tensors used are removed from ``read``."""
        return read.pop(self.source) if self.made_of is None else self.made_of.make(read, self.transposed)

    @property
    def out_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Units of each file.

    Attributes:
        files: name → its units, in the order of the file.
        heads: units of the objective's own tensors, for :data:`HEADS_FILE`; empty if there are none or none are exported.
    """

    files: Mapping[str, Sequence[Unit]]
    heads: Sequence[Unit]

    @property
    def out_bytes(self) -> int:
        return sum(unit.out_bytes for units in self.all_files().values() for unit in units)

    @property
    def parameters(self) -> int:
        return sum(math.prod(e.shape) for units in self.files.values() for unit in units for e in unit.entries)

    def all_files(self) -> dict[str, Sequence[Unit]]:
        return {**self.files, **({HEADS_FILE: self.heads} if self.heads else {})}

    def index(self) -> dict[str, object] | None:
        """Return the content of ``model.safetensors.index.json``, None if one file holds the model."""
        if len(self.files) == 1:
            return None
        where = {entry.name: file for file, units in self.files.items() for unit in units for entry in unit.entries}
        size = sum(unit.out_bytes for units in self.files.values() for unit in units)
        return {
            "metadata": {"total_parameters": self.parameters, "total_size": size},
            "weight_map": dict(sorted(where.items())),
        }


def make_plan(
    model: PreTrainedModel,
    sources: Mapping[str, Source],
    shapes: Shapes,
    dtype: torch.dtype,
    shard_bytes: int,
    heads: bool,
    prefix: str = PREFIX,
) -> ConversionPlan:
    """Distribute the checkpoint's tensors over files.

    Args:
        model: the model on the meta device; its state dict gives the order. prefix: of its tensors in the root module.
        sources: source of each of its tensors, by :data:`MODEL` and the name in the root module.
        shapes: shape and dtype of every tensor of the checkpoint.
        dtype: dtype of floating-point tensors in the files; the heads keep theirs.
        shard_bytes: largest number of tensor bytes in a file, except for a single larger tensor.
        heads: whether to export the objective's own tensors.
    """
    order = [name for name in model.state_dict() if MODEL + prefix + name in sources]
    units = []
    for name, outputs in _in_files(model, order).items():
        source = sources[MODEL + prefix + name]
        target = dtype if source.dtype.is_floating_point else source.dtype
        entries = tuple(Entry(out, shape, target) for out, shape in outputs.items())
        unit = Unit(MODEL + prefix + name, source.nbytes, entries, name)
        if source.reads != [unit.source]:
            transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            unit = replace(unit, made_of=source, transposed=transposed)
        units.append(unit)
    shards = [_aligned(shard) for shard in _split_into_files(units, shard_bytes)]
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return ConversionPlan(dict(zip(names, shards, strict=True)), heads_of(shapes) if heads else [])


def heads_of(shapes: Shapes) -> list[Unit]:
    """Return units of the objective's own tensors, unchanged."""
    own = [n for n in sorted(shapes) if n.startswith(MODEL) and not n.startswith(MODEL + PREFIX)]
    return _aligned([_head(name, *shapes[name]) for name in own])


def outputs_of(model: PreTrainedModel, unit: Unit, tensor: Tensor) -> Iterator[Tensor]:
    """Yield the file's tensors made of a unit's tensor, in the order of its entries."""
    if unit.foreign or [entry.name for entry in unit.entries] == [unit.name]:
        yield tensor
        return
    made = revert_weight_conversion(model, {unit.name: tensor})
    for entry in unit.entries:
        yield made.pop(entry.name)


def groups(units: Sequence[Unit], limit: int) -> Iterator[list[Unit]]:
    """Yield groups of consecutive units to read at once, each of at most ``limit`` bytes or of one unit."""
    group: list[Unit] = []
    for unit in units:
        if group and sum(u.nbytes for u in group) + unit.nbytes > limit:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _in_files(model: PreTrainedModel, order: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the names and shapes in files, as ``save_pretrained`` writes them, by name in memory."""
    state = model.state_dict()
    state = {name: state[name] for name in order}
    alone = {name: {name: tuple(tensor.shape)} for name, tensor in state.items()}
    together = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    if together.keys() == state.keys():
        return alone
    made = {
        name: {n: tuple(t.shape) for n, t in sorted(revert_weight_conversion(model, {name: tensor}).items())}
        for name, tensor in state.items()
    }
    if {n: shape for outputs in made.values() for n, shape in outputs.items()} == together:
        return made
    return alone  # several tensors would become one, but transformers also loads the names in memory


def _head(name: str, size: torch.Size, dtype: torch.dtype) -> Unit:
    entry = Entry(name.removeprefix(MODEL), tuple(size), dtype)
    return Unit(name, entry.nbytes, (entry,), foreign=True)


def _split_into_files(units: list[Unit], limit: int) -> list[list[Unit]]:
    """Distribute units over files of at most ``limit`` bytes. A unit whose tensors do not fit into one file is part of several,
    and is read again for each."""
    shards: list[list[Unit]] = [[]]
    used = 0
    for unit in units:
        for entry in unit.entries:
            if used and used + entry.nbytes > limit:
                shards.append([])
                used = 0
            used += entry.nbytes
            last = shards[-1][-1] if shards[-1] else None
            if last is not None and last.source == unit.source:
                shards[-1][-1] = replace(last, entries=(*last.entries, entry))
            else:
                shards[-1].append(replace(unit, entries=(entry,)))
    return shards


def _aligned(units: list[Unit]) -> list[Unit]:
    """Sort units so that wider dtypes come first, which keeps tensors aligned."""
    return sorted(units, key=lambda unit: -unit.entries[0].dtype.itemsize)
