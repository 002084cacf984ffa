"""Distances between paired embeddings, in closed form."""

import pytest
import torch

from jepa_scale.losses.distance import DISTANCES, smooth_l1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cosine", [1.0, 0.0, 2.0]), ("l2", [2**0.5, 1.0, 2.0]), ("mse", [1.0, 0.5, 2.0])],
)
def test_closed_forms(name, expected):
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(DISTANCES[name](a, b), torch.tensor(expected))


@pytest.mark.parametrize("name", DISTANCES)
def test_half_precision_is_computed_in_fp32(name):
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    got = DISTANCES[name](a.bfloat16(), b.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, DISTANCES[name](a.bfloat16().float(), b.bfloat16().float()))


@pytest.mark.parametrize(("beta", "expected"), [(1.0, [0.125, 1.5, 0.75]), (2.0, [0.0625, 1.0, 0.5])])
def test_smooth_l1_is_quadratic_below_beta_and_linear_above(beta, expected):
    a = torch.tensor([[0.5, 0.0], [2.0, 2.0], [1.0, -1.5]], requires_grad=True)
    b = torch.tensor([[0.0, 0.5], [0.0, 4.0], [1.0, 0.5]])
    torch.testing.assert_close(smooth_l1(a, b, beta), torch.tensor(expected))
    assert smooth_l1(a.bfloat16(), b.bfloat16()).dtype == torch.float32
