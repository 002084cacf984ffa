"""What the generators share: distinct random rows, and the files they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jepa_scale.data.sampling.rng import generator
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

CHUNK = 4096
"""Number of rows that one generator draws."""


def check_range(name: str, value: int, least: int, most: int | None = None) -> None:
    """Check that an option lies in its range.

    Raises:
        InputError: it does not.
    """
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} … {most:,}"
        raise InputError(f"{name}: must be {limits}, got {value}")


def distinct_rows(
    name: str, draw: Callable[[np.random.Generator, int], np.ndarray], possible: int, train: int, test: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw training and test rows of which no two are equal: (train, k) and (test, k), in random order.

    Test rows are drawn first. So they do not depend on ``train``, and a smaller training set is the beginning of a larger one.

    Args:
        name: of the random generators; the seed and the task's options are in it.
        draw: generator, n → (n, k) int64 independent random rows.
        possible: number of different rows.

    Raises:
        InputError: a number is not positive, or there are not as many different rows.
    """
    check_range("train", train, 1)
    check_range("test", test, 1)
    if train + test > possible:
        raise InputError(
            f"train, test: {train:,} + {test:,} samples are asked for, but only {possible:,} are different; lower one of them"
        )
    rows, chunk = draw(generator(f"{name}/0"), CHUNK)[:0], 0
    while missing := max(0, train + test - len(rows)):
        last = chunk + -(-missing // CHUNK)
        drawn = np.concatenate([rows, *(draw(generator(f"{name}/{n}"), CHUNK) for n in range(chunk, last))])
        _, first = np.unique(drawn, axis=0, return_index=True)
        rows, chunk = drawn[np.sort(first)], last
    return rows[test : test + train], rows[:test]


def with_start(rows: np.ndarray, start: int) -> np.ndarray:
    """Put a token before each row, (n, k) → (n, k + 1).

    Attention with relative positions cannot count equal tokens: its output is the same for one and for many. A first token that
    differs from all others makes the positions known.
    """
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=start)


def write_rows(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write a JSON object a line.

    Args:
        columns: key → (n, k) integers, a list of k in each of the n rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = [column.tolist() for column in columns.values()]
    lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*lists, strict=True))
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read_column(path: Path, key: str) -> np.ndarray:
    """Read a column of a file of :func:`write_rows`, (n, k) int64."""
    with open(path, encoding="utf-8") as file:
        return np.array([json.loads(line)[key] for line in file], dtype=np.int64)
