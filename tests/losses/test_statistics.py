"""Global sums and moments in one process; tests/distributed/test_statistics.py tests several ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.statistics import (
    as_contribution,
    global_moments,
    global_sum,
    global_sums,
    off_diagonal_squares,
    rows_of_step,
    standardized,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alone_a_global_sum_is_the_tensor_in_fp32():
    x = randn(3, 4).bfloat16().requires_grad_()
    total = global_sum(x)
    assert total.dtype == torch.float32
    assert torch.equal(total, x.float())
    (total * torch.arange(4.0)).sum().backward()
    assert torch.equal(x.grad.float(), torch.arange(4.0).expand(3, 4))


def test_several_sums_keep_their_shapes_and_gradients():
    x, y = randn(3, 2).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    matrix, scalar, nothing = global_sums(x.T, y, x.new_zeros(0))
    assert torch.equal(matrix, x.T) and torch.equal(scalar, y) and nothing.shape == (0,)
    (matrix.square().sum() * scalar).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())
    torch.testing.assert_close(y.grad, x.detach().square().sum())


def test_rows_of_a_step_are_in_its_order_and_only_own_ones_have_gradient():
    parts = [randn(n, 2, seed=n).requires_grad_() for n in (2, 0, 3)]
    for micro, own in enumerate(parts):
        rows = rows_of_step(own, [p * 1 for p in parts], micro)  # collected with a graph, to see that it is cut
        assert torch.equal(rows, torch.cat(parts))
        gradients = torch.autograd.grad(rows.sum(), parts, allow_unused=True)
        assert [g is not None for g in gradients] == [i == micro for i in range(3)]
    assert rows_of_step(parts[0], [], 0) is parts[0]
    with pytest.raises(AssertionError):
        rows_of_step(parts[0], [parts[2], parts[0]], 0)


def test_a_contribution_has_the_whole_gradient_and_a_part_of_the_number():
    x = torch.tensor(3.0, requires_grad=True)
    contribution = as_contribution(x.square(), torch.tensor(0.25))
    assert contribution.item() == 9 / 4
    contribution.backward()
    assert x.grad == 6
    assert as_contribution(x.square(), torch.tensor(0.0)).item() == 0


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_moments_are_those_of_plain_fp64(n, d, e, seed):
    a, b = randn(n, d, seed=seed) + 5, randn(n, e, seed=seed + 1) * 3
    got = global_moments(a, b, torch.tensor(float(n)), b.sum())
    a, b = a.double(), b.double()
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    expected = [a.mean(0), b.mean(0), centred_a.square().sum(0), centred_b.square().sum(0), centred_a.T @ centred_b]
    for moment, want in zip(got[:-1], expected, strict=True):
        torch.testing.assert_close(moment, want.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.more[0], b.sum().float(), rtol=1e-4, atol=1e-4)


def test_a_large_mean_cancels_nothing():
    """With mean 4096 and standard deviation 1 the error of fp32 sums of squares would exceed the variance."""
    rows = (randn(500, 3) + 4096).round(decimals=2)
    got = global_moments(rows, rows, torch.tensor(500))
    variance = rows.double().var(dim=0, correction=0).float()
    torch.testing.assert_close(got.squares_a / 500, variance, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got.products.diagonal() / 500, variance, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("total", [0, 0.0])
def test_without_rows_all_moments_are_zero(total):
    got = global_moments(torch.zeros(0, 3), torch.zeros(0, 2), torch.tensor(total))
    assert all((moment == 0).all() for moment in got[:-1])
    assert got.products.shape == (3, 2)


def test_standardized_rows_have_mean_0_and_variance_1_and_moments_without_gradient():
    x = (torch.tensor([1.0, 30.0]) * randn(40, 3, 2) + 500).requires_grad_()
    rows = standardized(x, torch.tensor(40.0), eps=0.0)
    still = x.detach().double()
    expected = (still - still.mean(dim=0)) / still.std(dim=0, correction=0)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-3, atol=1e-3)
    rows.sum().backward()  # as if it had no scale of its own
    torch.testing.assert_close(
        x.grad.double(), (1 / still.std(dim=0, correction=0)).expand(40, 3, 2), rtol=1e-4, atol=0
    )
    assert torch.equal(standardized(torch.ones(4, 2), torch.tensor(4.0)), torch.zeros(4, 2))
    assert standardized(torch.zeros(0, 2), torch.tensor(0.0)).shape == (0, 2)


def test_moments_are_fp32_under_autocast():
    a, b = randn(64, 4), randn(64, 3, seed=1)
    expected = global_moments(a, b, torch.tensor(64))
    with torch.autocast("cpu", torch.bfloat16):
        got = global_moments(a, b, torch.tensor(64))
    for moment, want in zip(got[:-1], expected[:-1], strict=True):
        assert moment.dtype == torch.float32 and torch.equal(moment, want)


def test_a_large_diagonal_does_not_hide_the_rest():
    matrix = torch.full((4, 4), 1e-3).fill_diagonal_(1e3).requires_grad_()
    squares = off_diagonal_squares(matrix)
    torch.testing.assert_close(squares, torch.tensor(12e-6))
    squares.backward()
    torch.testing.assert_close(matrix.grad, torch.full((4, 4), 2e-3).fill_diagonal_(0))
