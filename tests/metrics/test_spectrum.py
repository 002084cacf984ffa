"""Ranks and isotropy: closed forms of known spectra, invariances, plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.metrics import spectrum
from jepa_scale.metrics.spectrum import (
    covariance_entropy_rank,
    effective_rank,
    effective_rank_of_directions,
    isotropy,
)

RANKS = (effective_rank, covariance_entropy_rank)


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: list[float], d: int = 9) -> torch.Tensor:
    """Rows ±σ/√2 along one axis each, rotated and shifted: centred they have these singular values; their mean is not zero."""
    rotation, _ = torch.linalg.qr(rows(d, d).double())
    corners = torch.diag(torch.tensor(values, dtype=torch.float64)) / math.sqrt(2)
    corners = torch.nn.functional.pad(corners, (0, d - len(values)))
    return torch.cat([corners, -corners]) @ rotation + 3


def exp_entropy(weights: list[float]) -> float:
    return math.exp(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(8, 30), st.floats(1e-3, 1e3), st.floats(-100, 100), st.integers(0, 1000))
def test_k_equal_orthogonal_directions_have_rank_k(k, d, scale, shift, seed):
    rotation, _ = torch.linalg.qr(rows(d, d, seed).double())
    corners = torch.eye(d, dtype=torch.float64)[:k] * scale
    x = torch.cat([corners, -corners]) @ rotation + shift
    for rank in RANKS:
        assert float(rank(x)) == pytest.approx(k, rel=1e-6)  # fewer rows than features, or more
        assert float(rank(x.repeat(6, 1))) == pytest.approx(k, rel=1e-6)


@pytest.mark.parametrize("values", [[3.0, 1.0], [5.0, 2.0, 1.0], [8.0, 4.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1e-3]])
def test_ranks_of_known_spectra(values):
    x = with_singular_values(values)
    assert float(effective_rank(x)) == pytest.approx(exp_entropy(values), rel=1e-9)
    assert float(covariance_entropy_rank(x)) == pytest.approx(exp_entropy([v**2 for v in values]), rel=1e-9)


def test_what_the_two_ranks_of_one_spectrum_are():
    """With σ = 3, 1 the shares are 3/4 and 1/4 of the singular values, 9/10 and 1/10 of the variance."""
    x = with_singular_values([3.0, 1.0])
    assert float(effective_rank(x)) == pytest.approx(4 / 3**0.75)
    assert float(covariance_entropy_rank(x)) == pytest.approx(10 / 9**0.9)


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 1000))
def test_ranks_equal_plain_references_and_are_ordered(n, d, seed):
    x = rows(n, d, seed) * torch.logspace(0, -3, d) + 1
    centred = x.double() - x.double().mean(0)
    singular = torch.linalg.svdvals(centred)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0).reshape(d, d))
    effective, entropy = float(effective_rank(x)), float(covariance_entropy_rank(x))
    assert effective == pytest.approx(exp_entropy([float(s) for s in singular if s > 1e-9]), rel=1e-5)
    assert entropy == pytest.approx(exp_entropy([float(e) for e in eigenvalues if e > 1e-18]), rel=1e-5)
    assert 1 - 1e-9 <= entropy <= effective + 1e-9 and effective <= min(n - 1, d) + 1e-9


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_of_chunks_is_that_of_all(rank, monkeypatch):
    x = rows(50, 6)
    expected = rank(x)
    monkeypatch.setattr(spectrum, "CHUNK", 7)
    torch.testing.assert_close(rank(x), expected)


@pytest.mark.parametrize("n", [0, 1, 3, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("rank", RANKS)
def test_rows_that_are_all_the_same_have_no_direction(rank, n, value):
    x = torch.full((n, 20), value) * torch.linspace(1, 2, 20)
    assert float(rank(x)) == 0
    wide = (torch.linspace(1, 2, 20).double() * value / 3).expand(n, 20)  # their mean is rounded
    assert float(rank(wide)) == 0


@pytest.mark.parametrize("rank", RANKS)
def test_rounding_is_no_direction(rank):
    x = torch.outer(rows(500, 1)[:, 0].double(), rows(400, 1, seed=1)[:, 0].double())
    assert float(rank(x)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_of_rows_that_are_not_finite_is_nan(rank):
    for bad in (math.nan, math.inf):
        assert rank(torch.tensor([[1.0, bad], [0.0, 1.0], [2.0, 3.0]])).isnan()


def test_the_rank_of_directions_sees_neither_lengths_nor_a_way_and_its_opposite():
    line = rows(30, 1) @ rows(1, 9)
    assert float(effective_rank_of_directions(line)) == pytest.approx(1, rel=1e-6)
    assert float(effective_rank_of_directions(torch.eye(5) * torch.logspace(0, 3, 5))) == pytest.approx(5, rel=1e-6)
    near = rows(200, 6) + 1000  # centred they use all directions, and they all point one way
    assert float(effective_rank_of_directions(near)) < 1.1 and float(effective_rank(near)) > 5
    # cos and sin of 30 degrees along the first axis and ± the second: singular values in the ratio √3 : 1
    two = torch.tensor([[math.sqrt(3), 1.0], [math.sqrt(3), -1.0]])
    assert float(effective_rank_of_directions(two)) == pytest.approx(exp_entropy([math.sqrt(3), 1.0]), rel=1e-6)


def test_isotropy_is_1_for_every_direction_alike_and_small_for_one():
    assert float(isotropy(torch.cat([torch.eye(4), -torch.eye(4)]))) == pytest.approx(1, rel=1e-6)
    assert float(isotropy(7 * torch.ones(5, 4))) == pytest.approx(math.exp(-2), rel=1e-6)
    assert 0.5 < float(isotropy(rows(4000, 8))) <= 1
    assert float(isotropy(rows(4000, 8) + 3)) < 0.3
    assert math.isnan(float(isotropy(torch.zeros(0, 4))))
    assert float(isotropy(rows(50, 6))) == pytest.approx(float(isotropy(9 * rows(50, 6))), rel=1e-5)
