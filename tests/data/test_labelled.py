"""Labelled texts: what is read, how the sides are chosen, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.data.labelled import _split, read_labelled
from jepa_scale.utils.errors import InputError


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows(counts: dict[Any, int], **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"{label} {i}", "label": label, **more} for label, n in counts.items() for i in range(n)]


def test_classes_are_sorted_and_each_has_both_sides(tmp_path):
    found = read_labelled(write(tmp_path / "l.jsonl", rows({"b": 10, "a": 5, 3: 2, "alone": 1})), 0.3)
    assert found.classes == ["3", "a", "b"] and found.left_out == 1
    assert found.labels.tolist() == [2] * 10 + [1] * 5 + [0] * 2
    assert found.texts[0] == "b 0" and found.where[10] == f"{tmp_path / 'l.jsonl'}:11"
    tests = [int((~found.train[found.labels == n]).sum()) for n in range(3)]
    assert tests == [1, 2, 3]  # of 2, 5 and 10


def test_the_files_own_split_counts(tmp_path):
    given_rows = [
        *rows({"a": 2, "b": 1}, split="train"),
        *rows({"a": 1, "b": 2}, split="test"),
        *rows({"c": 4}, split="test"),
    ]
    found = read_labelled(write(tmp_path / "l.jsonl", given_rows), 0.3)
    assert found.train.tolist() == [True, True, True, False, False, False] and found.left_out == 4


@given(st.lists(st.integers(0, 3), max_size=40), st.floats(0.01, 0.99))
def test_a_split_is_stratified_and_depends_on_no_other_class(labels, fraction):
    names = [str(n) for n in labels]
    train = _split(names, fraction)
    for name in set(names):
        mine = np.array([n == name for n in names])
        n = int(mine.sum())
        assert (~train[mine]).sum() == min(max(1, round(fraction * n)), n - 1)
        np.testing.assert_array_equal(train[mine], _split([name] * n, fraction))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "invalid JSON"),
        ("[1]", "not a row"),
        ({"label": "a"}, "needs a text that is not empty"),
        ({"text": " \n", "label": "a"}, "needs a text that is not empty"),
        ({"text": 3, "label": "a"}, "needs a text that is not empty"),
        ({"text": "x"}, "needs a label"),
        ({"text": "x", "label": ""}, "needs a label"),
        ({"text": "x", "label": 0.5}, "needs a label"),
        ({"text": "x", "label": "a", "split": "valid"}, "split must be train or test"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "l.jsonl", [*rows({"a": 2, "b": 2}), row])
    with pytest.raises(InputError) as caught:
        read_labelled(path, 0.3)
    assert str(caught.value).startswith(f"{path}:5: {message}") and "\n" not in str(caught.value)


def test_some_rows_with_a_split_are_refused(tmp_path):
    path = write(tmp_path / "l.jsonl", [*rows({"a": 2}), {"text": "x", "label": "b", "split": "test"}])
    with pytest.raises(InputError, match=r"l.jsonl:1: has no split, but .*l.jsonl:3 has"):
        read_labelled(path, 0.3)
    path = write(tmp_path / "m.jsonl", [{"text": "x", "label": "b", "split": "test"}, *rows({"a": 2})])
    with pytest.raises(InputError, match=r"m.jsonl:2: has no split, but .*m.jsonl:1 has"):
        read_labelled(path, 0.3)


@pytest.mark.parametrize(
    "counts", [{}, {"a": 9}, {"a": 9, "b": 1}], ids=["nothing", "one class", "a class of one text"]
)
def test_fewer_than_two_classes_are_refused(tmp_path, counts):
    with pytest.raises(InputError, match=r"of \d labels have texts both to train .* a probe needs two"):
        read_labelled(write(tmp_path / "l.jsonl", rows(counts)), 0.3)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.jsonl: cannot be read: No such file"):
        read_labelled(tmp_path / "nowhere.jsonl", 0.3)
