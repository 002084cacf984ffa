"""Paired differences: the exact bootstrap against drawing, its laws, and the verdicts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.bench.compare import DRAWS, EXACT, Difference, paired

VALUES = st.lists(st.integers(-100, 100).map(float), min_size=1, max_size=5)


@settings(deadline=None)
@given(VALUES)
def test_few_seeds_are_every_resample_counted_once(values):
    """The interval is that of all n^n resamples, written out."""
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])
    found = paired(values, [0.0] * len(values))
    places = [min(int(np.ceil(at * len(means) - 1e-9)), len(means)) - 1 for at in (0.025, 0.975)]
    assert [found.low, found.high] == pytest.approx([means[max(place, 0)] for place in places])
    assert found.mean == pytest.approx(np.mean(values))


@settings(deadline=None)
@given(VALUES, st.floats(-5, 5), st.floats(0.1, 10))
def test_the_interval_moves_and_scales_with_the_values(values, shift, scale):
    plain = paired(values, [0.0] * len(values))
    moved = paired([scale * value + shift for value in values], [0.0] * len(values))
    expected = [scale * each + shift for each in (plain.mean, plain.low, plain.high)]
    assert [moved.mean, moved.low, moved.high] == pytest.approx(expected, abs=1e-9)


def test_the_differences_are_paired_by_seed():
    found = paired([10.0, 20.0, 30.0], [9.0, 19.0, 29.0])
    assert (found.mean, found.low, found.high, found.seeds) == (1.0, 1.0, 1.0, 3)


def test_many_seeds_are_drawn_and_agree_with_the_normal_interval():
    n = 200
    assert n > EXACT
    values = np.random.default_rng(0).standard_normal(n)
    found = paired(values.tolist(), [0.0] * n)
    half = 1.96 * values.std() / np.sqrt(n)
    assert found.high - found.low == pytest.approx(2 * half, rel=10 / np.sqrt(DRAWS))
    assert paired(values.tolist(), [0.0] * n) == found


@pytest.mark.parametrize(
    ("low", "high", "seeds", "higher", "lower"),
    [
        (0.1, 0.2, 3, "better", "worse"),
        (-0.2, -0.1, 3, "worse", "better"),
        (-0.1, 0.2, 3, "same", "same"),
        (0.0, 0.2, 3, "same", "same"),
        (0.1, 0.2, 2, "too few seeds", "too few seeds"),
    ],
)
def test_verdicts(low, high, seeds, higher, lower):
    difference = Difference((low + high) / 2, low, high, seeds)
    assert (difference.verdict("higher"), difference.verdict("lower")) == (higher, lower)
