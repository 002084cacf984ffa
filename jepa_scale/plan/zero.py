"""Model of the memory of DeepSpeed's ZeRO on a rank, as :class:`jepa_scale.engines.deepspeed.engine.DeepSpeedEngine` uses it.

Bytes for each parameter, with N ranks and a compute dtype of w bytes, after Rajbhandari et al. (arXiv 1910.02054), section 3,
and the behaviour of DeepSpeed 0.19 that goes beyond it (measured by ``benchmarks/plan.py``):

=====  ===============================================================================================================
stage  bytes for each parameter
=====  ===============================================================================================================
0      bf16: 2 + 4 masters + 8 moments, and gradients of w; fp32: 4 + 8 moments, and gradients of 4
1      bf16: 2 + 12/N, and whole gradients in fp32 from the start; fp32, fp16: as stage 2
2      w + 12/N; gradients pass through two buckets, and this rank's 4/N remain
3      w/N + 12/N + 4/N gradients from the start, and one fp32 bucket
=====  ===============================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from jepa_scale.plan.layout import Layout
from jepa_scale.plan.memory_tracker import MemoryTracker, Watch
from jepa_scale.plan.model import Sizes
from jepa_scale.plan.units import EngineModel, Unit

ALL_REDUCED = 500_000_000
"""Most elements in one of DeepSpeed's all-reduces in stages 0 and 1 (``MEMORY_OPT_ALLREDUCE_SIZE``)."""


class ZeroModel(EngineModel):
    """Model of ZeRO stages 0, 1 and 2, and base class of stage 3."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Sizes],
        layout: Layout,
        tracker: MemoryTracker,
        watch: Watch,
        accumulation: int,
    ) -> None:
        self.module, self.layout, self.tracker, self.watch = module, layout, tracker, watch
        self.parameters, self.accumulation = parameters, accumulation
        self.names = {p: name for name, p in module.named_parameters()}
        self.total = sum(s.numel for s in parameters.values())
        self.trained = sum(s.numel for s in parameters.values() if s.trains)
        self.bucket = int(layout.zero.get("reduce_bucket_size", 500_000_000))
        self._used = 0  # elements in the bucket
        self._waiting: set[int] = set()  # parameter groups of these elements
        self._kept: set[int] = set()  # groups that have memory for this rank's gradients
        self._held = 0  # bytes of the buckets

    # -- sizes ----------------------------------------------------------------------------------------------------

    def own(self, per_moment: bool = False, group: int | None = None) -> int:
        """Count the elements of the flat groups that this rank updates, or those of their moments; of one ``group`` or all."""
        count, total = self.layout.shards if self.layout.stage > 0 else 1, 0
        groups: dict[int, list[Sizes]] = {}
        for sizes in self.parameters.values():
            if sizes.trains and group in (None, sizes.group):
                groups.setdefault(sizes.group, []).append(sizes)
        for of_group in groups.values():
            numel = sum(sizes.numel for sizes in of_group)
            part = -(-numel // (2 * count)) * 2 if self.layout.stage > 0 else numel
            total += part * (of_group[0].moments if per_moment else 1)
        return total

    @property
    def half(self) -> bool:
        return self.layout.width != 4

    @property
    def whole_gradients(self) -> bool:
        """Whether whole fp32 gradients exist from the start, as in DeepSpeed's ``BF16_Optimizer``."""
        return self.layout.stage == 1 and self.layout.precision == "bf16"

    def state(self) -> dict[str, int]:
        masters = 4 * self.own() if self.half or self.layout.stage > 0 else 0
        return {
            "parameters": self.layout.width * self.total,
            "optimizer": masters + 4 * self.own(per_moment=True),
            "gradients": 4 * self.trained if self.whole_gradients else 0,
        }

    # -- a step ---------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._ready)

    @property
    def buckets(self) -> int:
        """Bytes of the gradient buckets of stages 1 (fp32) and 2."""
        zero = self.layout.zero
        overlaps = zero.get("overlap_comm", False) and not (self.layout.stage == 1 and self.accumulation > 1)
        return self.bucket * self.layout.width * (2 if overlaps else 1) * bool(zero.get("contiguous_gradients", True))

    @property
    def through_buckets(self) -> bool:
        return self.layout.stage == 2 or (self.layout.stage == 1 and not self.whole_gradients)

    def _ready(self, parameter: Any) -> None:
        """Account for a parameter's new gradient."""
        assert parameter.grad is not None
        if not self.through_buckets:
            self.watch.become(parameter.grad, "gradients")
            return
        if not self._held:  # with the first gradient of a micro-batch
            self._held = self.buckets
            self.tracker.add("buffers", self._held)
        numel = parameter.numel()
        if self._used + numel > self.bucket:
            self._flush()
        self._used += numel
        self._waiting.add(self.parameters[self.names[parameter]].group)
        if numel > self.bucket:  # not copied into the bucket, but reduced on its own
            self._flush()
        parameter.grad = None

    def _flush(self) -> None:
        """Account for the reduction of the bucket in fp32, of which this rank's part is kept."""
        if self.half:
            self.tracker.add("buffers", 4 * self._used)
            self.tracker.free("buffers", 4 * self._used)
        for group in self._waiting - self._kept:  # a group's first gradient allocates memory for the whole group
            self.tracker.add("gradients", 4 * self.own(group=group))
        self._kept |= self._waiting
        self._waiting = set()
        self._used = 0

    def after_backward(self, last: bool) -> None:
        """Account for the end of a micro-batch; ``last``: whether it is the last of the step."""
        if self.through_buckets:
            self._flush()
            self.tracker.free("buffers", self._held)
            self._held = 0
            return
        if last and self.layout.shards > 1:  # a flat copy, and an fp32 one if the gradients are not fp32
            together = min(self.trained, ALL_REDUCED)
            width = 4 if self.whole_gradients or not self.half else 6
            with self.tracker.temporary("buffers", together * width):
                pass

    def step(self) -> None:
        extra = 0
        if self.layout.stage == 0 and self.half:
            extra = 4 * self.trained  # fp32 copy of the gradients
        elif self.through_buckets and not self.half:
            extra = 4 * self.own()  # flat copy of the gradients
        with self.tracker.temporary("gradients", extra):
            pass
        for parameter in self.module.parameters():
            parameter.grad = None
        if self.through_buckets:
            self.tracker.free("gradients", self.tracker.live["gradients"])
            self._kept = set()


