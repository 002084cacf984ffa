"""Training examples, one class per kind of data. Each converts itself to a sequence for next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.packing import IGNORE


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a piece of one.

    Attributes:
        tokens: (n,) integer token ids, n ≥ 2. The pieces of a split document overlap by one token, so that every token of
            the document except the first is predicted exactly once.
    """

    tokens: np.ndarray

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) tokens and (n,) labels; every token except the first is predicted."""
        labels = np.full(len(self.tokens), IGNORE, dtype=np.int64)
        labels[:-1] = self.tokens[1:]
        return self.tokens, labels


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """Token ids with labels of their own.

    Attributes:
        tokens: (n,) integer token ids, n ≥ 2.
        labels: (n,) integers, ``labels[t]`` is predicted at token t; ``IGNORE`` for none, and at the last token.
    """

    tokens: np.ndarray
    labels: np.ndarray

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) tokens and (n,) labels."""
        return self.tokens, self.labels.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation: its role and its tokens ``[start, stop)``, the closing token included.

    Attributes:
        trained: whether the data allow training on it, if it is an answer.
    """

    role: str
    start: int
    stop: int
    trained: bool = True

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant" and self.trained


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages between roles, tokenised by a chat template.

    Attributes:
        tokens: (n,) integer token ids of the whole conversation, n ≥ 2.
        turns: one turn per message, in order. The template's tokens that open a turn belong to no turn.
        messages: the messages as in the data, each ``{"role", "content"}``.
        train_all: predict every token instead of the assistant's tokens only.
        where: source row of the conversation, ``file:line``; empty if unknown.
    """

    tokens: np.ndarray
    turns: tuple[Turn, ...]
    messages: list[dict[str, Any]]
    train_all: bool = False
    where: str = ""

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) tokens and (n,) labels; the assistant's tokens are predicted, the closing token included."""
        labels = np.full(len(self.tokens), IGNORE, dtype=np.int64)
        if self.train_all:
            labels[:-1] = self.tokens[1:]
            return self.tokens, labels
        for turn in self.turns:
            if turn.is_answer:
                start = max(turn.start, 1)
                stop = max(start, min(turn.stop, len(self.tokens)))  # an empty answer has no labels
                labels[start - 1 : stop - 1] = self.tokens[start:stop]
        return self.tokens, labels


GRID_ROW, GRID_END = 10, 11
"""Token ids that follow the ten colours: end of a row, end of a grid."""
GRID_VOCABULARY = 12


@dataclass(frozen=True, slots=True)
class GridSequence:
    """A sequence of grids of colours 0 … 9: context grids, and the target grid that follows them.

    Attributes:
        context: the grids before the target, each (height, width) int8.
        target: (height, width) int8.
        where: source record, ``file:line``; empty if unknown.
    """

    context: tuple[np.ndarray, ...]
    target: np.ndarray
    where: str = ""

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and labels of all grids, row by row. ``GRID_ROW`` ends each row and ``GRID_END`` each grid; only the
        target has labels."""
        parts = [flatten_grid(grid) for grid in (*self.context, self.target)]
        tokens = np.concatenate(parts)
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        start = len(tokens) - len(parts[-1])
        first = max(start, 1)
        labels[first - 1 : -1] = tokens[first:]
        return tokens, labels


def flatten_grid(grid: np.ndarray) -> np.ndarray:
    """Flatten (height, width) colours to (height · (width + 1) + 1,) int64 token ids."""
    rows = np.pad(np.asarray(grid, dtype=np.int64), ((0, 0), (0, 1)), constant_values=GRID_ROW)
    return np.append(rows.reshape(-1), GRID_END)
