"""Distinct random rows, and the files they are written to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.bench.generators import rows
from jepa_scale.bench.generators.rows import check_range, distinct_rows, read_column, write_rows
from jepa_scale.utils.errors import InputError


def pairs(most: int):
    return lambda rng, count: rng.integers(most, size=(count, 2))


@settings(deadline=None)
@given(st.integers(2, 6), st.data())
def test_rows_are_distinct_until_all_are_drawn(most, data):
    test = data.draw(st.integers(1, most**2 - 1))
    train = data.draw(st.integers(1, most**2 - test))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "CHUNK", 3)  # many chunks, with rows that were drawn before
        first, second = distinct_rows("a", pairs(most), most**2, train, test)
        assert first.shape == (train, 2) and second.shape == (test, 2)
        assert len(np.unique(np.concatenate([first, second]), axis=0)) == train + test
        fewer, same = distinct_rows("a", pairs(most), most**2, 1, test)
    np.testing.assert_array_equal(fewer, first[:1])  # the beginning of the larger set
    np.testing.assert_array_equal(same, second)


def test_another_name_gives_other_rows():
    first, _ = distinct_rows("a", pairs(1000), 10**6, 5, 5)
    second, _ = distinct_rows("b", pairs(1000), 10**6, 5, 5)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [(0, 1, "train: must be at least 1"), (1, 0, "test: must be at least 1"), (2, 3, "only 4 are different")],
)
def test_sizes_that_cannot_be_met(train, test, message):
    with pytest.raises(InputError, match=message):
        distinct_rows("a", pairs(2), 4, train, test)


def test_a_range_has_both_ends():
    check_range("n", 3, 3, 4)
    check_range("n", 4, 3, 4)
    for wrong in (2, 5):
        with pytest.raises(InputError, match=f"n: must be 3 … 4, got {wrong}"):
            check_range("n", wrong, 3, 4)


def test_written_columns_are_read_again(tmp_path):
    columns = {"input_ids": np.array([[1, 2], [3, 4]]), "labels": np.array([[-100], [5]])}
    write_rows(tmp_path / "new" / "x.jsonl", columns)
    lines = (tmp_path / "new" / "x.jsonl").read_text().splitlines()
    assert lines == ['{"input_ids": [1, 2], "labels": [-100]}', '{"input_ids": [3, 4], "labels": [5]}']
    for key, column in columns.items():
        np.testing.assert_array_equal(read_column(tmp_path / "new" / "x.jsonl", key), column)
