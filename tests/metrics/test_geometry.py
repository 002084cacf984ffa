"""Alignment and uniformity against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.metrics import geometry
from jepa_scale.metrics.geometry import alignment, uniformity


def test_alignment_of_equal_orthogonal_and_opposite_pairs():
    a = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    assert alignment(a, 7 * a).item() == pytest.approx(0, abs=1e-12)
    assert alignment(a, a.flip(1)).item() == pytest.approx(2)
    assert alignment(a, -a).item() == pytest.approx(4)
    assert alignment(a, torch.stack([a[0], -a[1]])).item() == pytest.approx(2)
    assert math.isnan(alignment(a[:0], a[:0]))


def test_uniformity_of_a_point_a_pair_a_basis_and_a_simplex():
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.tensor([[2.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-8)
    assert uniformity(torch.eye(6)).item() == pytest.approx(-4)
    assert uniformity(torch.eye(6), temperature=0.5).item() == pytest.approx(-1)
    n = 4  # ‖x − y‖² = 2 + 2/(n − 1) between the corners of a simplex
    assert uniformity(torch.eye(n) - 1 / n).item() == pytest.approx(-2 * (2 + 2 / (n - 1)))
    assert math.isnan(uniformity(torch.ones(1, 3)))


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 999))
def test_uniformity_is_the_mean_over_pairs_whatever_the_chunks(n, d, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    pairs = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(n) for j in range(i)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(geometry, "CHUNK", 2)
        assert uniformity(rows).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-6)
