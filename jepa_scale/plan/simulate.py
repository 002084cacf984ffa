"""Simulation of one optimizer step without data: the objective's own code on the ``meta`` device, with a modelled engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from jepa_scale.engines.ema import Teacher, momentum_at
from jepa_scale.models.decoder import JepaDecoderForCausalLM
from jepa_scale.models.recompute import recompute
from jepa_scale.packing import PackedBatch
from jepa_scale.plan.experts import grouped_products
from jepa_scale.plan.fsdp import FsdpEmaModel, FsdpModel
from jepa_scale.plan.layout import Layout
from jepa_scale.plan.memory_tracker import Collective, MemoryTracker, OpCost, Watch
from jepa_scale.plan.model import Modelled, fuse_norms
from jepa_scale.plan.units import EngineModel
from jepa_scale.plan.zero import Zero3Model, ZeroEmaModel, ZeroModel
from jepa_scale.utils.errors import InputError, one_line


@dataclass(frozen=True, slots=True)
class Simulated:
    """Memory and operators of a simulated step.

    Attributes:
        state: kind → bytes between steps.
        peak: most bytes at a time.
        at_peak: kind → bytes at the peak.
        most: kind → largest number of bytes of this kind at any time.
        ops: operators of one micro-batch, those of its gather pass and teacher included.
        collectives: those of the objective in one micro-batch and its gather pass.
    """

    state: dict[str, int]
    peak: int
    at_peak: dict[str, int]
    most: dict[str, int]
    ops: list[OpCost]
    collectives: list[Collective]


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Create a fake process group of ``count`` ranks, with this process as rank 0 and no others; nothing is sent."""
    assert not dist.is_initialized(), "a process group exists already"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(model: Modelled, layout: Layout, batch: PackedBatch, accumulation: int, gpu: bool) -> Simulated:
    """Simulate a step of ``accumulation`` micro-batches like ``batch`` (on ``meta``), on rank 0.

    Hooks stay in ``model``, which cannot be used again. Call this within :func:`fake_ranks`, with the number of data-parallel
    ranks.

    Args:
        gpu: whether the kernels are those of a GPU.

    Raises:
        InputError: a decoder of transformers needs values to run, or a kernel that the ``meta`` device does not have.
    """
    tracker = MemoryTracker()
    watch = Watch(tracker, model.logits_width)
    engine = _engine(model, layout, tracker, watch, accumulation)
    parts: list[EngineModel] = [engine]
    if model.teacher is not None:
        parts.append(_copy(model, layout, tracker))
    if gpu:
        for module in (model.module, model.teacher):
            if module is not None:
                fuse_norms(module)
    recompute(model.shard, layout.checkpointing)
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.module.buffers())
    copied = () if model.teacher is None else model.teacher.buffers()
    state = {
        "parameters": tables + model.coded,
        "teacher": sum(buffer.numel() * buffer.element_size() for buffer in copied),
    }
    for part in parts:
        for kind, size in part.state().items():
            state[kind] = state.get(kind, 0) + size
        part.attach()
    for kind, size in state.items():
        tracker.add(kind, size)
    if model.teacher is not None:
        model.objective.teacher = _Teacher(model)  # type: ignore[assignment]

    run: Any = model.module
    gathered: list[dict[str, Any]] = []
    with watch, grouped_products(), _named(model):
        if model.objective.needs_global_batch and accumulation > 1:
            with torch.no_grad():
                one = run("gather", batch)
            gathered = [one] * accumulation
            kept = sum(x.untyped_storage().nbytes() for x in tree_leaves(one) if isinstance(x, torch.Tensor))
            tracker.add("activations", kept * (accumulation - 1))
        collecting = list(watch.ops), list(watch.collectives)
        for micro in range(min(accumulation, 2)):  # two suffice: all after the first find existing gradients
            watch.ops, watch.collectives = list(collecting[0]), list(collecting[1])
            last = micro == min(accumulation, 2) - 1
            loss = run("loss", batch, gathered, micro)
            loss.total.backward()
            del loss
            engine.after_backward(last)
        engine.step()
    watch.close()
    return Simulated(state, tracker.peak, tracker.at_peak, dict(tracker.most), watch.ops, watch.collectives)


@contextmanager
def _named(model: Modelled) -> Iterator[None]:
    """Name the decoder of transformers whose code fails without values."""
    decoder = model.module.backbone.decoder
    try:
        yield
    except Exception as error:  # whatever a family's code raises on tensors that it was not made for
        if isinstance(error, InputError) or isinstance(decoder, JepaDecoderForCausalLM):
            raise
        raise InputError(
            f"model: {type(decoder).__name__} cannot be planned, as it does not run without data ({one_line(error)}); measure a small "
            "run of it instead"
        ) from error


def _engine(model: Modelled, layout: Layout, tracker: MemoryTracker, watch: Watch, accumulation: int) -> Any:
    if layout.engine == "fsdp":
        return FsdpModel(model.module, model.shard, model.parameters, layout, tracker, watch)
    kind = Zero3Model if layout.stage == 3 else ZeroModel
    return kind(model.module, model.parameters, layout, tracker, watch, accumulation)


def _copy(model: Modelled, layout: Layout, tracker: MemoryTracker) -> EngineModel:
    assert model.teacher is not None
    if layout.engine == "deepspeed":
        return ZeroEmaModel(model.teacher, model.parameters, layout, tracker)
    return FsdpEmaModel(model.teacher, model.teacher_shard, model.parameters, layout, tracker)


class _Teacher(Teacher):
    """A teacher that runs the copies and is never updated."""

    def __init__(self, model: Modelled) -> None:
        assert model.teacher is not None
        self.options = model.objective.teacher_options()
        self._model = model.teacher

    @torch.no_grad()
    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._model(path, *args, **kwargs)

    def momentum(self, step: int) -> float:
        return momentum_at(step, self.options, 1)
