"""Random generators, one for every purpose, each determined by its name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from jepa_scale.packing import Views
from jepa_scale.utils.errors import DataError


class _Words(ISeedSequence):
    """A seed sequence that passes the bytes of a hash to a bit generator unchanged.

    NumPy's own ``SeedSequence`` would hash them again, which takes five times as long as the rest of :func:`generator`.
    A step draws from thousands of generators.
    """

    __slots__ = ("_bytes",)

    def __init__(self, words: bytes) -> None:
        self._bytes = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.frombuffer(self._bytes, "<u8", n_words).astype(dtype, copy=False)  # PCG64 requests uint64


def generator(name: str) -> np.random.Generator:
    """Make a PCG64 generator that depends on ``name`` alone; generators of different names are independent.

    The 256-bit BLAKE2b hash of the name is the generator's whole state and increment.
    """
    words = _Words(hashlib.blake2b(name.encode(), digest_size=32).digest())
    return np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]  # accepts any ISeedSequence


@dataclass(slots=True)
class SampleRNG:
    """Source of a sample's random choices, determined by (seed, epoch, step, sample), never by a rank or a worker."""

    seed: int
    epoch: int
    step: int
    sample: int

    def rng(self, purpose: str) -> np.random.Generator:
        """Make the generator for this sample, epoch and purpose; it does not depend on the step."""
        return generator(f"sample/{self.seed}/{self.epoch}/{self.sample}/{purpose}")

    def number(self, purpose: str) -> int:
        """Return a number in [0, 2⁶²) for this sample, epoch and purpose, independent of the step as in :meth:`rng`."""
        name = f"number/{self.seed}/{self.epoch}/{self.sample}/{purpose}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 2

    def step_rng(self, purpose: str) -> np.random.Generator:
        """Make the generator for this purpose that all samples of an optimizer step share."""
        return generator(f"step/{self.seed}/{self.step}/{purpose}")


ViewTransform = Callable[[Any, SampleRNG], Views]
"""Function from an example to its views. It must be pure, picklable and use NumPy only, because it runs in loader workers."""


@runtime_checkable
class BatchViewTransform(Protocol):
    """View transform with a faster method for many samples. Each sample's views are the same as alone."""

    def __call__(self, example: Any, draw: SampleRNG, /) -> Views: ...

    def many(self, examples: Sequence[Any], draws: Sequence[SampleRNG]) -> list[Views | DataError]:
        """Make the views of each example; an example that cannot be used gives its ``DataError`` instead."""


def views_of(transform: ViewTransform, examples: Sequence[Any], draws: Sequence[SampleRNG]) -> list[Views | DataError]:
    """Make the views of each example; an example that cannot be used gives its ``DataError`` instead."""
    if isinstance(transform, BatchViewTransform):
        return transform.many(examples, draws)
    made: list[Views | DataError] = []
    for example, draw in zip(examples, draws, strict=True):
        try:
            made.append(transform(example, draw))
        except DataError as error:
            made.append(error)
    return made
