"""VICReg in one process: closed forms, invariances, a plain fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.vicreg import vicreg


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(a: torch.Tensor, b: torch.Tensor, gamma: float = 1.0, eps: float = 1e-4) -> torch.Tensor:
    """Reference: equations 1 to 5 with PyTorch's covariance; n > 1. (3,) in a's dtype, differentiable."""
    d = a.shape[1]
    invariance = (a - b).square().sum(dim=1).mean() / d
    variance = torch.clamp(gamma - (a.var(dim=0) + eps).sqrt(), min=0).mean()
    covariances = torch.cov(a.T).reshape(d, d)
    beside = ~torch.eye(d, dtype=torch.bool)
    return torch.stack([invariance, variance, covariances[beside].square().sum() / d])


@settings(max_examples=25)
@given(st.integers(2, 30), st.integers(1, 5), st.floats(0.1, 3), st.integers(0, 1000))
def test_values_equal_a_plain_reference(n, d, gamma, seed):
    a, b = randn(n, d, seed=seed) + 2, randn(n, d, seed=seed + 1)
    got = torch.stack(vicreg(a, b, torch.tensor(float(n)), gamma))
    torch.testing.assert_close(got, plain(a.double(), b.double(), gamma).float(), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_fp64_and_targets_get_none():
    a, b = randn(12, 4).requires_grad_(), randn(12, 4, seed=1).requires_grad_()
    weights = torch.tensor([1.0, 25.0, 3.0])
    (torch.stack(vicreg(a, b, torch.tensor(12), gamma=2.0)) * weights).sum().backward()
    wide = a.detach().double().requires_grad_()
    (plain(wide, b.detach().double(), gamma=2.0) * weights).sum().backward()
    torch.testing.assert_close(a.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)
    assert b.grad is None


def test_collapsed_rows_cost_the_whole_spread():
    a = torch.full((6, 3), 4.0)
    invariance, variance, covariance = vicreg(a, a, torch.tensor(6))
    assert float(invariance) == 0 and float(covariance) == 0
    assert float(variance) == pytest.approx(1 - 1e-4**0.5)


def test_orthogonal_features_of_enough_spread_cost_nothing():
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # unbiased variance 4/3
    assert [float(x) for x in vicreg(rows, rows, torch.tensor(4))] == [0, 0, 0]
    both = rows[:, :1].expand(4, 3)  # one feature three times: d (d − 1) covariances of 4/3
    assert float(vicreg(both, both, torch.tensor(4))[2]) == pytest.approx(2 * 16 / 9)


@settings(max_examples=25)
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=3), st.integers(0, 1000))
def test_a_common_shift_changes_nothing(shift, seed):
    a, b, shift = randn(20, 3, seed=seed), randn(20, 3, seed=seed + 1), torch.tensor(shift)
    got = torch.stack(vicreg(a + shift, b + shift, torch.tensor(20)))
    torch.testing.assert_close(got, torch.stack(vicreg(a, b, torch.tensor(20))), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n):
    a, b = randn(n, 3).requires_grad_(), torch.zeros(n, 3)
    invariance, variance, covariance = vicreg(a, b, torch.tensor(float(n)))
    assert variance.item() == pytest.approx(0.99 * n) and covariance.item() == 0
    assert invariance.item() == pytest.approx(a.square().mean().item() if n else 0.0)
    (invariance + variance + covariance).backward()
    torch.testing.assert_close(a.grad, 2 / 3 * a.detach())


def test_half_precision_is_computed_in_fp32_even_under_autocast():
    a, b = randn(40, 4).bfloat16(), randn(40, 4, seed=1).bfloat16()
    expected = vicreg(a.float(), b.float(), torch.tensor(40))
    with torch.autocast("cpu", torch.bfloat16):
        got = vicreg(a, b, torch.tensor(40))
    assert got[0].dtype == torch.float32
    assert torch.equal(torch.stack(got), torch.stack(expected))
