"""Orders of samples: pure functions of the seed and of a position in the endless concatenation of the epochs.

An order reads no data and has no state besides a cache, so any position can be computed at any time at the same cost. This
makes a run resumable at any sample: a rank, a worker or a restarted run only needs the position that the run has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

from jepa_scale.data.sampling.rng import generator
from jepa_scale.utils.errors import InputError


class Order(Protocol):
    """A map from positions to samples.

    Attributes:
        length: samples in an epoch; None if there are no epochs (a mixture).
    """

    @property
    def length(self) -> int | None: ...

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (count,) int64 epochs and (count,) int64 sample numbers at positions [start, start + count)."""


def _permutation(name: str, n: int) -> np.ndarray:
    return generator(name).permutation(np.arange(n, dtype=np.int64))


@lru_cache(maxsize=4)  # a batch may span two epochs; older ones are soon not needed
def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return this epoch's uniformly random permutation of 0 … n-1, (n,) int64, read-only."""
    permutation = _permutation(f"order/{seed}/{epoch}/{n}", n)
    permutation.setflags(write=False)
    return permutation


@dataclass(frozen=True, slots=True)
class Permuted:
    """An order by one permutation per epoch, held in memory; meant for data that are in memory too.

    Attributes:
        length: n, samples in an epoch.
        permutation: epoch → (n,) int64.
    """

    length: int
    permutation: Callable[[int], np.ndarray]

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, positions = np.divmod(np.arange(start, start + count, dtype=np.int64), self.length)
        samples = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1) if count else ():
            here = epochs == epoch
            samples[here] = self.permutation(epoch)[positions[here]]
        return epochs, samples


@dataclass(frozen=True)
class Windowed:
    """An order of shards in random order, with samples shuffled within windows.

    Each epoch concatenates the shards in its own random order, cuts the sequence of samples into windows and permutes
    each window. A window may span shards, so samples of neighbouring shards mix. Shards are read one after the other,
    which suits streaming. Memory holds the permutation of the shards and single windows (8 bytes a sample and shard),
    never a whole epoch.

    Attributes:
        lengths: (S,) int64 samples in each shard; samples are numbered through all shards in the shards' given order.
        seed: the run's seed.
        window: samples that are shuffled together; 1 = no shuffling within shards.
    """

    lengths: np.ndarray
    seed: int
    window: int
    _cache: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def length(self) -> int:
        return int(self.lengths.sum())

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        n = self.length
        epochs, positions = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
        samples = np.empty(count, dtype=np.int64)
        at = 0
        while at < count:  # window by window
            epoch, position = int(epochs[at]), int(positions[at])
            number = position // self.window
            begin = number * self.window
            stop = min(at + min(begin + self.window, n) - position, count)
            samples[at:stop] = self._window(epoch, number)[positions[at:stop] - begin]
            at = stop
        return epochs, samples

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """Return the sample numbers of a window, in shuffled order."""
        key = ("window", epoch, number)
        if key not in self._cache:
            begin = number * self.window
            size = min(self.window, self.length - begin)
            rows = begin + _permutation(f"window/{self.seed}/{epoch}/{number}", size)  # positions within the epoch
            shards = self._shards(epoch)
            ends = np.cumsum(self.lengths[shards])
            slot = np.searchsorted(ends, rows, side="right")
            offsets = np.cumsum(self.lengths) - self.lengths
            within = rows - (ends[slot] - self.lengths[shards[slot]])
            self._remember(key, offsets[shards[slot]] + within)
        return self._cache[key]

    def _shards(self, epoch: int) -> np.ndarray:
        key = ("shards", epoch, 0)
        if key not in self._cache:
            self._remember(key, _permutation(f"shards/{self.seed}/{epoch}", len(self.lengths)))
        return self._cache[key]

    def _remember(self, key: tuple[str, int, int], value: np.ndarray) -> None:
        while len(self._cache) >= 4:
            self._cache.pop(next(iter(self._cache)))
        self._cache[key] = value


MIXTURE_BLOCK = 10_000
"""Length of a block of positions in which every part of a mixture has its exact share; weights are rounded to multiples of
its inverse."""


@dataclass(frozen=True)
class Mixed:
    """An interleaving of several orders.

    In each block of ``MIXTURE_BLOCK`` positions, part i has ``quota[i]`` random positions. Each part counts its own
    epochs. A sample's number is its number in its part plus the sizes of the parts before it.

    Attributes:
        parts: the orders.
        sizes: samples in each part.
        weights: relative share of each part, in samples.
        seed: the run's seed.
        quota: (parts,) int64 positions of each part in a block.

    Raises:
        InputError: a weight is too small for one position in a block.
    """

    parts: Sequence[Order]
    sizes: Sequence[int]
    weights: Sequence[float]
    seed: int
    length: None = None
    quota: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        exact = np.asarray(self.weights, dtype=np.float64) / sum(self.weights) * MIXTURE_BLOCK
        quota = np.floor(exact).astype(np.int64)
        largest = np.argsort(-(exact - quota), kind="stable")
        quota[largest[: MIXTURE_BLOCK - int(quota.sum())]] += 1
        if quota.min() < 1:
            raise InputError(
                f"data.parts: number {int(quota.argmin())} would be less than 1 in {MIXTURE_BLOCK:,} samples; "
                "raise its weight or leave it out"
            )
        object.__setattr__(self, "quota", quota)

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, samples = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        offsets = np.cumsum([0, *self.sizes[:-1]])
        at = 0
        while at < count:
            block, position = divmod(start + at, MIXTURE_BLOCK)
            stop = min(at + MIXTURE_BLOCK - position, count)
            who = _mixture_block(self.seed, block, tuple(self.quota.tolist()))
            chosen = who[position : position + stop - at]
            for part, order in enumerate(self.parts):
                here = np.flatnonzero(chosen == part)
                before = block * int(self.quota[part]) + int((who[:position] == part).sum())
                part_epochs, part_samples = order.take(before, len(here))
                epochs[at + here], samples[at + here] = part_epochs, part_samples + offsets[part]
            at = stop
        return epochs, samples


@lru_cache(maxsize=4)
def _mixture_block(seed: int, block: int, quota: tuple[int, ...]) -> np.ndarray:
    """Return the part at each position of a block, (MIXTURE_BLOCK,) int64."""
    return np.repeat(np.arange(len(quota)), quota)[_permutation(f"mixture/{seed}/{block}", MIXTURE_BLOCK)]
