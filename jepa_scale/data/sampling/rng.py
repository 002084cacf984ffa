"""Where randomness comes from: a generator for every purpose, found again from its name alone."""

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
    """Seeds a bit generator with the bytes of a hash. NumPy's own ``SeedSequence`` would hash them once more,
    which takes five times as long as all the rest (and a step draws from thousands of generators)."""

    __slots__ = ("_bytes",)

    def __init__(self, words: bytes) -> None:
        self._bytes = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.frombuffer(self._bytes, "<u8", n_words).astype(dtype, copy=False)  # PCG64 asks for uint64


def generator(name: str) -> np.random.Generator:
    """A PCG64 generator that is a function of ``name`` alone; generators of different names are independent.

    The 256-bit BLAKE2b hash of the name is the generator's whole state and increment.
    """
    words = _Words(hashlib.blake2b(name.encode(), digest_size=32).digest())
    return np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]  # any ISeedSequence will do


@dataclass(slots=True)
class Draw:
    """Where a sample's random choices come from: (seed, epoch, step, sample), never a rank or a worker."""

    seed: int
    epoch: int
    step: int
    sample: int

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for this sample in this epoch and for this purpose, whatever the step."""
        return generator(f"sample/{self.seed}/{self.epoch}/{self.sample}/{purpose}")

    def number(self, purpose: str) -> int:
        """In [0, 2⁶²); of this sample in this epoch and for this purpose, as :meth:`rng`."""
        name = f"number/{self.seed}/{self.epoch}/{self.sample}/{purpose}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 2

    def step_rng(self, purpose: str) -> np.random.Generator:
        """The same generator for every sample of an optimizer step."""
        return generator(f"step/{self.seed}/{self.step}/{purpose}")


ViewMaker = Callable[[Any, Draw], Views]
"""Example → its views. A pure function (NumPy only, picklable): it runs in loader workers."""


@runtime_checkable
class ManyViewMaker(Protocol):
    """A view maker that is faster on the samples of a micro-batch together. What it makes of a sample is the same as alone."""

    def __call__(self, example: Any, draw: Draw, /) -> Views: ...

    def many(self, examples: Sequence[Any], draws: Sequence[Draw]) -> list[Views | DataError]:
        """The views of each example, or what is wrong with it."""


def views_of(maker: ViewMaker, examples: Sequence[Any], draws: Sequence[Draw]) -> list[Views | DataError]:
    """The views of each example, or what is wrong with it."""
    if isinstance(maker, ManyViewMaker):
        return maker.many(examples, draws)
    made: list[Views | DataError] = []
    for example, draw in zip(examples, draws, strict=True):
        try:
            made.append(maker(example, draw))
        except DataError as error:
            made.append(error)
    return made
