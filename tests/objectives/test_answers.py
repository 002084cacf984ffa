"""Answers of a language model: speaking, likelihoods and ranks against brute force."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.objectives.answers import LanguageModelAnswerGenerator, rank_of
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from tests.objectives.helpers import DATA, alone, backbone

MODEL = backbone(seed=3)
OBJECTIVE = LanguageModeling(LmOptions(), MODEL, DATA)
FACTS = [DATA.splits["test"][i] for i in range(5)]


def answer_generator(**options):
    with torch.no_grad():
        made = LanguageModelAnswerGenerator(
            lambda task, batch: getattr(OBJECTIVE, task)(MODEL, batch).detach(), **options
        )
    made.prepare(list(DATA.names))
    return made


@torch.no_grad()
def log_likelihood(prompt, answer):
    states = alone(MODEL, [*prompt, *answer[:-1]])
    log_probs = F.log_softmax(MODEL.logits(states)[len(prompt) - 1 :], dim=-1)
    return sum(log_probs[i, token].item() for i, token in enumerate(answer))


def test_nll_is_the_sum_over_the_answers_tokens():
    expected = [-log_likelihood(f.prompt, f.answer) for f in FACTS]
    np.testing.assert_allclose(answer_generator().nll(FACTS), expected, rtol=1e-4)


def test_speaking_is_greedy():
    for fact, spoken in zip(FACTS, answer_generator().verbalize(FACTS, 2), strict=True):
        tokens = list(fact.prompt)
        for _ in range(2):
            tokens.append(int(MODEL.logits(alone(MODEL, tokens))[-1].argmax()))
        assert spoken == tuple(tokens[len(fact.prompt) :])


def test_ranks_compare_the_joint_likelihood_of_every_name():
    expected = []
    for fact in FACTS:
        scores = [log_likelihood(fact.prompt, name) for name in DATA.names]
        own = log_likelihood(fact.prompt, fact.answer)
        expected.append(1 + sum(s > own + 1e-6 for s in scores))
    for chunk in (7, 10_000):
        np.testing.assert_allclose(answer_generator(chunk=chunk).ranks(FACTS), expected)


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.data())
def test_rank_is_the_mean_of_best_and_worst_place_among_ties(scores, data):
    right = data.draw(st.integers(0, len(scores) - 1))
    ordered = sorted(scores, reverse=True)
    best = ordered.index(scores[right]) + 1
    worst = best + ordered.count(scores[right]) - 1
    got = rank_of(torch.tensor([scores], dtype=torch.float32), torch.tensor([right]))
    assert got.tolist() == [(best + worst) / 2]
