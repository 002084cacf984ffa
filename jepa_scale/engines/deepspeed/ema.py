"""Frozen copies of parts of a DeepSpeed engine's model: whole under ZeRO 0, 1 and 2, partitioned under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.distributed.comm import ParallelContext, all_gather_object, dp_group, dp_rank, dp_size
from jepa_scale.engines.base import ShardedEMA, persistent_buffers
from jepa_scale.engines.deepspeed import internals
from jepa_scale.engines.deepspeed.internals import shard, true_shape
from jepa_scale.engines.deepspeed.state import StateView
from jepa_scale.engines.deepspeed.topology import topology_of
from jepa_scale.engines.weights import replace


class Share(NamedTuple):
    """The ``length`` elements of a flattened parameter, from ``start``, that rank ``owner`` averages."""

    owner: int
    start: int
    length: int


class OwnedRange(NamedTuple):
    """Elements [begin, end) of the flat copy, all of which rank ``owner`` averages."""

    owner: int
    begin: int
    end: int


class _DeepSpeedEMA(ShardedEMA):
    """Base of both copies.

    Attributes:
        _constant: name of a frozen parameter → the copy's, if every rank has it whole.
        _parts: name of a parameter → its shape, and offset and values of this rank's part.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._averages: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._constant: dict[str, nn.Parameter] = {}
        self._parts: dict[str, tuple[torch.Size, int, Tensor]] = {}

    @property
    def ema_parameters(self) -> list[Tensor]:
        return self._averages

    @property
    def sources(self) -> list[Tensor]:
        return self._sources

    def sharded_state(self) -> dict[str, ShardView]:
        views = {name: ShardView.whole(buffer) for name, buffer in persistent_buffers(self.module)}
        views |= {name: ShardView.whole(parameter.detach()) for name, parameter in self._constant.items()}
        return views | {name: ShardView.of_range(*part) for name, part in self._parts.items()}


class ReplicatedEMA(_DeepSpeedEMA):
    """A copy that every rank has whole, in the compute dtype; each rank averages the elements whose masters it has.

    All averaged parameters are views into one flat tensor, in the order of the student's parameters in DeepSpeed's flat
    groups. So the elements of a rank form a few long ranges of it, which the ranks broadcast in place, without extra memory.

    * In fp32 those ranges are the EMA parameters themselves; in bf16 a rank has its own elements a second time, in fp32.
    * Under stage 0 every rank has all masters. In fp32 each rank averages all elements and nothing is sent; in bf16 the
      averaging is split evenly over the ranks.

    Args:
        module: the copy, without data.
        view: state of the engine.
        dtype, device: compute dtype and device of the copy.
    """

    def __init__(self, module: nn.Module, view: StateView, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(module)
        students = _students(module, view)
        parameters = dict(module.named_parameters())
        averaged = {name: parameter for name, parameter in parameters.items() if students[name] in view.pieces}
        self._constant = {name: parameter for name, parameter in parameters.items() if name not in averaged}
        for name, parameter in self._constant.items():
            replace(parameter, students[name].detach().clone())
        self._aliases = (
            dtype == torch.float32 and device == view.device
        )  # if not, the copy is bf16, or masters and averages are in host memory
        self._sends = dp_size() > 1 and (view.stage > 0 or dtype != torch.float32)
        shares = _shares(averaged, students, view, alone=not self._sends)

        self._flat = torch.empty(sum(p.numel() for p in averaged.values()), dtype=dtype, device=device)
        offsets = {}
        at = 0
        for name in shares:
            parameter = averaged[name]
            offsets[name], at = at, at + parameter.numel()
            replace(parameter, self._flat[offsets[name] : at].view(parameter.shape))
        self._ranges = list(owned_ranges(shares, offsets))
        self._mine = {
            owned: self._slice(owned) if self._aliases else self._slice(owned).to(view.device, torch.float32)
            for owned in self._ranges
            if owned.owner == dp_rank()
        }

        for name, of_parameter in shares.items():
            start, average = 0, torch.empty(0, device=view.device)
            for share in of_parameter:
                if share.owner == dp_rank():
                    piece = view.pieces[students[name]]
                    assert piece is not None and piece.start <= share.start, name
                    begin = piece.at + share.start - piece.start
                    source = piece.master.detach().view(-1)[begin : begin + share.length]
                    start, average = share.start, self._average(offsets[name] + share.start, share.length)
                    self._averages.append(average)
                    self._sources.append(source)
            self._parts[name] = (averaged[name].shape, start, average)
        for average, source in zip(self._averages, self._sources, strict=True):
            average.copy_(source)
        self.refresh()

    def _slice(self, owned: OwnedRange) -> Tensor:
        return self._flat[owned.begin : owned.end]

    def _average(self, begin: int, length: int) -> Tensor:
        """Return this rank's averages of ``length`` elements of the flat copy, from ``begin``."""
        owned, mine = next((s, mine) for s, mine in self._mine.items() if s.begin <= begin < s.end)
        assert begin + length <= owned.end, (begin, length, owned)
        return mine[begin - owned.begin : begin - owned.begin + length]

    @torch.no_grad()
    def refresh(self) -> None:
        if not self._aliases:
            for owned, mine in self._mine.items():
                self._slice(owned).copy_(mine)
        if self._sends:
            works = [
                dist.broadcast(self._slice(s), group=dp_group(), group_src=s.owner, async_op=True) for s in self._ranges
            ]
            for work in works:
                work.wait()


class PartitionedEMA(_DeepSpeedEMA):
    """A copy in a second stage-3 engine, without an optimizer, whose hooks gather and free each module's parameters.

    It is partitioned like the student. In fp32 the partitions are the EMA parameters themselves; in bf16 a rank has its own
    elements a second time, in fp32.

    Args:
        module: the copy, without data.
        view: state of the engine.
        dtype: compute dtype of the copy.
        zero: ``zero_optimization`` of the engine's JSON.
        ranks: the ranks of the run.
    """

    def __init__(
        self, module: nn.Module, view: StateView, dtype: torch.dtype, zero: Mapping[str, Any], ranks: ParallelContext
    ) -> None:
        import deepspeed

        students = _students(module, view)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # required, but without effect here
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
            "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {
                **{key: zero[key] for key in _SHARED if key in zero},
                "stage": 3,
                "overlap_comm": False,  # a separate CUDA stream would gather without waiting for the end of an update
                # parameters that stay gathered would miss the next update
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
        }
        super().__init__(module)
        topology = topology_of(ranks)

        def fill(name: str, parameter: nn.Parameter) -> None:
            replace(parameter, torch.zeros(parameter.shape, dtype=dtype, device=ranks.device))

        internals.partition(module, fill, config, topology)
        self._ds, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False, mpu=topology)
        self._ds.eval()

        self._computed: list[Tensor] = []
        for name, parameter in module.named_parameters():
            student: Any = students[name]
            start, count = shard(parameter)
            assert shard(student) == (start, count), f"{name} is partitioned differently from the student's"
            value = internals.local_part(parameter)
            if student not in view.pieces:
                value.copy_(internals.local_part(student))
            elif piece := view.pieces[student]:
                assert (piece.start, piece.length) == (start, count), name
                self._computed.append(value)
                value = value.to(view.device, torch.float32)  # in fp32 the same memory, unless masters are on the host
                self._averages.append(value)
                self._sources.append(piece.master.detach()[piece.at : piece.at + count])
                value.copy_(self._sources[-1])
            else:
                value = torch.empty(0, device=view.device)
            self._parts[name] = (true_shape(parameter), start, value)
        self._copies = any(a is not b for a, b in zip(self._computed, self._averages, strict=True))
        self.refresh()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._ds(*args, **kwargs)
        internals.release_gathered(self._ds.optimizer)
        return output

    @torch.no_grad()
    def refresh(self) -> None:
        if self._copies:
            torch._foreach_copy_(self._computed, self._averages)


