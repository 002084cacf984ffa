"""Which samples an optimizer step takes: a pure function of the seed and one global position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jepa_scale.data.draw import generator
from jepa_scale.errors import InputError


@lru_cache(maxsize=4)  # a batch may span two epochs; nothing needs more for long
def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """(n,) int64, read-only: the uniformly random permutation of 0 … n-1 that this epoch follows."""
    permutation = generator(f"order/{seed}/{epoch}/{n}").permutation(np.arange(n, dtype=np.int64))
    permutation.setflags(write=False)
    return permutation


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The endless concatenation of the epochs' permutations, cut into optimizer steps and dealt out to ranks.

    Step s takes the samples at positions [s·B, (s+1)·B); a step may cross from one epoch into the next, so
    every sample comes exactly once an epoch. Micro-batch j of rank r is slice number j·world + r of the step:
    how many ranks and micro-batches there are decides who computes a sample, never which samples a step has.

    Attributes:
        n: number of training examples.
        seed: the run's seed.
        batch_size: B, samples in an optimizer step over all ranks and micro-batches.
        accumulation: micro-batches of a rank in a step.
        rank, world_size: who this process is.
        fingerprint: of the data; a saved position means nothing for other data.
        order: (seed, epoch, n) → (n,) int64, the permutation that an epoch follows.

    Raises:
        InputError: there is nothing to train on, or the batch cannot be dealt out evenly.
    """

    n: int
    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    fingerprint: str = ""
    order: Callable[[int, int, int], np.ndarray] = shuffled

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        if self.n < 1:
            raise InputError("data: holds no examples to train on")
        parts = self.accumulation * self.world_size
        if self.batch_size < 1 or self.batch_size % parts:
            raise InputError(
                f"train.batch_size: {self.batch_size} samples cannot be dealt out evenly to "
                f"train.accumulation={self.accumulation} micro-batches on each of {self.world_size} ranks; "
                f"make it a multiple of {parts}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Samples in one micro-batch of one rank."""
        return self.batch_size // (self.accumulation * self.world_size)

    def micro_batch(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """(m,) int64 epochs and (m,) int64 sample numbers of this rank's micro-batch."""
        m = self.micro_batch_size
        start = step * self.batch_size + (micro * self.world_size + self.rank) * m
        epochs, places = np.divmod(np.arange(start, start + m, dtype=np.int64), self.n)
        samples = np.empty(m, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            samples[here] = self.order(self.seed, epoch, self.n)[places[here]]
        return epochs, samples

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands before ``step``, for a checkpoint: the same on every rank."""
        return {"position": step * self.batch_size, "seed": self.seed, "fingerprint": self.fingerprint}

    def resume(self, state: dict[str, Any]) -> int:
        """The step at which to go on from a :meth:`state`, possibly of another world size or accumulation.

        Raises:
            InputError: the state is of other data, another seed, or does not lie between two steps of this
                batch size.
        """
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                "data: is not what the checkpoint was trained on (its fingerprint differs); use the same "
                "data or start a new run"
            )
        if state["seed"] != self.seed:
            raise InputError(f"run.seed: {self.seed} is not the checkpoint's; set it to {state['seed']}")
        step, rest = divmod(int(state["position"]), self.batch_size)
        if rest:
            raise InputError(
                f"train.batch_size: the checkpoint stands at {state['position']} samples, no whole "
                f"number of steps of {self.batch_size}; resume with the batch size that it was saved with"
            )
        return step
