"""A run's length as a budget of training FLOPs: how many steps it is, known before the first one, so that learning rate and
momentum schedules end where the run does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from jepa_scale.data.sampling.batches import Dealt, SampleStream, TokenStream
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.utils.errors import InputError

SAMPLES = 512
"""Whose views are made at least, of each kind of step."""
MOST_SAMPLES = 16_384
"""Whose views are made at most: some seconds."""
PRECISE = 0.0025
"""Standard error of the mean cost, as a share of it, that is small enough to stop at."""
MOST_STEPS = 10_000_000


@dataclass(slots=True)
class _Mean:
    """Of what a step costs a rank: running mean and sum of squared deviations (Welford 1962)."""

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
    """The loader as every rank has it, each in the calling process."""
    assert isinstance(loader.stream, SampleStream | TokenStream)
    loaders = []
    for rank in range(world_size):
        stream = copy.copy(loader.stream)
        stream.dealt = Dealt(stream.accumulation, rank, world_size)
        loaders.append(replace(loader, stream=stream, workers=0))
    return loaders


def steps_within(
    budget: float,
    ranks: Sequence[Loader],
    flops: StepFlops,
    kind: Callable[[int], Hashable] = lambda step: 0,
) -> int:
    """The number of optimizer steps whose cost, over all ranks, comes closest to the budget; at least 1.

    The run's first steps are made as the run will make them, and counted, until the mean cost is known; later ones are taken
    to cost that. The same on every rank, as nothing depends on who asks.

    Args:
        ranks: the loader of every rank (:func:`whole_steps`).
        kind: of a step; each kind has a mean of its own.

    Raises:
        InputError: more steps than anyone means, or a damaged sample.
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
                batches = [loader.micro_batch(step, micro) for micro in range(loader.stream.accumulation)]
                of_rank = flops(batches)
                mean.add(of_rank, sum(batch.counts["samples"] for batch in batches))
                cost += of_rank
        if total + cost >= budget:
            return max(1, step + (total + cost - budget <= budget - total))
        total += cost
    raise InputError(f"train.flops: {budget:.3g} is more than {MOST_STEPS:,} steps of this model take; give less")