_SHARED = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
"""Keys of ``zero_optimization`` that a copy takes over from the engine. Others are left out because they would make a copy use
outdated weights (secondary partitions) or rounded ones (quantization of frozen weights)."""


def _students(module: nn.Module, view: StateView) -> dict[str, nn.Parameter]:
    """Return the engine's parameters with the names of the copy's."""
    there = dict(view.module.named_parameters(remove_duplicate=False))
    students = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assert name in there and true_shape(there[name]) == parameter.shape, f"{name} is no parameter of the model"
        students[name] = there[name]
    return students


def _shares(
    averaged: Mapping[str, nn.Parameter], students: Mapping[str, nn.Parameter], view: StateView, alone: bool
) -> dict[str, list[Share]]:
    """Return the shares of each parameter, in the order of its elements; parameters are in the order of the flat groups.

    Args:
        alone: whether this rank averages all elements.
    """
    if alone:
        return {name: [Share(dp_rank(), 0, parameter.numel())] for name, parameter in averaged.items()}
    if view.stage == 0:
        sizes = {name: parameter.numel() for name, parameter in averaged.items()}
        return even_shares(sizes, dp_size())
    masters = [id(tensor) for group in view.optimizer.param_groups for tensor in group["params"]]
    mine = {
        name: (masters.index(id(piece.master)), piece.at, piece.start, piece.length)
        for name in averaged
        if (piece := view.pieces[students[name]])
    }
    tables = all_gather_object(mine)
    positions: dict[str, tuple[int, int, int]] = {}
    shares: dict[str, list[Share]] = {name: [] for name in averaged}
    for owner, table in enumerate(tables):
        for name, (group, at, start, length) in table.items():
            shares[name].append(Share(owner, start, length))
            positions[name] = min(positions.get(name, (group, owner, at)), (group, owner, at))
    order = sorted(shares, key=lambda name: positions.get(name, (-1, 0, 0)))  # one without elements has no position
    return {name: sorted(shares[name], key=lambda share: share.start) for name in order}


def even_shares(sizes: Mapping[str, int], world_size: int) -> dict[str, list[Share]]:
    """Cut the concatenation of parameters into equal parts, one for each rank. ``sizes``: name → number of elements."""
    each = max(1, -(-sum(sizes.values()) // world_size))
    shares: dict[str, list[Share]] = {}
    at = 0
    for name, size in sizes.items():
        cuts = [at, *range((at // each + 1) * each, at + size, each), at + size]
        shares[name] = [Share(a // each, a - at, b - a) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
        at += size
    return shares


def owned_ranges(shares: Mapping[str, list[Share]], offsets: Mapping[str, int]) -> Iterator[OwnedRange]:
    """Yield the shares as ranges of the flat copy, with adjacent shares of one rank merged."""
    last = OwnedRange(-1, 0, 0)
    for name, of_parameter in shares.items():
        for share in of_parameter:
            begin = offsets[name] + share.start
            assert begin == last.end, f"no rank averages some elements before {begin}, of {name}"
            if share.owner != last.owner:
                if last.owner >= 0:
                    yield last
                last = OwnedRange(share.owner, begin, begin)
            last = last._replace(end=begin + share.length)
    if last.owner >= 0:
        yield last
