"""Frozen copies beside a DeepSpeed engine: whole ones under ZeRO 0, 1 and 2, partitioned ones under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.checkpoint.boxes import Boxes
from jepa_scale.distributed.comm import Ranks, all_gather_object, data_group, data_rank, data_size
from jepa_scale.engines.base import ShardedCopy, persistent_buffers
from jepa_scale.engines.deepspeed import internals
from jepa_scale.engines.deepspeed.internals import shard, true_shape
from jepa_scale.engines.deepspeed.state import StateView
from jepa_scale.engines.deepspeed.topology import topology_of
from jepa_scale.engines.weights import replace


class Share(NamedTuple):
    """``owner`` averages ``length`` elements of a flattened parameter, from ``start``."""

    owner: int
    start: int
    length: int


class Stretch(NamedTuple):
    """Elements [begin, end) of the flat copy are all averaged by ``owner``."""

    owner: int
    begin: int
    end: int


class ReplicatedCopy(ShardedCopy):
    """Every rank has the copy whole, in the compute dtype; each averages the elements whose masters it has.

    All averaged parameters are views into one flat tensor, in the order of the student's in DeepSpeed's flat groups. So the
    elements of a rank are few long stretches of it, which the ranks broadcast in place: no memory is needed for that.

    * In fp32 those stretches are the averages; in bf16 a rank has its own elements a second time, in fp32.
    * Under stage 0 every rank has all masters: in fp32 each of them averages everything and nothing is sent; in bf16 they
      share the averages evenly.

    Args:
        module: the copy, without numbers. view: of the engine. dtype, device: that it computes in and on.
    """

    def __init__(self, module: nn.Module, view: StateView, dtype: torch.dtype, device: torch.device) -> None:
        self.module = module
        students = _students(module, view)
        parameters = dict(module.named_parameters())
        averaged = {name: parameter for name, parameter in parameters.items() if students[name] in view.pieces}
        self._frozen = {name: parameter for name, parameter in parameters.items() if name not in averaged}
        for name, parameter in self._frozen.items():
            replace(parameter, students[name].detach().clone())
        self._aliases = (
            dtype == torch.float32 and device == view.device
        )  # else masters are in host memory, and averages too
        self._sends = data_size() > 1 and (view.stage > 0 or dtype != torch.float32)
        shares = _shares(averaged, students, view, alone=not self._sends)

        self._flat = torch.empty(sum(p.numel() for p in averaged.values()), dtype=dtype, device=device)
        offsets = {}
        at = 0
        for name in shares:
            parameter = averaged[name]
            offsets[name], at = at, at + parameter.numel()
            replace(parameter, self._flat[offsets[name] : at].view(parameter.shape))
        self._stretches = list(stretches(shares, offsets))
        self._mine = {
            stretch: self._slice(stretch) if self._aliases else self._slice(stretch).to(view.device, torch.float32)
            for stretch in self._stretches
            if stretch.owner == data_rank()
        }

        self._parts: dict[str, tuple[torch.Size, int, Tensor]] = {}  # shape, and what this rank averages, from where
        self._averages: list[Tensor] = []
        self._sources: list[Tensor] = []
        for name, of_parameter in shares.items():
            start, average = 0, torch.empty(0, device=view.device)
            for share in of_parameter:
                if share.owner == data_rank():
                    piece = view.pieces[students[name]]
                    assert piece is not None and piece.start <= share.start, name
                    begin = piece.at + share.start - piece.start
                    source = piece.stepped.detach().view(-1)[begin : begin + share.length]
                    start, average = share.start, self._average(offsets[name] + share.start, share.length)
                    self._averages.append(average)
                    self._sources.append(source)
            self._parts[name] = (averaged[name].shape, start, average)
        for average, source in zip(self._averages, self._sources, strict=True):
            average.copy_(source)
        self.refresh()

    def _slice(self, stretch: Stretch) -> Tensor:
        return self._flat[stretch.begin : stretch.end]

    def _average(self, begin: int, length: int) -> Tensor:
        """What this rank averages of the flat copy's elements from ``begin``."""
        stretch, mine = next((s, mine) for s, mine in self._mine.items() if s.begin <= begin < s.end)
        assert begin + length <= stretch.end, (begin, length, stretch)
        return mine[begin - stretch.begin : begin - stretch.begin + length]

    @property
    def averages(self) -> list[Tensor]:
        return self._averages

    @property
    def sources(self) -> list[Tensor]:
        return self._sources

    @torch.no_grad()
    def refresh(self) -> None:
        if not self._aliases:
            for stretch, mine in self._mine.items():
                self._slice(stretch).copy_(mine)
        if self._sends:
            works = [
                dist.broadcast(self._slice(s), group=data_group(), group_src=s.owner, async_op=True)
                for s in self._stretches
            ]
            for work in works:
                work.wait()

    def state(self) -> dict[str, Boxes]:
        boxes = {name: Boxes.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        boxes |= {name: Boxes.whole(parameter.detach()) for name, parameter in self._frozen.items()}
        return boxes | {name: Boxes.of_range(*part) for name, part in self._parts.items()}


class PartitionedCopy(ShardedCopy):
    """The copy is a second stage-3 engine, without an optimizer: its hooks gather and free each module's parameters.

    Its partitions lie as the student's do. In fp32 they are the averages; in bf16 a rank has its own elements a second
    time, in fp32.

    Args:
        module: the copy, without numbers. view: of the engine. dtype: that it computes in.
        zero: ``zero_optimization`` of the engine's JSON.
    """

    def __init__(
        self, module: nn.Module, view: StateView, dtype: torch.dtype, zero: Mapping[str, Any], ranks: Ranks
    ) -> None:
        import deepspeed

        students = _students(module, view)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # it insists on it
            "bf16": {"enabled": dtype == torch.bfloat16},
            "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {
                **{key: zero[key] for key in _SHARED if key in zero},
                "stage": 3,
                "overlap_comm": False,  # a stream of its own would gather without waiting for an update to be done
                # nothing may stay gathered: it would not see the next update
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
        }
        self.module = module
        topology = topology_of(ranks)

        def fill(name: str, parameter: nn.Parameter) -> None:
            replace(parameter, torch.zeros(parameter.shape, dtype=dtype, device=ranks.device))

        internals.partition(module, fill, config, topology)
        self._ds, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False, mpu=topology)
        self._ds.eval()

        self._shards: dict[str, tuple[torch.Size, int, Tensor]] = {}  # shape, and what state() shows, from where
        self._averages: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._computed: list[Tensor] = []
        for name, parameter in module.named_parameters():
            student: Any = students[name]
            start, count = shard(parameter)
            assert shard(student) == (start, count), f"{name} is partitioned in another way than the student's"
            value = internals.local_part(parameter)
            if student not in view.pieces:
                value.copy_(internals.local_part(student))
            elif piece := view.pieces[student]:
                assert (piece.start, piece.length) == (start, count), name
                self._computed.append(value)
                value = value.to(view.device, torch.float32)  # in fp32 the same memory, unless masters are the host's
                self._averages.append(value)
                self._sources.append(piece.stepped.detach()[piece.at : piece.at + count])
                value.copy_(self._sources[-1])
            else:
                value = torch.empty(0, device=view.device)
            self._shards[name] = (true_shape(parameter), start, value)
        self._copies = any(a is not b for a, b in zip(self._computed, self._averages, strict=True))
        self.refresh()

    @property
    def averages(self) -> list[Tensor]:
        return self._averages

    @property
    def sources(self) -> list[Tensor]:
        return self._sources

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._ds(*args, **kwargs)
        internals.release_gathered(self._ds.optimizer)
        return output

    @torch.no_grad()
    def refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._computed, self._averages)

    def state(self) -> dict[str, Boxes]:
        boxes = {name: Boxes.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        return boxes | {name: Boxes.of_range(*part) for name, part in self._shards.items()}


_SHARED = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
"""Keys of ``zero_optimization`` that a copy has from the engine. Not among them is whatever would leave a copy's weights as
they are once gathered (secondary partitions) or round them (quantization of frozen weights)."""


def _students(module: nn.Module, view: StateView) -> dict[str, nn.Parameter]:
    """The engine's parameter of each name that the copy has."""
    there = dict(view.module.named_parameters(remove_duplicate=False))
    students = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert name in there and true_shape(there[name]) == parameter.shape, f"{name} is no parameter of the model"
        students[name] = there[name]
    return students


def _shares(
    averaged: Mapping[str, nn.Parameter], students: Mapping[str, nn.Parameter], view: StateView, alone: bool
) -> dict[str, list[Share]]:
    """Who averages which elements of each parameter, in their order; the parameters in that of the student's flat groups.

    Args:
        alone: this rank averages everything.
    """
    if alone:
        return {name: [Share(data_rank(), 0, parameter.numel())] for name, parameter in averaged.items()}
    if view.stage == 0:
        sizes = {name: parameter.numel() for name, parameter in averaged.items()}
        return even_shares(sizes, data_size())
    stepped = [id(tensor) for group in view.optimizer.param_groups for tensor in group["params"]]
    mine = {
        name: (stepped.index(id(piece.stepped)), piece.at, piece.start, piece.length)
        for name in averaged
        if (piece := view.pieces[students[name]])
    }
    tables = all_gather_object(mine)
    places: dict[str, tuple[int, int, int]] = {}
    shares: dict[str, list[Share]] = {name: [] for name in averaged}
    for owner, table in enumerate(tables):
        for name, (group, at, start, length) in table.items():
            shares[name].append(Share(owner, start, length))
            places[name] = min(places.get(name, (group, owner, at)), (group, owner, at))
    order = sorted(shares, key=lambda name: places.get(name, (-1, 0, 0)))  # one without elements is nowhere
    return {name: sorted(shares[name], key=lambda share: share.start) for name in order}


def even_shares(sizes: Mapping[str, int], world_size: int) -> dict[str, list[Share]]:
    """Cut the concatenation of parameters into equal parts, one a rank. ``sizes``: name → elements."""
    each = max(1, -(-sum(sizes.values()) // world_size))
    shares: dict[str, list[Share]] = {}
    at = 0
    for name, size in sizes.items():
        cuts = [at, *range((at // each + 1) * each, at + size, each), at + size]
        shares[name] = [Share(a // each, a - at, b - a) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
        at += size
    return shares


def stretches(shares: Mapping[str, list[Share]], offsets: Mapping[str, int]) -> Iterator[Stretch]:
    """The shares in the flat copy, those of one rank that lie side by side as one."""
    last = Stretch(-1, 0, 0)
    for name, of_parameter in shares.items():
        for share in of_parameter:
            begin = offsets[name] + share.start
            assert begin == last.end, f"nobody averages some elements before {begin}, of {name}"
            if share.owner != last.owner:
                if last.owner >= 0:
                    yield last
                last = Stretch(share.owner, begin, begin)
            last = last._replace(end=begin + share.length)
    if last.owner >= 0:
        yield last
