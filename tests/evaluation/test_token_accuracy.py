"""Accuracy of labels and of whole rows, against counting them one by one."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.evaluation.token_accuracy import evaluate
from jepa_scale.packing import IGNORE, Segment, Views, pack

ROWS = st.lists(st.lists(st.sampled_from(["right", "wrong", "none"]), min_size=1, max_size=5), min_size=1, max_size=9)


@settings(deadline=None)
@given(ROWS, st.integers(1, 4))
def test_against_counting(rows, size):
    def batch(some):
        labels = [[IGNORE if each == "none" else int(each == "right") for each in row] for row in some]
        return pack([Views([Segment(np.ones(len(row), np.int64), "text", labels=np.array(row))]) for row in labels])

    def matches(packed):
        sequence = packed.sequences["main"]
        return sequence.labels[sequence.labelled] == 1

    batches = [batch(rows[start : start + size]) for start in range(0, len(rows), size)]
    found = evaluate(matches, {"test": lambda: batches}, torch.device("cpu"))
    labels = [each for row in rows for each in row if each != "none"]
    whole = [set(row) - {"none"} == {"right"} for row in rows if set(row) != {"none"}]
    if not labels:
        assert found == {}
        return
    assert found["test"] == {"accuracy": labels.count("right") / len(labels), "exact_match": sum(whole) / len(whole)}
