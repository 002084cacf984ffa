"""What one training example is, by the kind of data. Each knows itself as a sequence for next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jepa_scale.packing import IGNORE


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a piece of one.

    Attributes:
        tokens: (n,) integer token ids, n ≥ 2. The pieces of a split document overlap by one token, so that each of its
            tokens but the first is predicted exactly once.
    """

    tokens: np.ndarray

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) tokens and (n,) labels: every token but the first is predicted."""
        labels = np.full(len(self.tokens), IGNORE, dtype=np.int64)
        labels[:-1] = self.tokens[1:]
        return self.tokens, labels


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens ``[start, stop)`` of a conversation that a role said, its closing token included."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages between roles, tokenised by a chat template.

    Attributes:
        tokens: (n,) integer token ids of the whole conversation, n ≥ 2.
        turns: what each message's role said, in order. Tokens of the template that open a turn belong to none.
        messages: the messages as they were, ``{"role", "content"}`` each.
        train_all: every token is predicted, not the assistant's alone.
        where: the row that it was, ``file:line``; empty if nobody knows.
    """

    tokens: np.ndarray
    turns: tuple[Turn, ...]
    messages: list[dict[str, Any]]
    train_all: bool = False
    where: str = ""

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) tokens and (n,) labels: what the assistant says, its closing token included."""
        labels = np.full(len(self.tokens), IGNORE, dtype=np.int64)
        if self.train_all:
            labels[:-1] = self.tokens[1:]
            return self.tokens, labels
        for turn in self.turns:
            if turn.role == "assistant":
                start = max(turn.start, 1)
                stop = max(start, min(turn.stop, len(self.tokens)))  # an empty answer has none
                labels[start - 1 : stop - 1] = self.tokens[start:stop]
        return self.tokens, labels


GRID_ROW, GRID_END = 10, 11
"""Token ids after the ten colours: the end of a row, the end of a grid."""
GRID_VOCABULARY = 12


@dataclass(frozen=True, slots=True)
class GridSequence:
    """Grids of colours 0 … 9, in order; the last one is what the others lead to.

    Attributes:
        context: the grids before, each (height, width) int8.
        target: (height, width) int8.
        where: the record that it was, ``file:line``; empty if nobody knows.
    """

    context: tuple[np.ndarray, ...]
    target: np.ndarray
    where: str = ""

    def lm_sequence(self) -> tuple[np.ndarray, np.ndarray]:
        """All grids row by row, each row and each grid closed by a token of its own; the target has labels."""
        parts = [flatten_grid(grid) for grid in (*self.context, self.target)]
        tokens = np.concatenate(parts)
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        start = len(tokens) - len(parts[-1])
        first = max(start, 1)
        labels[first - 1 : -1] = tokens[first:]
        return tokens, labels


def flatten_grid(grid: np.ndarray) -> np.ndarray:
    """(height, width) colours → (height · (width + 1) + 1,) int64 token ids."""
    rows = np.pad(np.asarray(grid, dtype=np.int64), ((0, 0), (0, 1)), constant_values=GRID_ROW)
    return np.append(rows.reshape(-1), GRID_END)
