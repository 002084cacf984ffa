"""Probes against brute force and a Newton method, and on data for which the accuracy is known."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.metrics import probe
from jepa_scale.metrics.probe import Labelled, accuracy, fit_probe, linear_probe, majority, neighbour_predictions


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(n: int, classes: int, d: int, apart: float, seed: int) -> Labelled:
    """Gaussian clusters far from the origin; the random centres are the same for every seed."""
    labels = torch.arange(n) % classes
    return Labelled(apart * normal(classes, d)[labels] + normal(n, d, seed=seed + 1) + 20, labels)


# ------------------------------------------------------------------------------------------------------ neighbours


@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 15), st.integers(0, 10**6))
def test_neighbours_vote_as_in_a_loop(n, m, k, seed):
    """Rows on a coarse grid, where many cosines and votes are equal."""
    grid = torch.Generator().manual_seed(seed)
    rows, others = (torch.randint(-1, 2, (count, 2), generator=grid).float() for count in (n, m))
    labels = torch.randint(0, 3, (n,), generator=grid)
    expected = []
    for other in others:
        cosines = [float(F.normalize(a.double(), dim=0) @ F.normalize(other.double(), dim=0)) for a in rows]
        nearest = sorted(range(n), key=lambda i: (-round(cosines[i], 6), i))[:k]
        votes: dict[int, float] = defaultdict(float)
        for i in nearest:
            votes[int(labels[i])] += math.exp(cosines[i])
        best = max(votes.values())
        expected.append({label for label, vote in votes.items() if vote > best - 1e-5})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probe, "CHUNK", 2)
        got = neighbour_predictions(Labelled(rows, labels), others, k).tolist()
    for label, allowed in zip(got, expected, strict=True):
        assert label in allowed


def test_of_equal_votes_the_lower_class_wins_and_of_equal_neighbours_the_earlier():
    train = Labelled(torch.ones(4, 2), torch.tensor([2, 1, 1, 2]))
    assert neighbour_predictions(train, torch.ones(1, 2), 1).tolist() == [2]
    assert neighbour_predictions(train, torch.ones(1, 2), 3).tolist() == [1]
    assert neighbour_predictions(train, torch.ones(1, 2), 4).tolist() == [1]


def test_near_neighbours_weigh_more():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    train = Labelled(rows, torch.tensor([0, 1, 1]))
    assert neighbour_predictions(train, rows[:1], 3).tolist() == [0]


# ------------------------------------------------------------------------------------------------------ linear probe


def test_a_probe_is_the_minimum_that_newton_finds():
    train, classes, penalty = Labelled(3 * normal(30, 2) + torch.tensor([5.0, -1.0]), torch.arange(30) % 3), 3, 0.05
    x = (train.rows.double() - train.rows.double().mean(0)) / train.rows.double().std(0, correction=0)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        weight, bias = theta[:6].view(2, 3), theta[6:]
        return F.cross_entropy(x @ weight + bias, train.labels) + penalty / 2 * weight.square().sum()

    theta = torch.zeros(9, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, theta)
        hessian = torch.autograd.functional.hessian(loss, theta)
        theta = theta - torch.linalg.lstsq(hessian, gradient).solution  # a constant added to all biases changes nothing
    got = fit_probe(train, classes, penalty)
    torch.testing.assert_close(got.weight, theta[:6].view(2, 3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.bias - got.bias.mean(), theta[6:] - theta[6:].mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.logits(train.rows), x @ got.weight + got.bias)


def test_separable_clusters_are_read_off_and_shuffled_labels_are_not():
    train, test = clusters(200, 5, 12, 4.0, 0), clusters(100, 5, 12, 4.0, 1)
    for found in (linear_probe(train, 5).predictions(test.rows), neighbour_predictions(train, test.rows, 10)):
        assert accuracy(found, test.labels) == 1
    mixed = Labelled(train.rows, train.labels[torch.randperm(200, generator=torch.Generator().manual_seed(3))])
    for found in (linear_probe(mixed, 5).predictions(test.rows), neighbour_predictions(mixed, test.rows, 10)):
        assert 0.05 < accuracy(found, test.labels) < 0.4  # 0.2 would be chance


def test_more_penalty_where_there_is_little_to_learn_from():
    """Of 150 features one determines the class; without a penalty the probe overfits to the others."""
    labels = torch.arange(300) % 2
    rows, fresh = (normal(300, 150, seed=seed) for seed in (1, 2))
    rows[:, 0] += 2 * labels
    fresh[:, 0] += 2 * labels
    train = Labelled(rows, labels)
    chosen, loose = linear_probe(train, 2), fit_probe(train, 2, min(probe.PENALTIES))
    assert chosen.penalty > loose.penalty
    loss = [float(F.cross_entropy(p.logits(fresh), labels)) for p in (chosen, loose)]
    assert loss[0] < loss[1]


def test_scale_place_and_constant_features_change_nothing():
    train, test = clusters(60, 3, 4, 1.0, 0), clusters(60, 3, 4, 1.0, 1)
    expected = linear_probe(train, 3).logits(test.rows)
    factor = torch.tensor([1e-3, 1.0, 50.0, 7.0])

    def changed(rows: torch.Tensor) -> torch.Tensor:
        noise = 1 + 1e-7 * normal(len(rows), 1)  # as different sums of the same numbers would have it
        return torch.cat([rows.double() * factor - 5, 3.0 * noise], dim=1)

    got = linear_probe(Labelled(changed(train.rows), train.labels), 3).logits(changed(test.rows))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_smallest_training_set_has_a_probe():
    train = Labelled(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
    assert linear_probe(train, 2).predictions(torch.tensor([[-0.5], [1.5]])).tolist() == [0, 1]


def test_all_rows_alike_give_the_majority():
    """A representation that has collapsed to a point, up to rounding."""
    labels = torch.tensor([0, 1, 1, 1, 2, 2] * 5)
    rows = torch.full((30, 4), 0.3) * (1 + 1e-7 * normal(30, 4))
    train = Labelled(rows, labels)
    assert majority(train, train) == pytest.approx(0.5)
    assert accuracy(linear_probe(train, 3).predictions(rows), labels) == pytest.approx(0.5)


def test_chance_is_the_most_frequent_class_of_training():
    train = Labelled(torch.zeros(5, 1), torch.tensor([1, 1, 0, 2, 2]))
    assert majority(train, Labelled(torch.zeros(4, 1), torch.tensor([0, 1, 1, 2]))) == 0.5
    assert math.isnan(accuracy(torch.zeros(0), torch.zeros(0)))
