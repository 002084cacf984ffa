"""Groups against the composition of permutations, and words against products step by step."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.bench.generators.rows import read_column
from jepa_scale.bench.generators.state_tracking import running_products, table, vocabulary, write
from jepa_scale.utils.errors import InputError


def sign(p: tuple[int, ...]) -> float:
    return round(np.linalg.det(np.eye(len(p))[list(p)]))


def elements(group: str) -> list[tuple[int, ...]]:
    """The permutations of a symmetric or alternating group, in lexicographic order."""
    return [p for p in permutations(range(int(group[1:]))) if group[0] == "S" or sign(p) == 1]


@pytest.mark.parametrize("group", ["S3", "S4", "A3", "A4", "A5"])
def test_a_product_applies_its_first_permutation_first(group):
    every, products = elements(group), table(group)
    assert products.shape == (len(every), len(every)) and vocabulary(group=group, length=5) == len(every) + 1
    for i, g in enumerate(every):
        for j, h in enumerate(every):
            assert every[products[i, j]] == tuple(h[g[k]] for k in range(len(g)))


@pytest.mark.parametrize("group", ["S3", "S5", "A4", "A5", "Z2", "Z60"])
def test_a_table_is_that_of_a_group(group):
    products = table(group)
    order = {"S": math.factorial, "A": lambda n: math.factorial(n) // 2, "Z": int}[group[0]](int(group[1:]))
    numbers = np.arange(order)
    np.testing.assert_array_equal(products[0], numbers)  # 0 is the identity
    np.testing.assert_array_equal(products[:, 0], numbers)
    for line in (*products, *products.T):
        np.testing.assert_array_equal(np.sort(line), numbers)
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 5000))
    np.testing.assert_array_equal(products[products[a, b], c], products[a, products[b, c]])
    assert (products == products.T).all() == (group[0] == "Z")


@settings(deadline=None)
@given(st.sampled_from(["S3", "A4", "Z7"]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 100))
def test_products_step_by_step(group, count, length, seed):
    products = table(group)
    tokens = np.random.default_rng(seed).integers(len(products), size=(count, length))
    found = running_products(products, tokens)
    for word, row in zip(tokens.tolist(), found.tolist(), strict=True):
        product = 0
        for i, g in enumerate(word):
            product = products[product, g]
            assert row[i] == product


def test_rows_hold_a_word_and_the_products_at_its_own_positions(tmp_path):
    """A word of S3 acts on three points: applying its elements one after the other gives what the labels say."""
    write(tmp_path, 3, group="S3", length=7, train=50, test=20)
    every = elements("S3")
    seen = set()
    for split, count in (("train", 50), ("test", 20)):
        words = read_column(tmp_path / f"{split}.jsonl", "input_ids")
        labels = read_column(tmp_path / f"{split}.jsonl", "token_labels")
        assert words.shape == labels.shape == (count, 8)
        assert (words[:, 0] == 6).all() and (labels[:, 0] == -100).all()
        seen |= {tuple(word) for word in words.tolist()}
        for word, row in zip(words.tolist(), labels.tolist(), strict=True):
            points = [0, 1, 2]
            for g, product in zip(word[1:], row[1:], strict=True):
                points = [every[g][k] for k in points]
                assert every[product] == tuple(points)
    assert len(seen) == 70


def test_the_files_depend_on_the_arguments_alone(tmp_path):
    def files(name, seed, **options):
        write(tmp_path / name, seed, **{"length": 5, "train": 20, "test": 10, **options})
        return [(tmp_path / name / f"{split}.jsonl").read_bytes() for split in ("train", "test")]

    first = files("a", 0)
    assert files("b", 0) == first and files("c", 0, train=7)[1] == first[1]
    assert files("d", 1)[0] != first[0] and files("e", 1)[1] != first[1]


@pytest.mark.parametrize("group", ["", "S2", "S7", "A2", "Z1", "Z1001", "D4", "s3", "S03", "S3 "])
def test_unknown_groups(tmp_path, group):
    with pytest.raises(InputError, match="group: .* is unknown; use S3"):
        write(tmp_path, 0, group=group)


def test_impossible_options(tmp_path):
    with pytest.raises(InputError, match="length: must be at least 1"):
        write(tmp_path, 0, length=0)
    with pytest.raises(InputError, match="only 36 are different"):
        write(tmp_path, 0, length=2, train=30, test=7)
    with pytest.raises(TypeError, match="size"):
        write(tmp_path, 0, size=3)
