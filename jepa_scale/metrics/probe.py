"""What is in a representation that nobody trained it for: labels read off frozen states, by neighbours and by a linear map.

Rows are whole here; nothing in this file is collective, and the same rows give the same figures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Test rows at a time that are compared with all training rows."""
PENALTIES = (1.0, 0.1, 0.01, 0.001)
"""λ that a linear probe may choose among."""
HELD_OUT = 5
"""Of each class, every so many-th training row is held out while λ is chosen."""


class Labelled(NamedTuple):
    """rows: (n, d). labels: (n,) int64, 0 … C−1."""

    rows: Tensor
    labels: Tensor


def majority(train: Labelled, test: Labelled) -> float:
    """Accuracy of who always answers the most frequent class of the training rows (of several, the first): chance."""
    return float((test.labels == train.labels.bincount().argmax()).double().mean())


@torch.no_grad()
def neighbour_predictions(train: Labelled, rows: Tensor, neighbours: int) -> Tensor:
    """(m, d) → (m,) int64: the vote of the k nearest training rows by cosine.

    A vote weighs e^cosine. Cosines count to six decimals, as the states of fp32 do. Of equally near neighbours the earlier
    counts, of classes with equal votes the lower.
    """
    k, classes = min(neighbours, len(train.rows)), int(train.labels.max()) + 1
    pool = F.normalize(train.rows.double(), dim=1)
    found = []
    for part in rows.split(CHUNK):
        cosine = (F.normalize(part.double(), dim=1) @ pool.T).round(decimals=6)
        nearest, order = cosine.sort(dim=1, descending=True, stable=True)
        votes = cosine.new_zeros(len(part), classes)
        votes.scatter_add_(1, train.labels[order[:, :k]], nearest[:, :k].exp())
        found.append(_first_of_largest(votes))
    return torch.cat(found)


class LinearProbe(NamedTuple):
    """A multinomial logistic regression on standardised features.

    Attributes:
        mean, scale: (d,) float64 of the features. weight: (d, C), bias: (C,) float64.
        penalty: λ.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def logits(self, rows: Tensor) -> Tensor:
        """(m, d) → (m, C)."""
        return (rows.double() - self.mean) * self.scale @ self.weight + self.bias

    def predictions(self, rows: Tensor) -> Tensor:
        """(m, d) → (m,) int64."""
        return _first_of_largest(self.logits(rows))


@torch.no_grad()
def linear_probe(train: Labelled, classes: int) -> LinearProbe:
    """Fit a probe; λ is the one of ``PENALTIES`` with which most of the held-out training rows (see ``HELD_OUT``) are right, of
    several the one with the least cross-entropy there. Where every class is too small to hold rows out, it is the second
    smallest."""
    order = _place_in_class(train.labels, classes)
    held = order % HELD_OUT == HELD_OUT - 1
    if not held.any():
        return fit_probe(train, classes, sorted(PENALTIES)[1])
    part, rest = (Labelled(train.rows[which], train.labels[which]) for which in (~held, held))
    scores, fitted = [], None
    for penalty in PENALTIES:
        fitted = fit_probe(part, classes, penalty, fitted)
        loss = float(F.cross_entropy(fitted.logits(rest.rows), rest.labels))
        scores.append((-accuracy(fitted.predictions(rest.rows), rest.labels), loss))
    return fit_probe(train, classes, PENALTIES[scores.index(min(scores))])


@torch.no_grad()
def fit_probe(train: Labelled, classes: int, penalty: float, start: LinearProbe | None = None) -> LinearProbe:
    """The minimum of mean cross-entropy + λ/2 · ‖weight‖², by L-BFGS on all rows in float64. Features have mean 0 and
    variance 1 (biased) on the training rows; one that is constant there, to fp32 rounding, counts nothing. The bias is not
    penalised.

    Args:
        start: of the same features, to begin at.
    """
    rows, labels = train.rows.double(), train.labels
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
    constant = std <= 1e-6 * mean.abs()
    scale = torch.where(constant, 0.0, 1 / torch.where(constant, 1.0, std))
    x = (rows - mean) * scale
    wanted = F.one_hot(labels, classes).double()
    n, d = x.shape
    theta = x.new_zeros(d + 1, classes) if start is None else torch.cat([start.weight, start.bias[None]])
    theta.grad = torch.zeros_like(theta)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=300,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        logits = x @ theta[:d] + theta[d]
        log_probs = torch.log_softmax(logits, dim=1)
        error = (log_probs.exp() - wanted) / n
        assert theta.grad is not None
        torch.mm(x.T, error, out=theta.grad[:d])
        theta.grad[:d] += penalty * theta[:d]
        theta.grad[d] = error.sum(dim=0)
        return -(log_probs * wanted).sum() / n + penalty / 2 * theta[:d].square().sum()

    optimizer.step(loss)  # type: ignore[arg-type]  # its closure may return a tensor
    return LinearProbe(mean, scale, theta[:d].clone(), theta[d].clone(), penalty)


def _place_in_class(labels: Tensor, classes: int) -> Tensor:
    """(n,) → (n,): how many earlier rows have the same label."""
    before = F.one_hot(labels, classes).cumsum(dim=0)
    return before.gather(1, labels[:, None])[:, 0] - 1


def _first_of_largest(scores: Tensor) -> Tensor:
    """(m, C) → (m,), the first column of the largest value; ``argmax`` may take any of equal ones."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    largest = scores == scores.amax(dim=1, keepdim=True)
    return torch.where(largest, columns, len(columns) - 1).amin(dim=1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the (m,) predictions that are right; NaN without any."""
    return float((predicted == labels).double().mean())
