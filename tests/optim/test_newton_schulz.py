"""Orthogonal factors against the singular value decomposition and PyTorch's implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from jepa_scale.optim.newton_schulz import orthogonalize

SHAPES = [(7, 7), (12, 5), (5, 12), (1, 9), (9, 1)]


def quintic(x, steps):
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_quintic_is_applied_to_the_singular_values(shape, steps):
    matrix = random(*shape)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    expected = u @ torch.diag(quintic(s / s.norm(), steps)) @ vt
    torch.testing.assert_close(orthogonalize(matrix[None], steps)[0], expected, rtol=1e-9, atol=1e-9)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12),
    st.integers(0, 10**6),
)
def test_singular_values_come_into_the_band(rows, cols, values, seed):
    """Singular values of at least 0.0015 of the norm reach the band; here all are at least 1/300 of it."""
    u, s, vt = torch.linalg.svd(random(rows, cols, seed=seed), full_matrices=False)
    matrix = u @ torch.diag(torch.tensor(values[: len(s)], dtype=torch.float64)) @ vt
    got = torch.linalg.svdvals(orthogonalize(matrix[None].float())[0].double())
    assert got.min() > 0.67 and got.max() < 1.21


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1e6), st.integers(0, 10**6))
@settings(max_examples=50)
def test_transposed_and_scaled(rows, cols, factor, seed):
    matrix = random(1, rows, cols, seed=seed)
    got = orthogonalize(matrix)
    torch.testing.assert_close(orthogonalize(matrix.mT), got.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(factor * matrix), got, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(orthogonalize(-matrix), -got)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_each_of_its_matrices(shape):
    batch = random(3, *shape, dtype=torch.float32)
    batch[1] = 0
    before = batch.clone()
    got = orthogonalize(batch)
    assert got.shape == batch.shape and got.dtype == torch.float32 and torch.equal(batch, before)
    assert torch.equal(got[1], torch.zeros(shape))
    for one, of_batch in zip(batch, got, strict=True):
        torch.testing.assert_close(orthogonalize(one[None])[0], of_batch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_in_bf16_it_is_torchs(shape):
    matrix = random(*shape, dtype=torch.float32)
    expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    got = orthogonalize(matrix[None].bfloat16())[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got.float(), orthogonalize(matrix[None])[0], rtol=0.1, atol=0.03)
