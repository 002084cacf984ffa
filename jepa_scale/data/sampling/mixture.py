"""The source ``mixture``: several sources, each with its share of the tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.data.base import Kind
from jepa_scale.data.options import MixtureOptions, ReversalPart, SourceOptions
from jepa_scale.data.sampling.order import Mixed
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True)
class MixedExamples:
    """The examples of all parts, concatenated.

    Attributes:
        parts: examples of each part. offsets: (P + 1,) int64 number of each part's first example.
        mean_size: mean tokens of an example, with the parts in their shares.
    """

    parts: Sequence[Any]
    offsets: np.ndarray
    mean_size: float

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return self.parts[part][number - int(self.offsets[part])]

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the (m,) int64 token counts of the examples with those numbers."""
        part_of = np.searchsorted(self.offsets, numbers, side="right") - 1
        sizes = np.empty(len(numbers), dtype=np.int64)
        for part, examples in enumerate(self.parts):
            here = part_of == part
            sizes[here] = examples.sizes(numbers[here] - self.offsets[part])
        return sizes

    @property
    def max_size(self) -> int:
        return max(p.max_size for p in self.parts)


@dataclass(frozen=True)
class MixtureData:
    """A :class:`~jepa_scale.data.base.Dataset` made of several.

    Attributes:
        parts: data sets by name. weights: each part's share of the samples.
    """

    parts: Mapping[str, Any]
    weights: Sequence[float]
    train: MixedExamples

    @property
    def splits(self) -> dict[str, Any]:
        """The splits of all parts, named ``<part>_<split>``."""
        return {f"{name}_{split}": e for name, part in self.parts.items() for split, e in part.splits.items()}

    @property
    def _first(self) -> Any:
        return next(iter(self.parts.values()))

    @property
    def vocab_size(self) -> int:
        return self._first.vocab_size

    @property
    def special(self) -> Mapping[str, Any]:
        return self._first.special

    @property
    def tokenizer(self) -> Any:
        return self._first.tokenizer

    def load_tokenizer(self) -> Any:
        return self._first.load_tokenizer()

    @property
    def _chat(self) -> list[Any]:
        return [part for part in self.parts.values() if part.kind == "chat"]

    @property
    def kind(self) -> Kind:
        """``chat`` if any part is ``chat``; documents in such a mixture take part in next-token prediction only."""
        return "chat" if self._chat else self._first.kind

    @property
    def plain(self) -> bool:
        return all(part.plain for part in self._chat)

    @property
    def counts(self) -> dict[str, int]:
        return {f"{name}_{what}": n for name, part in self.parts.items() for what, n in part.counts.items()}

    @property
    def fingerprint(self) -> str:
        parts = [(name, part.fingerprint) for name, part in self.parts.items()]
        return hashlib.sha256(repr((parts, list(self.weights))).encode()).hexdigest()

    def order(self, seed: int) -> Mixed:
        """Return an order that interleaves the parts; every part has its own epochs."""
        return Mixed(
            [part.order(seed) for part in self.parts.values()],
            [len(part.train) for part in self.parts.values()],
            self.weights,
            seed,
        )


def load(options: MixtureOptions, load_part: Callable[[SourceOptions], Any]) -> MixtureData:
    """Load every part with ``load_part``.

    Raises:
        InputError: a part is wrong, or has another vocabulary than the first one.
    """
    parts: dict[str, Any] = {}
    weights = []
    for number, given in enumerate(options.parts):
        where, name = f"data.parts.{number}", f"part{number}" if given.name is None else given.name
        if name in parts:
            raise InputError(f"{where}.name: {name!r} is also the name of another part; choose another one")
        if isinstance(given, ReversalPart):
            raise InputError(f"{where}.source: {given.source} cannot be part of a mixture; use text, chat or grids")
        part = load_part(given)
        first = next(iter(parts.values()), part)
        if part.tokenizer_fingerprint != first.tokenizer_fingerprint or part.vocab_size != first.vocab_size:
            raise InputError(
                f"{where}: has another tokenizer than data.parts.0; prepare all parts with one (tokenizer: a folder or name)"
            )
        parts[name] = part
        weights.append(given.weight / part.train.mean_size)
    if not parts:
        raise InputError("data.parts: give at least one part")
    share = [w / sum(weights) for w in weights]
    mean = sum(s * part.train.mean_size for s, part in zip(share, parts.values(), strict=True))
    trains = [part.train for part in parts.values()]
    offsets = np.cumsum([0, *(len(t) for t in trains)])
    return MixtureData(parts, share, MixedExamples(trains, offsets, mean))