class Zero3Model(ZeroModel):
    """Model of stage 3: every module gathers its own parameters for its forward and for its backward.

    Parameters smaller than ``stage3_param_persistence_threshold`` stay whole. A parameter that is needed again within
    ``stage3_max_reuse_distance`` elements is not freed in between. ``stage3_prefetch_bucket_size`` elements are gathered ahead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        zero = self.layout.zero
        self.threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
        self.reuse = int(zero.get("stage3_max_reuse_distance", 1_000_000_000))
        self.ahead = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
        self.units = module_units(self.module, self.threshold)
        for unit in self.units:
            unit.size = sum(p.numel() for p in unit.parameters.values()) * self.layout.width
        self._after = self._distances()

    def _distances(self) -> dict[Unit, int]:
        """Count the elements that are used between each unit's forward and its backward, in module order."""
        after, found = 0, {}
        for unit in reversed(self.units):
            found[unit] = 2 * after
            after += unit.size // self.layout.width
        return found

    def part(self, numel: int) -> int:
        return -(-numel // self.layout.shards)

    def own(self, per_moment: bool = False, group: int | None = None) -> int:
        mine = [s for s in self.parameters.values() if s.trains and group in (None, s.group)]
        return sum(self.part(s.numel) * (s.moments if per_moment else 1) for s in mine)

    def state(self) -> dict[str, int]:
        small = sum(s.numel for s in self.parameters.values() if s.numel < self.threshold)
        gathered = sum(unit.size for unit in self.units)
        sharded = self.layout.shards > 1
        return {
            "parameters": self.layout.width * sum(self.part(s.numel) for s in self.parameters.values()),
            "optimizer": 4 * self.own() + 4 * self.own(per_moment=True),
            "gradients": 4 * self.own(),
            "buffers": 4 * self.bucket
            + self.layout.width * small * sharded
            + min(self.ahead * self.layout.width, gathered) * sharded,
        }

    def attach(self) -> None:
        super().attach()
        if self.layout.shards > 1:
            EngineModel.attach(self)

    def post_forward(self, unit: Unit) -> None:
        if self._after[unit] > self.reuse:
            self.release(unit)

    def _ready(self, parameter: Any) -> None:
        self.watch.become(parameter.grad, "gradients")
        numel = parameter.numel()
        if self._used + numel > self.bucket:
            self._flush()
        self._used += numel
        if numel > self.bucket:
            self.tracker.add("buffers", 4 * numel * (self.half + (self.layout.shards > 1)))
            self.tracker.free("buffers", 4 * numel * (self.half + (self.layout.shards > 1)))
            self._used = 0
        parameter.grad = None

    def _flush(self) -> None:
        """Account for the reduce-scatter of the bucket through a buffer of the same size."""
        if self.layout.shards > 1:
            self.tracker.add("buffers", 4 * self._used)
            self.tracker.free("buffers", 4 * self._used)
        self._used = 0

    def after_backward(self, last: bool) -> None:
        self._flush()
        for unit in self.units:
            self.release(unit)

    def step(self) -> None:
        together = min(int(self.layout.zero.get("sub_group_size", 1_000_000_000)), self.own())
        with self.tracker.temporary("gradients", 4 * together):
            pass


def module_units(root: nn.Module, threshold: int) -> list[Unit]:
    """Return one unit for each module that directly owns parameters of at least ``threshold`` elements."""
    names = {parameter: name for name, parameter in root.named_parameters()}
    units = []
    for module in root.modules():
        own = {names[p]: p for p in module.parameters(recurse=False) if p.numel() >= threshold}
        if own:
            units.append(Unit(module, own))
    return units


class ZeroEmaModel(EngineModel):
    """Model of the teacher's copy under ZeRO.

    In stages 0 to 2 it is whole in the compute dtype, with this rank's EMA parameters in fp32
    (:class:`jepa_scale.engines.deepspeed.ema.ReplicatedEMA`); in stage 3 it is partitioned. A rank averages the parameters
    whose masters it has. In stages 1 and 2 the masters are cut out of one flat tensor, so some ranks have more of the copy
    than others.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, Sizes], layout: Layout, tracker: MemoryTracker
    ) -> None:
        self.module, self.parameters, self.layout, self.tracker = module, parameters, layout, tracker
        self.units = module_units(module, 0) if layout.stage == 3 and layout.shards > 1 else []
        for unit in self.units:
            unit.size = sum(p.numel() for p in unit.parameters.values()) * layout.width

    def state(self) -> dict[str, int]:
        sizes = {name: p.numel() for name, p in self.module.named_parameters()}
        trained = {name: numel for name, numel in sizes.items() if self.parameters[name].trains}
        shards = self.layout.shards
        if self.layout.stage == 3:
            copied, averaged = (sum(-(-numel // shards) for numel in of.values()) for of in (sizes, trained))
        else:
            copied = sum(sizes.values())
            averaged = self._most() if self.layout.stage > 0 else -(-sum(trained.values()) // shards)
        averages = 4 * averaged if self.layout.width != 4 else 0  # in fp32 the copy itself holds the averages
        return {"teacher": self.layout.width * copied + averages}

    def _most(self) -> int:
        """Return the largest number, over the ranks, of elements of the copy whose masters a rank has."""
        copied = {name for name, _ in self.module.named_parameters()}
        of_ranks: Counter[int] = Counter()
        groups: dict[int, list[tuple[str, int]]] = {}
        for name, sizes in self.parameters.items():
            if sizes.trains:
                groups.setdefault(sizes.group, []).append((name, sizes.numel))
        for of_group in groups.values():
            part = -(-sum(numel for _, numel in of_group) // (2 * self.layout.shards)) * 2
            at = 0
            for name, numel in of_group:
                if name in copied:
                    for rank in range(at // part, (at + numel - 1) // part + 1):
                        of_ranks[rank] += min(at + numel, (rank + 1) * part) - max(at, rank * part)
                at += numel
        return max(of_ranks.values(), default=0)
