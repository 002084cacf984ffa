"""Bytes that a rank sends in an optimizer step, by collective.

In a ring of n ranks each rank sends (n − 1)/n of the whole tensor in an all-gather or a reduce-scatter, and twice as much in
an all-reduce (Patarasu & Yuan 2009, Bandwidth optimal all-reduce algorithms, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from jepa_scale.plan.fsdp import REDUCED, shard_numel
from jepa_scale.plan.layout import Layout
from jepa_scale.plan.memory_tracker import Collective
from jepa_scale.plan.model import Modelled
from jepa_scale.plan.units import units_of
from jepa_scale.plan.zero import module_units

OF_OBJECTIVE = "rows and moments of the objective"
"""``Traffic.what`` of what an objective itself sends."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """All collectives of one kind and purpose in a step.

    Attributes:
        kind: ``"all-gather"``, ``"reduce-scatter"`` or ``"all-reduce"``.
        what: description of the tensors that are sent.
        ranks: number of ranks that take part.
        span: number of neighbouring ranks over which these are spread.
        size: bytes of the whole tensors, summed over the step.
        overlaps: whether computation continues meanwhile.
        calls: number of collectives.
    """

    kind: str
    what: str
    ranks: int
    span: int
    size: int
    overlaps: bool
    calls: int = 1

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.size * (self.ranks - 1) // self.ranks


def traffic_of(model: Modelled, layout: Layout, accumulation: int, tokens: int) -> list[Traffic]:
    """Return the traffic of a step of ``accumulation`` micro-batches of ``tokens`` tokens each.

    ``model`` has not been changed by an engine yet.
    """
    data = _fsdp(model, layout, accumulation) if layout.engine == "fsdp" else _zero(model, layout, accumulation)
    if layout.tp > 1:
        data += _tensor_parallel(model, layout, accumulation, tokens)
    return [traffic for traffic in data if traffic.ranks > 1 and traffic.size > 0]


def of_objective(collectives: Sequence[Collective], layout: Layout, accumulation: int) -> list[Traffic]:
    """Return what the objective itself sends in a step: gathered rows, moments, and their gradients.

    Args:
        collectives: those of one micro-batch, as :func:`jepa_scale.plan.simulate.simulate` has recorded them.
    """
    if layout.data_ranks == 1:
        return []
    found = []
    for kind in dict.fromkeys(c.kind for c in collectives):
        sizes = [c.size for c in collectives if c.kind == kind]
        ranks, calls = (layout.data_ranks, layout.world_size), accumulation * len(sizes)
        found.append(Traffic(kind, OF_OBJECTIVE, *ranks, accumulation * sum(sizes), False, calls))
    return found


def _passes(model: Modelled, accumulation: int) -> int:
    """Return the number of forwards of a step, gather passes included."""
    return accumulation * (2 if model.objective.needs_global_batch and accumulation > 1 else 1)


def _padded(parameters: Iterable[nn.Parameter], layout: Layout) -> int:
    """Return the number of elements of parameters, padding included."""
    return layout.shards * sum(shard_numel(tuple(p.shape), layout.shards) for p in parameters)


def _fsdp(model: Modelled, layout: Layout, accumulation: int) -> list[Traffic]:
    shards, span = layout.shards, layout.shards * layout.tp
    units = units_of(model.module, model.shard)
    *blocks, root = (_padded(unit.parameters.values(), layout) for unit in units)
    forwards = _passes(model, accumulation)
    gathered = layout.width * (sum(blocks) * (forwards + accumulation) + root * forwards)
    gathers = len(blocks) * (forwards + accumulation) + forwards
    reductions = accumulation * sum(any(p.requires_grad for p in unit.parameters.values()) for unit in units)
    trained = _padded((p for unit in units for p in unit.parameters.values() if p.requires_grad), layout)
    found = [
        Traffic("all-gather", "parameters", shards, span, gathered, True, gathers),
        Traffic("reduce-scatter", "gradients", shards, span, REDUCED * trained * accumulation, True, reductions),
        Traffic(
            "all-reduce", "gradients of replicas", layout.replicas, layout.world_size,
            REDUCED * trained // shards * accumulation, True, reductions,
        ),
    ]  # fmt: skip
    if model.teacher is not None:
        copied = _padded(model.teacher.parameters(), layout)
        size, calls = layout.width * copied * forwards, (len(model.teacher_shard) + 1) * forwards
        found.append(Traffic("all-gather", "teacher", shards, span, size, True, calls))
    return found


def _zero(model: Modelled, layout: Layout, accumulation: int) -> list[Traffic]:
    """Return the traffic of ZeRO, whose reductions the engine sets to fp32.

    Stages 1 and 2 all-reduce whole buckets, of which each rank keeps its part (``use_multi_rank_bucket_allreduce``).
    """
    ranks, span = layout.shards, layout.world_size
    total = sum(s.numel for s in model.parameters.values())
    trained = sum(s.numel for s in model.parameters.values() if s.trains)
    copied = 0 if model.teacher is None else sum(p.numel() for p in model.teacher.parameters())
    forwards = _passes(model, accumulation)
    bucket = 4 * int(layout.zero.get("reduce_bucket_size", 500_000_000))
    if layout.stage == 3:
        threshold = int(layout.zero.get("stage3_param_persistence_threshold", 100_000))
        units = module_units(model.module, threshold)
        gathered = layout.width * sum(p.numel() for unit in units for p in unit.parameters.values())
        reuse = int(layout.zero.get("stage3_max_reuse_distance", 1_000_000_000))
        again = max(0, gathered - layout.width * reuse // 2)  # parameters that are soon reused are not gathered again
        gathers = len(units) * (forwards + accumulation * (again > 0))
        copies = 0 if model.teacher is None else len(module_units(model.teacher, 0)) * forwards
        reduced = 4 * trained * accumulation
        return [
            Traffic("all-gather", "parameters", ranks, span, gathered * forwards + again * accumulation, True, gathers),
            Traffic(
                "reduce-scatter", "gradients", ranks, span, reduced, True, accumulation * -(-4 * trained // bucket)
            ),
            Traffic("all-gather", "teacher", ranks, span, layout.width * copied * forwards, True, copies),
        ]
    per_step = accumulation if layout.stage == 2 else 1
    overlaps = layout.stage == 2 or (layout.stage == 1 and layout.width == 4 and accumulation == 1)
    reductions = per_step * -(-4 * trained // bucket)
    found = [Traffic("all-reduce", "gradients", ranks, span, 4 * trained * per_step, overlaps, reductions)]
    if layout.stage > 0:
        found.append(Traffic("all-gather", "parameters after the step", ranks, span, layout.width * total, False))
    found.append(Traffic("all-gather", "teacher after the step", ranks, span, layout.width * copied, False))
    return found


def _tensor_parallel(model: Modelled, layout: Layout, accumulation: int, tokens: int) -> list[Traffic]:
    """Return the traffic of tensor parallelism.

    There are two exchanges of the residual stream for each block and direction (Korthikanti et al., arXiv 2205.05198, section
    4.2.2), and one each around embedding and LM head. An exchange is an all-gather and a reduce-scatter. Recomputation repeats
    its exchanges.
    """
    stream = layout.width * tokens * model.backbone.hidden_size
    again = 0 if layout.checkpointing == "none" else 1
    exchanges = model.backbone.num_layers * (4 + 2 * again) + 4
    size, calls = stream * exchanges * accumulation, exchanges * accumulation
    return [
        Traffic("all-gather", "activations (tp)", layout.tp, layout.tp, size, False, calls),
        Traffic("reduce-scatter", "activations (tp)", layout.tp, layout.tp, size, False, calls),
    ]
