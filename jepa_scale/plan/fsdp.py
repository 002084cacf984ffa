"""Model of the memory of FSDP2 (:class:`jepa_scale.engines.fsdp.engine.FSDPEngine`) on a rank.

Parameters, gradients and moments are shards along the first dimension, of ⌈rows / shards⌉ rows: fp32 ones, but frozen parameters
in the compute dtype. The model is that of rank 0, which never has fewer than another rank. A unit (a block, or the root with the rest) is gathered for its forward and again
for its backward, in the compute dtype; that of the root stays from its forward to the end of the backward. As in
``torch.distributed.fsdp``:

* an all-gather fills one flat buffer, which is then copied into the parameters; a forward's buffer exists until the next copy;
* during the backward of a unit the preceding unit is prefetched;
* a unit's gradients are copied into one flat buffer of the reduction's dtype, which exists until the next reduction. A single
  rank keeps that buffer as its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import nn

from jepa_scale.plan.layout import Layout
from jepa_scale.plan.memory_tracker import MemoryTracker, Watch
from jepa_scale.plan.model import Sizes
from jepa_scale.plan.units import EngineModel, Unit, units_of

REDUCED = 4
"""Bytes of a gradient's element during the reduction, which is always in fp32."""


def shard_numel(shape: tuple[int, ...], shards: int) -> int:
    """Return the number of elements of rank 0's shard of a parameter; the buffers of all ranks have this size."""
    return -(-shape[0] // shards) * prod(shape[1:])


def stored_width(sizes: Sizes, layout: Layout) -> int:
    """Return the bytes of an element of a parameter's shard."""
    return 4 if sizes.trains else layout.width


class FsdpModel(EngineModel):
    """Model of the training engine."""

    def __init__(
        self,
        module: nn.Module,
        modules: list[nn.Module],
        parameters: Mapping[str, Sizes],
        layout: Layout,
        tracker: MemoryTracker,
        watch: Watch,
    ) -> None:
        self.layout, self.tracker, self.watch, self.parameters = layout, tracker, watch, parameters
        self.units = units_of(module, modules)
        self._gathering = Gathering(self.units, parameters, layout, tracker)
        self.root = self.units[-1]
        self._reducing = 0  # bytes of the last reduction's buffer
        self._order: list[Unit] = []  # order of this micro-batch's forwards
        self._reduced: set[str] = set()  # parameters that already have a gradient

    def _shard(self, name: str) -> int:
        return shard_numel(self.parameters[name].shape, self.layout.shards)

    def state(self) -> dict[str, int]:
        sizes = self.parameters
        return {
            "parameters": sum(self._shard(name) * stored_width(sizes[name], self.layout) for name in sizes),
            "optimizer": 4 * sum(self._shard(name) * sizes[name].moments for name in sizes),
        }

    def gradients(self) -> int:
        return 4 * sum(self._shard(name) for name, sizes in self.parameters.items() if sizes.trains)

    def pre_forward(self, unit: Unit) -> None:
        self._gathering.gather(unit, keeps_buffer=True)

    def post_forward(self, unit: Unit) -> None:
        self._order.append(unit)
        if unit is self.root:
            self._gathering.end_forward()
        else:
            self.release(unit)

    def pre_backward(self, unit: Unit) -> None:
        if unit in self._order:
            at = len(self._order) - 1 - self._order[::-1].index(unit)
            del self._order[at]
            self._gathering.gather(unit, keeps_buffer=False)
            if at > 0:
                self._gathering.prefetch(self._order[at - 1])

    def post_backward(self, unit: Unit) -> None:
        self.release(unit)
        names = [name for name, p in unit.parameters.items() if p.grad is not None]
        self.tracker.free("buffers", self._reducing)
        self._reducing = 0
        if not names:
            return
        shards = self.layout.shards
        own = REDUCED * sum(self._shard(name) for name in names)
        first = not all(name in self._reduced for name in names)
        alone = shards * self.layout.replicas == 1
        self._reducing = 0 if alone and first else own * shards
        self.tracker.add("buffers", self._reducing)
        for name in names:
            unit.parameters[name].grad = None
        if shards == 1 and not alone:  # replicas only: FSDP2 divides the gradients by 1, into a new tensor
            with self.tracker.temporary("buffers", own):
                self.tracker.add("gradients", own)
        elif not alone or first:
            self.tracker.add("gradients", own)
        self._reduced.update(names)
        if not first and not alone:
            self.tracker.free("gradients", own)  # added to the existing gradient, then freed

    def after_backward(self, last: bool) -> None:
        """Account for the end of a micro-batch; ``last``: whether it is the last of the step."""
        for unit in self.units:
            self.post_backward_if_due(unit)
        self._gathering.drop_prefetched()
        self.tracker.free("buffers", self._reducing)
        self._reducing = 0
        self._order.clear()

    def post_backward_if_due(self, unit: Unit) -> None:
        """End the backward of the root, or of a unit whose inputs needed no gradient, as the root's final callback does."""
        if unit.gathered or any(p.grad is not None for p in unit.parameters.values()):
            self.post_backward(unit)

    def step(self) -> None:
        missing = self.gradients() - self.tracker.live["gradients"]
        self.tracker.add("gradients", max(0, missing))  # zeros for parameters without a gradient
        self.tracker.free("gradients", self.tracker.live["gradients"])
        self._reduced = set()


class Gathering:
    """Model of the all-gathers of units."""

    def __init__(
        self, units: list[Unit], parameters: Mapping[str, Sizes], layout: Layout, tracker: MemoryTracker
    ) -> None:
        self.layout, self.tracker = layout, tracker
        self._kept = 0  # bytes of the last forward's buffer
        self._ahead: dict[Unit, int] = {}  # prefetched unit → bytes of its buffer
        self._cast: dict[Unit, int] = {}  # unit → bytes of the cast of its fp32 shards
        for unit in units:
            own = {name: shard_numel(tuple(p.shape), layout.shards) for name, p in unit.parameters.items()}
            cast = sum(n for name, n in own.items() if stored_width(parameters[name], layout) != layout.width)
            unit.size = sum(own.values()) * layout.shards * layout.width
            self._cast[unit] = cast * layout.width

    def gather(self, unit: Unit, keeps_buffer: bool) -> None:
        if unit.gathered:
            return
        unit.gathered = True
        if self.layout.shards == 1:
            self.tracker.add("buffers", unit.size)
            return
        buffer = self._ahead.pop(unit, 0)
        if not buffer:
            buffer = self._start(unit)
        if keeps_buffer:
            self.tracker.free("buffers", self._kept)
            self._kept = buffer
        self.tracker.add("buffers", unit.size)
        if not keeps_buffer:
            self.tracker.free("buffers", buffer)

    def _start(self, unit: Unit) -> int:
        cast = self._cast[unit]  # temporary
        self.tracker.add("buffers", cast)
        self.tracker.add("buffers", unit.size)
        self.tracker.free("buffers", cast)
        return unit.size

    def end_forward(self) -> None:
        self.tracker.free("buffers", self._kept)
        self._kept = 0

    def prefetch(self, unit: Unit) -> None:
        if not unit.gathered and unit not in self._ahead and self.layout.shards > 1:
            self._ahead[unit] = self._start(unit)

    def drop_prefetched(self) -> None:
        for buffer in self._ahead.values():
            self.tracker.free("buffers", buffer)
        self._ahead.clear()


class FsdpEmaModel(EngineModel):
    """Model of the teacher's copy (:class:`jepa_scale.engines.fsdp.ema.FSDPEMA`): shards like the engine's, gathered alike."""

    def __init__(
        self,
        module: nn.Module,
        modules: list[nn.Module],
        parameters: Mapping[str, Sizes],
        layout: Layout,
        tracker: MemoryTracker,
    ) -> None:
        self.layout, self.tracker, self.module, self.parameters = layout, tracker, module, parameters
        self.units = units_of(module, modules)
        self._gathering = Gathering(self.units, parameters, layout, tracker)

    def state(self) -> dict[str, int]:
        own = {name: shard_numel(tuple(p.shape), self.layout.shards) for name, p in self.module.named_parameters()}
        return {"teacher": sum(n * stored_width(self.parameters[name], self.layout) for name, n in own.items())}

    def pre_forward(self, unit: Unit) -> None:
        self._gathering.gather(unit, keeps_buffer=True)

    def post_forward(self, unit: Unit) -> None:
        self.release(unit)
        if unit is self.units[-1]:
            self._gathering.end_forward()
