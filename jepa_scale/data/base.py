"""What a source of data hands to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from jepa_scale.config.schema import Section

if TYPE_CHECKING:  # options are checked before anything that takes time is imported
    import numpy as np

    from jepa_scale.data.sampling.order import Order


Evaluation = Literal["answers", "perplexity", "chat"]
Kind = Literal["reversal", "text", "chat", "grids"]
"""What examples are: facts, documents, conversations or sequences of grids."""


class DataOptions(Section):
    """Keys of ``data:`` that every source has."""

    evaluation: ClassVar[Evaluation] = "answers"
    """How splits are evaluated: ``answers`` (they hold questions), ``perplexity`` or ``chat``."""

    source: str = Field(description="Which source.")
    workers: int = Field(0, ge=0, description="Loader worker processes a rank; 0 = in the training process.")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="A damaged sample: stop with its name, or leave it out, count it and go on."
    )
    accept_changes: bool = Field(
        False, description="Resume although the data are not what the checkpoint was trained on."
    )


class Examples(Protocol):
    """Examples by number, and how long they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any:
        """A pure function of the number; it may run in a loader worker.

        Raises:
            DataError: the example is damaged.
        """

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """(m,) int64 example numbers → (m,) int64 tokens of each, without reading them."""

    @property
    def max_size(self) -> int:
        """Tokens that no example exceeds."""

    @property
    def mean_size(self) -> float:
        """Tokens of an example, on average."""


class Dataset(Protocol):
    """Examples to train on and splits to evaluate.

    Examples are whatever the source makes of its data (see each source); an objective's view maker turns one
    into segments. Evaluation splits are never trained on, unless a split says by its name that it is a sample of the
    training data (``train``).
    """

    @property
    def kind(self) -> Kind:
        """What the examples are; ``chat`` for a mixture with conversations in any part."""

    @property
    def train(self) -> Examples:
        """Everything that is trained on."""

    @property
    def splits(self) -> Mapping[str, Any]:
        """What is evaluated, by name: sequences of questions, or :class:`Examples`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def special(self) -> Mapping[str, Any]:
        """Token ids with a meaning, by name; which names there are depends on the source."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What became of the source's records: samples, and how many were split, dropped …; told before training."""

    def order(self, seed: int) -> Order:
        """The order in which a run of that seed meets ``train``."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the training examples: equal if and only if they are the same, in the same
        order."""
