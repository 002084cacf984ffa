"""The learning rate schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.config.schema import OptimConfig
from jepa_scale.optim import lr_factor


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 1 / 10),
        ("cosine", 4, 5 / 10),
        ("cosine", 9, 1.0),
        ("cosine", 54, 0.2 + 0.8 * 0.5),
        ("cosine", 32, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 23 / 90))),
        ("cosine", 99, 0.2),
        ("linear", 54, 0.6),
        ("linear", 99, 0.2),
        ("constant", 4, 0.5),
        ("constant", 99, 1.0),
        ("wsd", 4, 0.5),
        ("wsd", 89, 1.0),
        ("wsd", 90, 0.2 + 0.8 * 0.9),
        ("wsd", 94, 0.6),
        ("wsd", 99, 0.2),
    ],
)
def test_lr_factor_closed_form(schedule, step, expected):
    options = OptimConfig(schedule=schedule, warmup_steps=10, final_lr=0.2)
    assert lr_factor(step, options, 100) == pytest.approx(expected, abs=1e-12)


def test_the_decay_of_wsd_has_its_own_length_and_begins_after_the_warmup():
    options = OptimConfig(schedule="wsd", warmup_steps=10, decay_steps=50)
    assert [lr_factor(step, options, 100) for step in (49, 74, 99)] == pytest.approx([1.0, 0.5, 0.0])
    longer = OptimConfig(schedule="wsd", warmup_steps=80, decay_steps=50)
    assert [lr_factor(step, longer, 100) for step in (79, 89, 99)] == pytest.approx([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="decay_steps: has no effect with schedule: cosine"):
        OptimConfig(decay_steps=50)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup=st.integers(0, 40),
    total=st.integers(1, 60),
    final=st.floats(0, 1),
)
def test_lr_factor_rises_then_falls(schedule, warmup, total, final):
    options = OptimConfig(schedule=schedule, warmup_steps=warmup, final_lr=final)
    factors = [lr_factor(step, options, total) for step in range(total)]
    assert all(0 < f <= 1 or (f == 0 and final == 0) for f in factors[:-1]) and -1e-12 <= factors[-1] <= 1
    rising, falling = factors[:warmup], factors[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False))
    if warmup < total:
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else final, abs=1e-12)
    else:
        assert factors[-1] == pytest.approx(total / warmup)
