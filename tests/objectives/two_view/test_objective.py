"""`two_view` against a plain reference: one sequence at a time, no packing."""

import pytest
import torch
import torch.nn.functional as F

from jepa_scale.objectives.two_view.objective import TwoView, TwoViewOptions
from jepa_scale.packing import IGNORE
from tests.objectives.helpers import DATA, alone, backbone, batch_of

FACTS = [*(DATA.splits["train"][i] for i in range(6)), *(DATA.splits["atomic"][i] for i in range(3))]


def make(model, **options):
    return TwoView(TwoViewOptions(**options), model, DATA)


def reference(model, options):
    """(lm, jepa) as GPT2WithJEPA describes them."""
    lm, pairs = [], []
    for fact in FACTS:
        question = [*fact.subject, fact.relation, fact.mask]
        forward = [*question, *fact.object, *[DATA.special["pred"]] * options.predictor_tokens]
        states = alone(model, forward)
        for i, token in enumerate(fact.object):
            lm.append(F.cross_entropy(model.logits(states)[len(question) - 1 + i], torch.tensor(token)))
        if fact.kind == "train":
            inverse = (
                fact.relation + 1 if (fact.relation - DATA.special["relations"][0]) % 2 == 0 else fact.relation - 1
            )
            back = alone(model, [*fact.object, inverse, fact.mask, *fact.subject])
            pairs.append((states[-1], back[-1]))
    a, b = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    if options.distance == "infonce":
        scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / options.temperature
        jepa = F.cross_entropy(scores, torch.arange(len(a)))
    else:
        jepa = {
            "cosine": lambda: (1 - F.cosine_similarity(a, b)).mean(),
            "l2": lambda: (a - b).norm(dim=-1).mean(),
            "mse": lambda: F.mse_loss(a, b),
        }[options.distance]()
    return torch.stack(lm).mean(), jepa


@pytest.mark.parametrize("predictor_tokens", [0, 1, 4])
@pytest.mark.parametrize("distance", ["cosine", "l2", "mse", "infonce"])
def test_loss_and_gradient_equal_the_plain_reference(distance, predictor_tokens):
    model = backbone()
    objective = make(model, distance=distance, predictor_tokens=predictor_tokens, jepa_weight=0.7, lm_weight=1.3)
    loss = objective.loss(model, batch_of(objective, FACTS), [], 0)
    loss.total.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    lm, jepa = reference(model, objective.options)
    (1.3 * lm + 0.7 * jepa).backward()
    torch.testing.assert_close(loss.means["lm_loss"], lm.detach())
    torch.testing.assert_close(loss.means["jepa_loss"], jepa.detach(), atol=1e-5, rtol=1e-4)
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-3)


def test_only_train_facts_are_paired_and_only_answers_are_labelled():
    model = backbone()
    objective = make(model)
    batch = batch_of(objective, FACTS)
    assert batch.counts["pairs"] == 6 and len(batch.segments["reverse"]) == 6
    assert batch.counts["labels"] == 2 * len(FACTS)
    stream = batch.sequences["main"]
    answers = {token for fact in FACTS for token in fact.object}
    assert set(stream.labels[stream.labels != IGNORE].tolist()) <= answers


def test_loss_dropout_is_drawn_from_the_step_alone():
    model = backbone()
    objective = make(model, loss_dropout=0.5)
    kept = []
    for step in range(40):
        counts = {batch_of(objective, FACTS, step, first).counts["pairs"] for first in (0, 100)}  # as on two ranks
        assert len(counts) == 1 and counts <= {0, 6}
        kept.append(counts.pop() > 0)
    assert 8 < sum(kept) < 32


def test_a_batch_without_pairs_has_a_finite_loss():
    model = backbone()
    for distance in ("cosine", "infonce"):
        objective = make(model, distance=distance)
        loss = objective.loss(model, batch_of(objective, FACTS[6:]), [], 0)
        loss.total.backward()
        assert loss.means["jepa_loss"] == 0 and torch.isfinite(loss.total)


def test_weight_zero_makes_no_reverse_views():
    objective = make(backbone(), jepa_weight=0.0)
    assert "reverse" not in batch_of(objective, FACTS).segments
