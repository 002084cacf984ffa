"""Paired comparison of two arms over the same seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Literal

import numpy as np

from jepa_scale.data.sampling.rng import generator

Verdict = Literal["better", "same", "worse", "too few seeds"]
FEWEST = 3
"""Fewest seeds for a verdict. With 3 seeds two equal arms get one by chance in a quarter of all cases, with 5 in about 6 %."""
EXACT = 9
"""Most seeds for which every resample is counted; with more, ``DRAWS`` of them are drawn."""
DRAWS = 20_000
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of an arm to another over ``seeds`` seeds, with its bootstrap interval ``low`` to ``high``."""

    mean: float
    low: float
    high: float
    seeds: int

    def verdict(self, better: Literal["higher", "lower"]) -> Verdict:
        """Return whether the arm is better: the interval lies on that side of zero."""
        if self.seeds < FEWEST:
            return "too few seeds"
        low, high = (self.low, self.high) if better == "higher" else (-self.high, -self.low)
        return "better" if low > 0 else "worse" if high < 0 else "same"


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Return the difference ``values − others``, paired by seed.

    The interval is the percentile bootstrap's over seeds (Efron, Annals of Statistics 1979), of 95 %: the differences are drawn again
    with replacement, as many as there are. For few seeds every resample is counted by its probability. The bootstrap of few seeds is
    too narrow, so the number of seeds belongs beside it.

    Args:
        values, others: (n,), n ≥ 1, in the same order of seeds.
    """
    differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    means, chances = _resampled_means(differences)
    order = np.argsort(means, kind="stable")
    below = np.cumsum(chances[order])
    tail = (1 - COVERAGE) / 2
    low, high = (float(means[order[min(int(np.searchsorted(below, at)), len(means) - 1)]]) for at in (tail, 1 - tail))
    return Difference(float(differences.mean()), low, high, len(differences))


def _resampled_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of the resamples, (m,), and the probability of each, (m,)."""
    n = len(values)
    if n > EXACT:
        drawn = generator(f"bench/bootstrap/{n}").integers(0, n, (DRAWS, n))
        return values[drawn].mean(axis=1), np.full(DRAWS, 1 / DRAWS)
    choices = list(combinations_with_replacement(range(n), n))
    ways = [factorial(n) / prod(factorial(times) for times in Counter(choice).values()) for choice in choices]
    return values[np.array(choices)].mean(axis=1), np.array(ways) / n**n
