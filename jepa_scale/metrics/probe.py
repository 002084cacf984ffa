"""Probes of frozen representations: labels predicted by nearest neighbours and by a linear classifier.

All functions take the rows of all ranks; none is collective. All are deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024
"""Number of test rows that are compared with all training rows at a time."""
PENALTIES = (1.0, 0.1, 0.01, 0.001)
"""Values of the penalty λ that a linear probe is chosen from."""
HELD_OUT = 5
"""One of this many training rows of each class is held out to choose λ."""


class Labelled(NamedTuple):
    """Representations with labels.

    Attributes:
        rows: (n, d). labels: (n,) int64, 0 … C−1.
    """

    rows: Tensor
    labels: Tensor


def majority(train: Labelled, test: Labelled) -> float:
    """Accuracy of the constant prediction of the most frequent training class (of several, the first): chance level."""
    return float((test.labels == train.labels.bincount().argmax()).double().mean())


@torch.no_grad()
def neighbour_predictions(train: Labelled, rows: Tensor, neighbours: int) -> Tensor:
    """Predict a class for each row by the vote of its k nearest training rows in cosine. (m, d) → (m,) int64.

    A vote has the weight e^cosine. Cosines are rounded to six decimals, the precision of fp32 states. Of equally near
    neighbours the earlier row is taken; of classes with equal votes, the lower label.
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
        """Class logits: (m, d) → (m, C)."""
        return (rows.double() - self.mean) * self.scale @ self.weight + self.bias

    def predictions(self, rows: Tensor) -> Tensor:
        """Predicted classes: (m, d) → (m,) int64."""
        return _first_of_largest(self.logits(rows))


@torch.no_grad()
def linear_probe(train: Labelled, classes: int) -> LinearProbe:
    """Fit a linear probe and choose its λ from ``PENALTIES``.

    λ is chosen by the accuracy on held-out training rows (see ``HELD_OUT``), and among equals by the cross-entropy there.
    If every class is too small to hold rows out, λ is the second smallest.
    """
    order = _index_in_class(train.labels, classes)
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
    """Minimise mean cross-entropy + λ/2 · ‖weight‖² by L-BFGS on all rows in float64.

    Features are standardised to mean 0 and variance 1 (biased) on the training rows. A feature that is constant there, up
    to fp32 rounding, is ignored. The bias is not penalised.

    Args:
        penalty: λ.
        start: a probe of the same features whose weight and bias are the initial values; None = zeros.
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

    optimizer.step(loss)  # type: ignore[arg-type]  # the closure may return a tensor
    return LinearProbe(mean, scale, theta[:d].clone(), theta[d].clone(), penalty)


def _index_in_class(labels: Tensor, classes: int) -> Tensor:
    """Number of earlier rows with the same label. (n,) → (n,)."""
    before = F.one_hot(labels, classes).cumsum(dim=0)
    return before.gather(1, labels[:, None])[:, 0] - 1


def _first_of_largest(scores: Tensor) -> Tensor:
    """First column with the largest value, where ``argmax`` may return any of them. (m, C) → (m,)."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    largest = scores == scores.amax(dim=1, keepdim=True)
    return torch.where(largest, columns, len(columns) - 1).amin(dim=1)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the (m,) predictions that are correct; NaN without predictions."""
    return float((predicted == labels).double().mean())
