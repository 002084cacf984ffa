"""RoPE against complex rotation, and its one law: scores depend on distances alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.layers.rotary import rotary_table, rotate


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 1000, (2, 5))
    cos, sin = rotary_table(positions, 8, theta=500.0)
    frequencies = 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(2, 5, 1, 4, dtype=torch.float64), (positions[..., None] * frequencies)[:, :, None])
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, (cos.double(), sin.double())), expected, atol=2e-4, rtol=0)


@settings(max_examples=30)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(a, b, shift):
    q, k = torch.randn(2, 1, 1, 1, 16).unbind()

    def score(i, j):
        at = [tuple(t for t in rotary_table(torch.tensor([[place]]), 16, 10_000.0)) for place in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(score(a, b), score(a + shift, b + shift), atol=2e-3, rtol=0)


def test_the_table_is_fp32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = rotary_table(torch.arange(2000)[None], 64, 10_000.0)
    finally:
        torch.set_default_dtype(torch.float32)
    expected, _ = rotary_table(torch.arange(2000)[None], 64, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32 and torch.equal(cos, expected)


@pytest.mark.parametrize(
    ("of_x", "of_table"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_values_and_gradients_are_those_of_the_plain_formula(of_x, of_table):
    """A table that is wider than the heads widens the result, as under autocast."""
    x = torch.randn(2, 5, 3, 8).to(getattr(torch, of_x))
    up = torch.randn(2, 5, 3, 8).to(getattr(torch, of_table))
    cos, sin = (t.to(up.dtype) for t in rotary_table(torch.randint(0, 50, (1, 5)), 8, 100.0))

    def plain(x):
        (a, b), c, s = x.chunk(2, dim=-1), cos[:, :, None], sin[:, :, None]
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    found = []
    for rotation in (plain, lambda x: rotate(x, (cos, sin))):
        leaf = x.clone().requires_grad_()
        y = rotation(leaf)
        y.backward(up)
        found.append((y.detach(), leaf.grad))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=5e-2 if of_x == "bfloat16" else 1e-5)
