"""Metrics of a split, with answerers whose answers are known."""

import numpy as np
import pytest
import torch

from jepa_scale.evaluation.options import EvalOptions
from jepa_scale.evaluation.reversal import evaluate
from tests.objectives.helpers import DATA


class Knows:
    """Speaks the right name of even relations only; ranks everything second."""

    def __init__(self):
        self.asked = []

    def prepare(self, answers):
        assert len(answers) == len(DATA.names)

    def verbalize(self, questions, length):
        assert length == 2
        self.asked += questions
        return [q.answer if q.relation % 2 == 0 else (0, 0) for q in questions]

    def nll(self, questions):
        return np.full(len(questions), 0.25)

    def ranks(self, questions):
        return np.full(len(questions), 2.0)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("limit", [0, 13])
def test_metrics_are_means_over_facts(batch_size, limit):
    answer_generator = Knows()
    options = EvalOptions(max_facts=limit, rank_facts=5, batch_size=batch_size)
    results = evaluate(answer_generator, {"test": DATA.splits["test"]}, list(DATA.names), options, torch.device("cpu"))
    asked = answer_generator.asked
    assert len(asked) == (limit or len(DATA.splits["test"]))
    assert len({(q.subject, q.relation) for q in asked}) == len(asked)
    expected = sum(q.relation % 2 == 0 for q in asked) / len(asked)
    assert results["test"] == {"exact_match": pytest.approx(expected), "mrr": 0.5, "joint_nll": 0.25}


class Unequal(Knows):
    """Ranks the right name first or fourth, in turn."""

    def ranks(self, questions):
        return np.where(np.arange(len(questions)) % 2, 4.0, 1.0)


def test_the_mean_is_of_reciprocal_ranks():
    options = EvalOptions(max_facts=8, rank_facts=4, batch_size=8)
    results = evaluate(Unequal(), {"test": DATA.splits["test"]}, list(DATA.names), options, torch.device("cpu"))
    assert results["test"]["mrr"] == pytest.approx((1 + 1 / 4) / 2)


def test_a_split_without_facts_has_no_metrics():
    splits = {"test": DATA.splits["test"], "train": DATA.splits["train"][:0]}
    results = evaluate(Knows(), splits, list(DATA.names), EvalOptions(), torch.device("cpu"))
    assert results.keys() == {"test"}
