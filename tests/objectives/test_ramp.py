"""Factors over the steps of a run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.objectives.ramp import fall, ramp


def test_the_fall_is_one_then_linear_then_zero():
    assert [fall(step, 4) for step in (-3, -1, 0, 1, 2, 3, 4, 5, 99)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [fall(step, 0) for step in (-1, 0, 1)] == [1, 0, 0]


@given(st.integers(-5, 2000), st.integers(0, 1000))
def test_both_stay_between_zero_and_one_and_never_turn_back(step, length):
    assert 0 <= ramp(step, length) <= ramp(step + 1, length) <= 1
    assert 1 >= fall(step, length) >= fall(step + 1, length) >= 0
