"""The random hierarchy model: unambiguous rules, derivations parsed back, and their number."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.bench.generators.hierarchy import _leaves, hidden_symbols, rules, vocabulary, write
from jepa_scale.bench.generators.rows import read_column
from jepa_scale.utils.errors import InputError

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 3), st.integers(2, 3)).filter(
    lambda shape: shape[2] * shape[1] <= shape[1] ** shape[3]
)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_no_tuple_has_two_parents(shape, seed):
    depth, symbols, productions, branches = shape
    levels = rules(seed, *shape)
    assert len(levels) == depth
    for level in levels:
        assert level.shape == (symbols, productions, branches)
        assert level.min() >= 0 and level.max() < symbols
        assert len({tuple(t) for t in level.reshape(-1, branches).tolist()}) == symbols * productions


@settings(deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_each_hidden_symbol_derives_what_is_below_it(shape, seed):
    depth, symbols, _, branches = shape
    levels = rules(seed, *shape)
    leaves = _leaves(levels, np.random.default_rng(seed), 5)
    found = hidden_symbols(levels, leaves)
    assert [f.shape for f in found] == [(5, branches ** (depth - k)) for k in range(depth + 1)]
    np.testing.assert_array_equal(found[0], leaves)
    assert leaves.max() < symbols == vocabulary(symbols=symbols, depth=depth) - 1
    for level, below, above in zip(levels, found, found[1:], strict=False):
        for lower, upper in zip(below.tolist(), above.tolist(), strict=True):
            for i, parent in enumerate(upper):
                assert lower[branches * i : branches * (i + 1)] in level[parent].tolist()


def test_all_derivations_are_drawn_and_no_more_are_asked_for(tmp_path):
    """Two symbols with two productions of two: 2 · 2³ derivations of depth 2, and every one has different leaves."""
    write(tmp_path, 0, depth=2, symbols=2, productions=2, train=12, test=4)
    rows = [read_column(tmp_path / f"{split}.jsonl", "input_ids") for split in ("train", "test")]
    drawn = {tuple(row) for row in np.concatenate(rows)[:, 1:].tolist()}
    assert (np.concatenate(rows)[:, 0] == 2).all()
    levels = [level.tolist() for level in rules(0, 2, 2, 2, 2)]
    derived = {
        (*levels[0][left][i], *levels[0][right][j])
        for root in range(2)
        for left, right in levels[1][root]
        for i, j in itertools.product(range(2), repeat=2)
    }
    assert drawn == derived and len(drawn) == 16
    with pytest.raises(InputError, match="only 16 are different"):
        write(tmp_path, 0, depth=2, symbols=2, productions=2, train=12, test=5)


def test_symbols_and_productions_are_uniform():
    levels = rules(4, 2, 4, 3, 2)
    found = hidden_symbols(levels, _leaves(levels, np.random.default_rng(0), 6000))
    assert (abs(np.bincount(found[2][:, 0]) - 1500) < 170).all()  # five standard deviations
    pairs = found[1][:, 0] * 4 + found[1][:, 1]
    assert (abs(np.bincount(pairs)[np.unique(pairs)] - 500) < 108).all() and len(np.unique(pairs)) == 12


def test_leaves_of_other_rules_are_refused():
    levels = rules(0, 2, 16, 4, 2)
    leaves = _leaves(levels, np.random.default_rng(0), 3)
    known = {tuple(t) for t in levels[0].reshape(-1, 2).tolist()}
    leaves[1, :2] = next(t for t in itertools.product(range(16), repeat=2) if t not in known)
    with pytest.raises(InputError, match="row 1: is not derived by these rules"):
        hidden_symbols(levels, leaves)


def test_the_files_depend_on_the_arguments_alone_and_a_smaller_training_set_begins_a_larger(tmp_path):
    def files(name, seed, **options):
        write(tmp_path / name, seed, **{"train": 40, "test": 20, **options})
        return [(tmp_path / name / f"{split}.jsonl").read_bytes() for split in ("train", "test")]

    train, test = files("a", 0)
    assert files("b", 0) == [train, test]
    assert files("c", 0, train=10) == [b"".join(train.splitlines(keepends=True)[:10]), test]
    other = files("d", 1)
    assert other[0] != train and other[1] != test


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth: must be at least 1"),
        ({"symbols": 1}, "symbols: must be at least 2"),
        ({"productions": 0}, "productions: must be at least 1"),
        ({"branches": 1}, "branches: must be 2 … 16, got 1"),
        ({"productions": 17}, "productions: 17 of each of 16 symbols need more than the 256 tuples .* lower it to 16"),
        ({"depth": 17}, r"2\^17 leaves"),
        ({"symbols": 300}, r"300\^2 tuples"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path, 0, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(TypeError, match="levels"):
        write(tmp_path, 0, levels=3)
