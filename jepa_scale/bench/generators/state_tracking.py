"""Words over a finite group: predict the product of all elements so far (Liu et al., arXiv 2210.10749; Merrill et al., arXiv 2404.08819).

A recurrent network needs one step an element. A transformer of fixed depth cannot do so for every length if the group is not
solvable, as A5, under the usual assumptions on circuits; it can learn shortcuts for a length.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np

from jepa_scale.bench.generators.rows import check_range, distinct_rows, with_start, write_rows
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

MOST = {"S": 6, "A": 6, "Z": 1000}
"""Family of groups → the greatest degree."""


def vocabulary(*, group: str = "S3", **others: int) -> int:
    """Return the number of token ids: the elements, which have one id each, as input and as label, and the start."""
    return len(table(group)) + 1


def write(
    folder: Path, seed: int, *, group: str = "S3", length: int = 16, train: int = 100_000, test: int = 2_000
) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with rows of ``input_ids`` and ``token_labels``; no two rows are equal.

    ``input_ids`` are a start token, whose id is the group's order, and uniformly random elements g₁ … gₙ. ``token_labels[i]`` is
    predicted at position i itself: the product g₁·…·gᵢ; −100 at the start. Elements are numbered as in :func:`table`.

    Args:
        group: S3 … S6 (symmetric), A3 … A6 (alternating) or Z2 … Z1000 (cyclic). length: n.
        train, test: numbers of samples.

    Raises:
        InputError: the group is unknown, an option is out of range, or there are fewer different words than samples.
    """
    products = table(group)
    check_range("length", length, 1)
    draw = partial(words, order=len(products), length=length)
    name = f"bench/state_tracking/{seed}/{group}/{length}"
    splits = distinct_rows(name, draw, len(products) ** length, train, test)
    for split, tokens in zip(("train", "test"), splits, strict=True):
        labels = with_start(running_products(products, tokens), IGNORE)
        write_rows(folder / f"{split}.jsonl", {"input_ids": with_start(tokens, len(products)), "token_labels": labels})


def words(rng: np.random.Generator, count: int, *, order: int, length: int) -> np.ndarray:
    """Draw (count, length) int64, independent uniformly random elements of a group of this order."""
    return rng.integers(order, size=(count, length))


def running_products(products: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return g₁·…·gᵢ at each i: (m, m) table, (n, length) elements → (n, length) int64."""
    found = tokens.copy()
    for i in range(1, tokens.shape[1]):
        found[:, i] = products[found[:, i - 1], tokens[:, i]]
    return found


def table(group: str) -> np.ndarray:
    """Return the multiplication table of a group, (m, m) int64: ``table[i, j]`` is the number of g_i·g_j, which applies g_i first.

    Permutations are numbered in lexicographic order; 0 is the identity. The number of an element of Z_m is the element.

    Raises:
        InputError: the group is unknown.
    """
    found = re.fullmatch(r"([SAZ])([1-9]\d{0,3})", group)
    family, degree = (found[1], int(found[2])) if found else ("", 0)
    if not found or not (2 if family == "Z" else 3) <= degree <= MOST[family]:
        raise InputError(f"group: {group!r} is unknown; use S3 … S6, A3 … A6 or Z2 … Z1000")
    if family == "Z":
        return np.add.outer(np.arange(degree), np.arange(degree)) % degree
    every = np.array([p for p in permutations(range(degree)) if family == "S" or _even(p)])
    numbers = {p: i for i, p in enumerate(map(tuple, every.tolist()))}
    after = every[:, every]  # [j, i, k] = g_j(g_i(k))
    return np.array([numbers[tuple(p)] for p in after.reshape(-1, degree).tolist()]).reshape(after.shape[:2]).T


def _even(permutation: tuple[int, ...]) -> bool:
    """Whether the number of inversions of a permutation is even."""
    return sum(a > b for i, a in enumerate(permutation) for b in permutation[i:]) % 2 == 0
