"""A tracker of the bytes allocated on a rank, by kind, and of their peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

KINDS = ("parameters", "gradients", "optimizer", "teacher", "activations", "buffers")
"""Kinds of memory. ``activations``: tensors that a forward or backward creates, temporaries included, logits excluded.
``buffers``: gathered parameters, communication buckets, logits. If logits are computed in pieces, a piece is an activation."""


class MemoryTracker:
    """Bytes by kind: the current ones, those at the peak of their sum, and the maximum of each kind."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.live.values())

    def add(self, kind: str, size: int) -> None:
        assert kind in KINDS, kind
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        if size > 0 and self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def free(self, kind: str, size: int) -> None:
        self.add(kind, -size)
        assert self.live[kind] >= 0, f"more {kind} freed than there were"

    @contextmanager
    def temporary(self, kind: str, size: int) -> Iterator[None]:
        """Account for memory that is allocated for the duration of a ``with`` block."""
        self.add(kind, size)
        yield
        self.free(kind, size)


class OpCost:
    """FLOPs of an operator, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them, and bytes that it reads and
    writes."""

    __slots__ = ("bytes", "flops")

    def __init__(self, flops: int, moved: int) -> None:
        self.flops, self.bytes = flops, moved


class Collective(NamedTuple):
    """A collective of the fake process group: ``"all-gather"``, ``"reduce-scatter"`` or ``"all-reduce"``, and the bytes of the whole tensors."""

    kind: str
    size: int


class Watch(TorchDispatchMode):
    """Dispatch mode that enters every new storage into a tracker for its lifetime, and records the cost of each operator and the
    collectives.

    It works on tensors without data. Storages that existed before are ignored.

    Args:
        vocab: last dimension of logits; 0 = no tensor counts as logits.
    """

    def __init__(self, tracker: MemoryTracker, vocab: int = 0) -> None:
        super().__init__()
        self.tracker, self.vocab = tracker, vocab
        self.ops: list[OpCost] = []
        self.collectives: list[Collective] = []
        self._kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage → its kind, in a list of one; [] = ignored
        self._ends: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in read:
            self._kinds.setdefault(tensor.untyped_storage(), [])  # it existed before: parameters, the batch
        if func.namespace == "c10d" and (kind := _KINDS.get(func._overloadpacket.__name__)):
            self.collectives.append(Collective(*kind(args)))
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in made:
            self._see(tensor)
        if not _is_free(func):
            formula = flop_registry.get(func._overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
            self.ops.append(OpCost(flops, sum(_bytes(x) for x in [*read, *made])))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._kinds or tensor.device.type != "meta":
            return
        logits = self.vocab and tensor.dim() > 1 and tensor.shape[-1] == self.vocab
        box = ["buffers" if logits else "activations"]
        size = storage.nbytes()
        self._kinds[storage] = box
        self.tracker.add(box[0], size)
        self._ends.append(weakref.finalize(storage, self._end, box, size))

    def _end(self, box: list[str], size: int) -> None:
        self.tracker.free(box[0], size)

    def become(self, tensor: Tensor, kind: str) -> None:
        """Change the kind of a storage that was entered as an activation."""
        storage = tensor.untyped_storage()
        box = self._kinds.get(storage)
        if box and box[0] != kind:
            self.tracker.free(box[0], storage.nbytes())
            self.tracker.add(kind, storage.nbytes())
            box[0] = kind

    def close(self) -> None:
        """Stop tracking the storages that still exist."""
        for end in self._ends:
            end.detach()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_free(func: Any) -> bool:
    """Return whether an operator moves no bytes: it returns a view or uninitialised memory."""
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return view or func._overloadpacket in _EMPTY


def _whole(args: Any) -> int:
    return sum(_bytes(x) for x in tree_leaves(args[0]) if isinstance(x, Tensor))


_KINDS = {  # the first argument of an all-gather are the gathered tensors, of a reduce-scatter this rank's part
    "allgather_": lambda args: ("all-gather", _whole(args)),
    "_allgather_base_": lambda args: ("all-gather", _whole(args)),
    "allreduce_": lambda args: ("all-reduce", _whole(args)),
    "_reduce_scatter_base_": lambda args: ("reduce-scatter", _whole(args[1:])),
}

_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten.empty_strided,
    torch.ops.aten.detach,
}
