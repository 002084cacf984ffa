"""The random hierarchy model: a grammar of fixed depth with random unambiguous rules (Cagnetta et al., arXiv 2307.02129).

A symbol of level k = L … 1 is replaced by one of its m productions, each a tuple of s symbols of level k − 1. The tuples of a
level are drawn without repetition, so that each has one parent and the hidden symbols follow from the s^L leaves.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from jepa_scale.bench.generators.rows import check_range, distinct_rows, with_start, write_rows
from jepa_scale.data.sampling.rng import generator
from jepa_scale.utils.errors import InputError

MOST_TOKENS = 65_536
"""Greatest number of leaves, and of tuples of symbols."""


def vocabulary(*, symbols: int = 16, **others: int) -> int:
    """Return the number of token ids: the symbols of level 0, and the start."""
    return symbols + 1


def write(
    folder: Path,
    seed: int,
    *,
    depth: int = 3,
    symbols: int = 16,
    productions: int = 4,
    branches: int = 2,
    train: int = 4_096,
    test: int = 2_000,
) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` with rows of ``input_ids``; no two rows are equal.

    A row is a start token, whose id is v, and the leaves of a derivation, all of which are predicted. The root and each production are
    uniformly random. The rules depend on the seed, and on ``symbols``, ``productions`` and ``branches``.

    Args:
        depth: L, the levels above the leaves. symbols: v, on each level. productions: m, of each symbol.
        branches: s, the symbols of a production.
        train: P, the number of training samples. test: of test samples, which do not depend on P.

    Raises:
        InputError: an option is out of range, m·v is greater than v^s, or there are fewer derivations than samples.
    """
    levels = rules(seed, depth, symbols, productions, branches)
    nodes = (branches**depth - 1) // (branches - 1)
    name = f"bench/hierarchy/{seed}/{depth}/{symbols}/{productions}/{branches}"
    splits = distinct_rows(name, partial(_leaves, levels), symbols * productions**nodes, train, test)
    for split, tokens in zip(("train", "test"), splits, strict=True):
        write_rows(folder / f"{split}.jsonl", {"input_ids": with_start(tokens, symbols)})


def rules(seed: int, depth: int, symbols: int, productions: int, branches: int) -> list[np.ndarray]:
    """Return the productions of levels 1 … L, each (v, m, s) int64 symbols of the level below.

    Raises:
        InputError: see :func:`write`.
    """
    check_range("depth", depth, 1)
    check_range("symbols", symbols, 2)
    check_range("productions", productions, 1)
    check_range("branches", branches, 2, 16)
    if branches**depth > MOST_TOKENS or symbols**branches > MOST_TOKENS:
        raise InputError(
            f"depth, branches, symbols: {branches}^{depth} leaves and {symbols}^{branches} tuples of symbols must be at most "
            f"{MOST_TOKENS:,} each; lower one of them"
        )
    if productions * symbols > symbols**branches:
        raise InputError(
            f"productions: {productions} of each of {symbols} symbols need more than the {symbols**branches:,} tuples of "
            f"{branches} symbols; lower it to {symbols ** (branches - 1):,}"
        )
    found = []
    for level in range(1, depth + 1):
        rng = generator(f"bench/hierarchy/{seed}/rules/{level}/{symbols}/{productions}/{branches}")
        chosen = rng.permutation(symbols**branches)[: symbols * productions]
        tuples = np.stack(np.unravel_index(chosen, (symbols,) * branches), axis=1)
        found.append(tuples.reshape(symbols, productions, branches).astype(np.int64))
    return found


def _leaves(levels: list[np.ndarray], rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw derivations and return their leaves, (count, s^L)."""
    symbols, productions, _ = levels[0].shape
    found = rng.integers(symbols, size=(count, 1))
    for level in reversed(levels):
        found = level[found, rng.integers(productions, size=found.shape)].reshape(count, -1)
    return found


def hidden_symbols(levels: list[np.ndarray], leaves: np.ndarray) -> list[np.ndarray]:
    """Return the symbols of levels 0 … L of derivations from their leaves: (n, s^L) → for level k (n, s^(L − k)) int64.

    Raises:
        InputError: a row is not derived by these rules; the message numbers it from 0.
    """
    found = [leaves]
    for level in levels:
        symbols, productions, branches = level.shape
        parents = np.full((symbols,) * branches, -1)
        parents[tuple(np.moveaxis(level, 2, 0))] = np.arange(symbols)[:, None]
        tuples = found[-1].reshape(len(leaves), -1, branches)
        above = parents[tuple(np.moveaxis(tuples, 2, 0))]
        if (above < 0).any():
            row = int(np.flatnonzero((above < 0).any(axis=1))[0])
            raise InputError(
                f"row {row}: is not derived by these rules; give the seed and options that it was written with"
            )
        found.append(above)
    return found
