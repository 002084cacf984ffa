"""Plan a run from a config and a number of ranks: the memory of a rank and the time of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jepa_scale.config.schema import TrainConfig
from jepa_scale.experiment import Experiment
from jepa_scale.objectives.base import Objective
from jepa_scale.plan.communication import Traffic, of_objective, traffic_of
from jepa_scale.plan.hardware import GIB, RESERVED, Gpu
from jepa_scale.plan.layout import Layout, layout_of
from jepa_scale.plan.model import Modelled, model_on_meta
from jepa_scale.plan.roofline import Estimate, estimate
from jepa_scale.plan.simulate import Simulated, fake_ranks, simulate
from jepa_scale.plan.synthetic import StandIn, micro_batch, on_meta, synthetic_data
from jepa_scale.utils.errors import InputError

SLOW_LINKS, LATENCY = 0.5, 20e-6
"""What a plan's sensitivity supposes: a fraction of the links' bandwidth, and seconds for each collective."""


@dataclass(frozen=True, slots=True)
class Request:
    """The settings of a plan beside the config; ``None`` = the config's value.

    Attributes:
        tokens: of a whole run, to compute its days. efficiency: share of the roofline that operators reach.
        gpu: ``None`` = kernels as a CPU has them, no limit of memory and no times.
    """

    world_size: int
    gpu: Gpu | None
    tp: int | None = None
    replicas: int | None = None
    checkpointing: str | None = None
    tokens: float | None = None
    vocab_size: int | None = None
    sample_tokens: int | None = None
    efficiency: float = 1.0
    search: bool = True


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The needs of one rank, the one with the highest memory use. Sizes are bytes.

    Attributes:
        parameters: of the whole model. micro_tokens: of the config's micro-batch; micro_samples: samples in it.
        start: lower bound while the engine is built, when it takes the weights one parameter at a time.
        usable: of the GPU's memory. largest: tokens of the largest micro-batch that fits; 0 = not even one sample, ``None`` =
            not searched for. largest_samples: samples in it.
        step_tokens: of an optimizer step, all ranks together. flops: of a micro-batch on its tp ranks together.
        slower: seconds of a step with links of ``SLOW_LINKS`` of their bandwidth (``links``), and with ``LATENCY`` for each collective
            (``latency``).
    """

    layout: Layout
    parameters: int
    teacher_parameters: int
    micro_tokens: int
    micro_samples: int
    accumulation: int
    memory: Simulated
    start: int
    usable: int | None
    largest: int | None
    largest_samples: int | None
    traffic: list[Traffic]
    step_tokens: int
    flops: int
    time: Estimate | None
    slower: dict[str, float] = field(default_factory=dict)
    tokens: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fits_step(self) -> bool:
        return self.usable is None or self.memory.peak <= self.usable

    @property
    def fits_start(self) -> bool:
        return self.usable is None or self.start <= self.usable

    @property
    def fits(self) -> bool:
        return self.fits_step and self.fits_start

    @property
    def tokens_per_day(self) -> float | None:
        return None if self.time is None else self.step_tokens / self.time.seconds * 86_400

    @property
    def days(self) -> float | None:
        """Days of training on ``tokens``."""
        per_day = self.tokens_per_day
        return None if per_day is None or self.tokens is None else self.tokens / per_day


