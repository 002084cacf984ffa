"""Barlow Twins in one process: closed forms, invariances, a plain fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.barlow import barlow


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whitened(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """(n, d) fp64 rows of mean 0, variance 1 and no correlation."""
    rows = randn(n, d, seed=seed).double()
    orthonormal, _ = torch.linalg.qr(rows - rows.mean(0))
    return orthonormal * n**0.5


def plain(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-5) -> tuple[float, float]:
    """Reference: equations 1 and 2 in fp64, element by element."""
    normed = [((x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()).double() for x in (a.double(), b.double())]
    n, d = a.shape
    align = off_diagonal = 0.0
    for i in range(d):
        for j in range(d):
            c = float((normed[0][:, i] * normed[1][:, j]).sum()) / n
            align, off_diagonal = (align + (1 - c) ** 2, off_diagonal) if i == j else (align, off_diagonal + c**2)
    return align / d, off_diagonal / max(d * (d - 1), 1)


@settings(max_examples=25)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 1000))
def test_values_equal_a_plain_reference(n, d, seed):
    a, b = randn(n, d, seed=seed), randn(n, d, seed=seed + 1) * 2 + 1
    got = barlow(a, b, torch.tensor(float(n)))
    assert [float(x) for x in got] == pytest.approx(plain(a, b), rel=1e-4, abs=1e-5)


@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(10, 40), st.integers(0, 1000))
def test_identical_whitened_rows_cost_nothing(d, n, seed):
    rows = whitened(n, d, seed).float()
    align, off_diagonal = barlow(rows, rows, torch.tensor(n))
    assert align < 1e-8 and off_diagonal < 1e-8
    align, off_diagonal = barlow(rows, -rows, torch.tensor(n))  # C = −identity
    assert float(align) == pytest.approx(4, rel=1e-3) and off_diagonal < 1e-8
    align, off_diagonal = barlow(rows, rows.roll(1, dims=1), torch.tensor(n))  # C = a permutation
    assert float(align) == pytest.approx(1, rel=1e-3) and float(off_diagonal) == pytest.approx(1 / (d - 1), rel=1e-3)


def test_copies_of_one_feature_are_wholly_redundant():
    rows = randn(20, 1).expand(20, 5)
    align, off_diagonal = barlow(rows, rows, torch.tensor(20))
    assert align < 1e-8
    assert float(off_diagonal) == pytest.approx(1, rel=1e-4)


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.5, 100), min_size=3, max_size=3),
    st.lists(st.floats(-50, 50), min_size=3, max_size=3),
    st.integers(0, 1000),
)
def test_scale_and_shift_of_a_feature_change_nothing(scale, shift, seed):
    a, b = randn(30, 3, seed=seed), randn(30, 3, seed=seed + 1)
    moved = a * torch.tensor(scale) + torch.tensor(shift)
    got = torch.stack(barlow(moved, b, torch.tensor(30), eps=1e-9))
    torch.testing.assert_close(got, torch.stack(barlow(a, b, torch.tensor(30), eps=1e-9)), rtol=1e-3, atol=1e-4)


def test_gradients_equal_those_of_fp64():
    a, b = randn(12, 4).requires_grad_(), randn(12, 4, seed=1).requires_grad_()
    align, off_diagonal = barlow(a, b, torch.tensor(12))
    got = torch.autograd.grad(align + 0.3 * off_diagonal, (a, b))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    normed = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in wide]
    c = normed[0].T @ normed[1] / 12
    loss = (1 - c.diagonal()).square().sum() / 4 + 0.3 * c.masked_select(~torch.eye(4).bool()).square().mean()
    for gradient, want in zip(got, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(gradient, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(0, (0.0, 0.0)), (1, (1.0, 0.0))])
def test_no_row_and_one_row(n, expected):
    a, b = randn(n, 3).requires_grad_(), randn(n, 3, seed=1).requires_grad_()
    align, off_diagonal = barlow(a, b, torch.tensor(float(n)))
    assert (align.item(), off_diagonal.item()) == expected
    (align + off_diagonal).backward()
    assert (a.grad == 0).all() and (b.grad == 0).all()


def test_constant_rows_have_finite_gradients():
    a, b = torch.ones(5, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    align, off_diagonal = barlow(a, b, torch.tensor(5))
    (align + off_diagonal).backward()
    assert align.item() == 1 and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_half_precision_is_computed_in_fp32_even_under_autocast():
    a, b = randn(40, 4).bfloat16(), randn(40, 4, seed=1).bfloat16()
    expected = barlow(a.float(), b.float(), torch.tensor(40))
    with torch.autocast("cpu", torch.bfloat16):
        got = barlow(a, b, torch.tensor(40))
    assert got[0].dtype == torch.float32
    assert torch.equal(torch.stack(got), torch.stack(expected))
