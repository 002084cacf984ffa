"""Length of a run from a budget of training FLOPs. The number of steps is computed before the first one, so that the schedules
of learning rate and momentum end with the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from jepa_scale.data.sampling.batches import DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.utils.errors import InputError

SAMPLES = 512
"""Least number of samples to measure for each kind of step."""
MOST_SAMPLES = 16_384
"""Most samples to measure for each kind of step; their views are made in a few seconds."""
PRECISE = 0.0025
"""Standard error of the mean cost, as a share of the mean, at which measuring stops."""
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
) -> int:
    """Return the number of optimizer steps whose cost over all ranks is closest to the budget; at least 1.

    The batches of the run's first steps are made and their FLOPs counted, until the mean cost is precise enough. Later steps
    count with the mean. The result is the same on every rank, because it does not depend on the calling rank.

    Args:
        budget: FLOPs of all ranks. ranks: the loader of every rank (:func:`whole_steps`).
        flops: FLOPs of one rank's micro-batches of a step. kind: step → its kind; each kind has a mean of its own.

    Raises:
        InputError: the budget is more than ``MOST_STEPS`` steps, or a sample is damaged.
    """
    means: dict[Hashable, _Mean] = {}
    total = 0.0
    for step in range(MOST_STEPS):
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