def make_plan(experiment: Experiment, request: Request) -> RunPlan:
    """Plan a run; takes seconds, whatever its number of ranks.

    Raises:
        InputError: the ranks don't fit the layout or the batch, or a size is not known.
    """
    layout = layout_of(experiment.engine, request.world_size, request.tp, request.replicas, request.checkpointing)
    with fake_ranks(layout.data_ranks):
        data = synthetic_data(experiment, request.vocab_size, request.sample_tokens)
        model = model_on_meta(experiment, data, layout)
        tokens, samples, accumulation = _batch(experiment.train, model, data, layout)
        batch = micro_batch(model.objective, data, tokens, samples)
        flops = model.flops([batch] * accumulation)
        traffic = traffic_of(model, layout, accumulation, batch.num_tokens)
        sizes = model.parameters
        copied = 0 if model.teacher is None else sum(p.numel() for p in model.teacher.parameters())
        memory = simulate(model, layout, on_meta(batch), accumulation, gpu=request.gpu is not None)
        traffic += of_objective(memory.collectives, layout, accumulation)
        usable = None if request.gpu is None else int(request.gpu.memory * (1 - RESERVED) * GIB)
        largest = largest_samples = None
        if usable is not None and request.search:

            def peak(tokens: int, samples: int) -> int:
                trial = model_on_meta(experiment, data, layout)
                batch = on_meta(micro_batch(trial.objective, data, tokens, samples))
                return simulate(trial, layout, batch, accumulation, gpu=True).peak

            largest, largest_samples = _largest(peak, model.objective, data, bool(tokens), usable)
    time = None
    slower = {}
    if request.gpu is not None:
        updated = sum(s.numel for s in sizes.values() if s.trains)
        parts = layout.shards if layout.stage > 0 else 1
        bound = partial(
            estimate,
            memory.ops,
            accumulation,
            -(-updated // parts),
            -(-copied // parts),
            traffic,
            flops / layout.tp,
            request.gpu,
            layout,
            experiment.engine.tf32,
            request.efficiency,
        )
        time = bound()
        slower = {"links": bound(links=SLOW_LINKS).seconds, "latency": bound(latency=LATENCY).seconds}
    return RunPlan(
        layout,
        model.whole,
        model.taught,
        batch.num_tokens,
        batch.counts["samples"],
        accumulation,
        memory,
        _start(layout, memory.state, model),
        usable,
        largest,
        largest_samples,
        traffic,
        batch.num_tokens * accumulation * layout.data_ranks,
        flops // accumulation,
        time,
        slower,
        request.tokens,
        _notes(layout, data, experiment),
    )


def _batch(train: TrainConfig, model: Modelled, data: Any, layout: Layout) -> tuple[int, int, int]:
    """Return the tokens, or else the samples, of a micro-batch, and the micro-batches per rank and step."""
    if train.batch_tokens:
        accumulation, rest = divmod(train.batch_tokens, train.micro_tokens * layout.data_ranks)
        if rest or not accumulation:
            raise InputError(
                f"train.batch_tokens: {train.batch_tokens} is no multiple of train.micro_tokens={train.micro_tokens} on each of "
                f"{layout.data_ranks} data ranks; make it one of {train.micro_tokens * layout.data_ranks}"
            )
        return train.micro_tokens, 0, accumulation
    return 0, max(1, -(-train.batch_size // (train.accumulation * layout.data_ranks))), train.accumulation


def _start(layout: Layout, state: Mapping[str, int], model: Modelled) -> int:
    """Return the bytes needed while an engine is built.

    Each parameter comes whole from rank 0, a trained one in fp32 under FSDP2 and all else in the compute dtype, in addition to
    the state that stays. Then a step with zero gradients creates the moments. The teacher is built later.
    """
    trained = sum(s.numel for s in model.parameters.values() if s.trains)
    own = trained // (layout.shards if layout.stage > 0 else 1)
    built = sum(size for kind, size in state.items() if kind != "teacher") + 4 * own
    if layout.engine == "deepspeed" and layout.stage == 0 and layout.width != 4:
        built += layout.width * trained
    one = layout.width * model.largest
    if layout.engine == "fsdp":
        one = max(one, 4 * model.largest_trained)
    return max(state["parameters"] + one, built)


# -------------------------------------------------------------------------------------------- the largest micro-batch


def _largest(
    peak: Callable[[int, int], int], objective: Objective, data: Any, by_tokens: bool, usable: int
) -> tuple[int, int]:
    """Return tokens and samples of the largest micro-batch of whole samples whose peak is within ``usable``.

    Args:
        peak: tokens, or else samples, of a micro-batch → bytes.
    """
    if by_tokens:
        each = int(objective.view_tokens(np.array([data.train.max_size]))[0])
        best = largest_within(lambda samples: peak(each * samples, 0), usable, 1 << 16)
        return best * each, best
    best = largest_within(lambda samples: peak(0, samples), usable, 1 << 16)
    return micro_batch(objective, data, samples=best).num_tokens if best else 0, best


def largest_within(peak: Callable[[int], int], usable: int, limit: int) -> int:
    """Find the largest n ≤ ``limit`` with peak(n) ≤ ``usable``, 0 if there is none, for a peak that grows with n.

    Peaks are nearly linear in n, so interpolation between the ends of the remaining interval beats bisection.
    """
    low, low_peak = 1, peak(1)
    if low_peak > usable:
        return 0
    high, high_peak = 2, peak(2)
    while high_peak <= usable:
        if high >= limit:
            return limit
        slope = max(1.0, (high_peak - low_peak) / (high - low))
        ahead = int((usable - high_peak) / slope)
        low, low_peak = high, high_peak
        high = min(limit, low + max(1, ahead + 1))
        high_peak = peak(high)
    while high - low > 1:
        guess = low + int((usable - low_peak) * (high - low) / (high_peak - low_peak))
        guess = min(high - 1, max(low + 1, guess))
        found = peak(guess)
        if found <= usable:
            low, low_peak = guess, found
        else:
            high, high_peak = guess, found
    return low


def _notes(layout: Layout, data: Any, experiment: Experiment) -> list[str]:
    notes = []
    if isinstance(data, StandIn):
        notes.append(
            f"no data are read: every sample has {data.train.size:,} tokens, of a vocabulary of {data.vocab_size:,}"
        )
    if experiment.engine.name == "auto":
        notes.append("engine.name: auto is planned as fsdp; --set engine.name=deepspeed for ZeRO")
    if layout.compile:
        notes.append("engine.compile: a compiled block keeps and moves less than is planned here")
    methods = [experiment.optim.method, *(override.method for override in experiment.optim.overrides.values())]
    if "muon" in methods:
        notes.append("optim.method: what Muon gathers to orthogonalise is not counted")
    return notes
