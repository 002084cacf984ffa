"""Length of a run, in steps or from a budget of training FLOPs. The number of steps is computed before the first one, so that the
schedules of learning rate and momentum end with the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from jepa_scale.checkpoint import Manifest
from jepa_scale.data.sampling.batches import BatchSampler, DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.experiment import Experiment
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.utils.errors import InputError

SAMPLES = 512
"""Least number of samples to measure for each kind of step."""
MOST_SAMPLES = 16_384
"""Most samples to measure for each kind of step; their views are made in a few seconds."""
PRECISE = 0.0025
"""Standard error of the mean cost, as a share of the mean, at which measuring stops."""
PRICE = ("flops", "batch_size", "batch_tokens", "micro_tokens")
"""Keys of ``train:`` on which the number of steps within a budget depends."""
MOST_STEPS = 10_000_000
"""Most steps of a run; a larger budget is refused."""


@dataclass(slots=True)
class _Mean:
    """Running mean of a step's FLOPs on one rank, and sum of squared deviations (Welford 1962)."""

    count: int = 0
    samples: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, cost: float, samples: int) -> None:
        self.count += 1
        self.samples += samples
        before = cost - self.mean
        self.mean += before / self.count
        self.squares += before * (cost - self.mean)

    @property
    def known(self) -> bool:
        if self.samples < SAMPLES or self.count < 4:
            return self.samples >= MOST_SAMPLES
        error = math.sqrt(self.squares / (self.count - 1) / self.count)
        return error <= PRECISE * self.mean or self.samples >= MOST_SAMPLES


def whole_steps(loader: Loader, world_size: int) -> list[Loader]:
    """Return the loader of every rank, each working in the calling process."""
    assert isinstance(loader.sampler, SampleBatchSampler | TokenBatchSampler)
    loaders = []
    for rank in range(world_size):
        sampler = copy.copy(loader.sampler)
        sampler.dp_slice = DataParallelSlice(sampler.accumulation, rank, world_size)
        loaders.append(replace(loader, sampler=sampler, workers=0))
    return loaders


def steps_within(
    budget: float,
    ranks: Sequence[Loader],
    flops: StepFlops,
    kind: Callable[[int], Hashable] = lambda step: 0,
    start: int = 0,
) -> int:
    """Return the step at which a run from step ``start`` on has cost, over all ranks, what is closest to the budget.

    A run that begins has at least one step; one whose budget is spent has no further step. The batches of the first steps are
    made and their FLOPs counted, until the mean cost is precise enough. Later steps count with the mean. The result is the same
    on every rank, because it does not depend on the calling rank.

    Args:
        budget: FLOPs of all ranks. ranks: the loader of every rank (:func:`whole_steps`).
        flops: FLOPs of one rank's micro-batches of a step. kind: step → its kind; each kind has a mean of its own.
        start: the first step that the budget is for.

    Raises:
        InputError: the budget is more than ``MOST_STEPS`` steps, or a sample is damaged.
    """
    means: dict[Hashable, _Mean] = {}
    total = 0.0
    for step in range(start, start + MOST_STEPS):
        mean = means.setdefault(kind(step), _Mean())
        if mean.known:
            cost = mean.mean * len(ranks)
        else:
            cost = 0.0
            for loader in ranks:
                batches = [loader.micro_batch(step, micro) for micro in range(loader.sampler.accumulation)]
                of_rank = flops(batches)
                mean.add(of_rank, sum(batch.counts["samples"] for batch in batches))
                cost += of_rank
        if total + cost >= budget:
            return max(1, step + (total + cost - budget <= budget - total))
        total += cost
    raise InputError(f"train.flops: {budget:.3g} is more than {MOST_STEPS:,} steps of this model take; lower it")


def paid_steps(resumed: Manifest, experiment: Experiment, sampler: BatchSampler) -> int:
    """Return the steps that ``train.flops`` paid for when a checkpoint's run began.

    0 if there is no budget, or if it or the cost of a step may have changed since.
    """
    then, now = resumed.config, experiment.resolved()
    same = all(then.get("train", {}).get(key) == now["train"][key] for key in PRICE)
    same = same and all(then.get(section) == now[section] for section in ("model", "objective"))
    same = same and resumed.state["data"]["fingerprint"] == sampler.fingerprint
    return int(resumed.state.get("steps", 0)) if experiment.train.flops and same else 0


def steps_of_run(
    experiment: Experiment,
    loader: Loader,
    flops: StepFlops,
    kind: Callable[[int], Hashable],
    start: int,
    resumed: Manifest | None,
    dp_size: int,
) -> int:
    """Return the number of steps of a run: ``train.steps`` or fewer if the data end, or those that ``train.flops`` pay for.

    Args:
        loader: of this rank. start: the first step that is left. resumed: manifest of the checkpoint that the run goes on from.
        flops, kind: see :func:`steps_within`.
    """
    train, sampler = experiment.train, loader.sampler
    if resumed and (paid := paid_steps(resumed, experiment, sampler)):
        return paid
    if not train.flops:
        return min(n for n in (train.steps, sampler.steps) if n)
    budget = train.flops - (resumed.state.get("flops", 0) if resumed else 0)
    return steps_within(budget, whole_steps(loader, dp_size), flops, kind, start)
