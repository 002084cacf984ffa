"""InfoNCE of predicted concepts in a loop over the facts, and an objective's loss and gradients beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives.helpers import alone, batch_of


def unit_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).add(1e-12).sqrt()


def infonce(model: Any, objective: Any, facts: Sequence[Any], relation: Callable[[Any], tuple[Tensor, Any]]) -> Tensor:
    """Every name is encoded by itself, and every distinct name is one candidate.

    Args:
        relation: of a fact, (1, hidden) before its norm, and its index or None.
    """
    names = sorted({name for fact in facts for name in (fact.subject, fact.object)})
    concepts = {n: unit_rms(alone(model, list(n), until=objective.tap)[-1]) for n in names}
    losses = []
    for fact in facts:
        vector, index = relation(fact)
        predicted = objective.predictor(concepts[fact.subject][None], unit_rms(vector), index)[0]
        scores = torch.stack([F.cosine_similarity(predicted, concepts[n], dim=0) for n in names])
        losses.append(-torch.log_softmax(scores * objective.scale(), 0)[names.index(fact.object)])
    return torch.stack(losses).mean()


def check_infonce(model: Any, objective: Any, facts: list[Any], relation: Callable[[Any], tuple[Tensor, Any]]) -> None:
    """The objective's loss and the decoder's gradients are those of :func:`infonce`; ``lm_weight`` is 0."""
    loss = objective.loss(model, batch_of(objective, facts), [], 0)
    loss.total.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = infonce(model, objective, facts, relation)
    expected.backward()
    torch.testing.assert_close(loss.means["jepa_loss"], expected.detach(), atol=1e-5, rtol=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-3)
