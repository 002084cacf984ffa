"""Distances between paired embeddings, in closed form."""

import pytest
import torch

from jepa_scale.losses.distance import DISTANCES


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
