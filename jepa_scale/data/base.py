"""What a source of data hands to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from jepa_scale.config import Section


class DataOptions(Section):
    """Keys of ``data:`` that every source has."""

    source: str = Field(description="Which source: reversal.")
    workers: int = Field(0, ge=0, description="Loader worker processes a rank; 0 = in the training process.")


class Dataset(Protocol):
    """Examples to train on and splits to evaluate.

    Examples are whatever the source makes of its data (see each source); an objective's view maker turns one
    into segments. Reading ``train[i]`` is a pure function of i and may happen in a loader worker. Evaluation
    splits are never trained on, unless a split says by its name that it is a sample of the training data
    (``train``).
    """

    @property
    def train(self) -> Sequence[Any]:
        """Everything that is trained on."""

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """What is evaluated, by name."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def special(self) -> Mapping[str, Any]:
        """Token ids with a meaning, by name; which names there are depends on the source."""

    @property
    def names(self) -> Sequence[tuple[int, ...]]:
        """Every answer that a question may have, as token ids; evaluation ranks the right one among them."""

    def order(self, seed: int, epoch: int, n: int) -> np.ndarray:
        """(n,) int64: the order in which an epoch goes through ``train``, n examples; a pure function."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the training examples: equal if and only if they are the same, in the same
        order."""
