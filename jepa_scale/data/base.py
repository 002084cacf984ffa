"""The interface between a source of data and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import Field

from jepa_scale.config.schema import Section

if TYPE_CHECKING:  # options are checked before any slow import
    import numpy as np

    from jepa_scale.data.sampling.order import Order


Evaluation = Literal["answers", "perplexity", "chat"]
Kind = Literal["reversal", "text", "tokens", "chat", "grids"]
"""Kind of the examples: facts, documents, token ids with labels, conversations or sequences of grids."""


class DataOptions(Section):
    """Keys of ``data:`` that every source has."""

    evaluation: ClassVar[Evaluation] = "answers"
    """How splits are evaluated: ``answers`` (they hold questions), ``perplexity`` or ``chat``."""

    source: str = Field(description="Source of the data, which determines the other keys.")
    workers: int = Field(0, ge=0, description="Loader worker processes a rank; 0 = in the training process.")
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="Treatment of a damaged sample: stop = end with an error that names it; skip = omit and count it.",
    )
    accept_changes: bool = Field(
        False, description="Allow resuming with other data than the checkpoint was trained on."
    )


class Examples(Protocol):
    """Sequence of examples, with the token count of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any:
        """Return an example by number. It depends on the number alone, and may be read in a loader worker.

        Raises:
            DataError: the example is damaged.
        """

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the (m,) int64 token counts of (m,) int64 example numbers, without reading the examples."""

    @property
    def max_size(self) -> int:
        """Upper bound on the tokens of an example."""

    @property
    def mean_size(self) -> float:
        """Tokens of an example, on average."""


class Dataset(Protocol):
    """Examples to train on and splits to evaluate.

    The type of an example depends on the source (see each source); an objective's view transform turns an example
    into segments. Evaluation splits are never trained on, except samples of the training data, marked by their names
    (``train``).
    """

    @property
    def kind(self) -> Kind:
        """Kind of the examples; ``chat`` for a mixture with conversations in any part."""

    @property
    def train(self) -> Examples:
        """All examples to train on."""

    @property
    def splits(self) -> Mapping[str, Any]:
        """Evaluation splits by name: sequences of questions, or :class:`Examples`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def special(self) -> Mapping[str, Any]:
        """Special token ids by name; the names depend on the source."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of samples, and of source records that were split, dropped …; logged before training."""

    def order(self, seed: int) -> Order:
        """Return the order of ``train`` in a run of that seed."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the training examples: equal if and only if they are the same, in the same
        order."""
