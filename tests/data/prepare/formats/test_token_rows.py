"""Rows of token ids with labels: Hugging Face's form, labels at their own token, padding, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.prepare.base import BadRecord, LeftOut, PrepareOptions, Record
from jepa_scale.data.prepare.formats.rows import match
from jepa_scale.data.prepare.formats.token_rows import token_record
from jepa_scale.packing import IGNORE

ROWS = st.lists(st.tuples(st.integers(0, 99), st.one_of(st.just(IGNORE), st.integers(0, 99))), min_size=2, max_size=12)


def record(**row) -> Record:
    return token_record("f:1", row)


@settings(deadline=None)
@given(ROWS)
def test_labels_are_shifted_as_in_hugging_face(row):
    """The label at i is predicted at token i − 1, as ``ForCausalLM`` shifts them; the first one is predicted nowhere."""
    ids, labels = map(list, zip(*row, strict=True))
    if all(label == IGNORE for label in labels[1:]):
        with pytest.raises(LeftOut, match="no label"):
            record(input_ids=ids, labels=labels)
        return
    made = record(input_ids=ids, labels=labels).value
    assert made["tokens"].tolist() == ids
    assert {t: int(y) for t, y in enumerate(made["labels"]) if y != IGNORE} == {
        i - 1: y for i, y in enumerate(labels) if i > 0 and y != IGNORE
    }


@settings(deadline=None)
@given(ROWS)
def test_token_labels_are_predicted_where_they_stand(row):
    ids, labels = map(list, zip(*row, strict=True))
    if all(label == IGNORE for label in labels):
        with pytest.raises(LeftOut, match="no label"):
            record(input_ids=ids, token_labels=labels)
        return
    made = record(input_ids=ids, token_labels=labels).value
    assert made["tokens"].tolist() == [*ids, ids[-1]]  # the last token is never an input
    assert made["labels"].tolist() == [*labels, IGNORE]


def test_without_labels_there_are_none():
    assert list(record(input_ids=[1, 2, 3]).value) == ["tokens"]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
@pytest.mark.parametrize("name", ["labels", "token_labels"])
def test_padding_at_the_ends_is_removed_with_its_labels(mask, name):
    ids, labels = np.arange(5) + 10, np.arange(5) + 20
    kept = np.flatnonzero(mask)
    padded = record(input_ids=ids.tolist(), attention_mask=mask, **{name: labels.tolist()}).value
    plain = record(input_ids=ids[kept].tolist(), **{name: labels[kept].tolist()}).value
    assert all((padded[key] == plain[key]).all() for key in ("tokens", "labels"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "f:1: labels and input_ids differ in length: 1 and 2"),
        ({"input_ids": [1, 2], "token_labels": [1, 2, 3]}, "token_labels and input_ids differ in length"),
        ({"input_ids": [1, 2], "labels": [1, 2], "token_labels": [1, 2]}, "has both labels and token_labels"),
        ({"input_ids": [1, -1]}, "field 'input_ids' has a number that is no id: -1"),
        ({"input_ids": [1, -100], "labels": [1, 2]}, "field 'input_ids' has a number that is no id: -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "field 'labels' has a number that is no id: -1"),
        ({"input_ids": [1, 2**31]}, "no id: 2147483648"),
        ({"input_ids": [1.0, 2]}, "field 'input_ids' is no list of integers"),
        ({"input_ids": [True, 2]}, "field 'input_ids' is no list of integers"),
        ({"input_ids": [[1, 2]]}, "field 'input_ids' is no list of integers"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "masks tokens in the middle"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "field 'attention_mask' is no list of 0 and 1"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "field 'attention_mask' is no list of 0 and 1"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "padding alone"),
    ],
)
def test_what_is_refused(row, message):
    with pytest.raises(BadRecord) as error:
        record(**row)
    assert message in str(error.value)


def test_columns_without_use_are_named():
    assert record(input_ids=[1, 2], completion_mask=[0, 1]).unused == ("column completion_mask",)


def test_rows_are_recognised_by_their_ids_unless_they_have_texts_or_messages():
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    assert match(row, PrepareOptions()).kind == "tokens"
    assert match({**row, "text": "a"}, PrepareOptions()).kind == "text"
    assert match({**row, "text": "a"}, PrepareOptions(kind="tokens")).kind == "tokens"
    assert match(row, PrepareOptions(kind="text")) is None
