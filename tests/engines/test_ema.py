"""Momentum schedules and the names of a teacher's modules. Its averages: tests/distributed/test_teacher.py."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.parsing import parse_section
from jepa_scale.engines.ema import TeacherModel, momentum_at
from jepa_scale.utils.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")
UNIT = st.floats(0, 1)


def options(**keys) -> TeacherOptions:
    return parse_section(TeacherOptions, keys, "ema")


def test_cosine_ramp():
    ema = options(momentum=0.9, final_momentum=1.0, schedule="cosine")
    got = [momentum_at(step, ema, 8) for step in (0, 2, 4, 6, 8, 100)]
    root = math.sqrt(0.5)
    assert got == pytest.approx([0.9, 0.9 + 0.05 * (1 - root), 0.95, 0.9 + 0.05 * (1 + root), 1.0, 1.0], abs=1e-15)


def test_linear_ramp_ends_where_it_says():
    ema = options(momentum=0.5, final_momentum=0.9, schedule="linear", steps=4)
    assert [momentum_at(s, ema, 1000) for s in range(6)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9], abs=1e-15)


def test_constant_stays():
    assert {momentum_at(s, options(momentum=0.99, schedule="constant"), 10) for s in range(20)} == {0.99}


def test_defaults_are_those_of_the_horizon_objective():
    assert momentum_at(0, options(), 5000) == 0.99
    assert momentum_at(5000, options(), 5000) == pytest.approx(0.9998, abs=1e-15)


@given(st.sampled_from(SCHEDULES), UNIT, st.none() | UNIT, st.integers(0, 50), st.integers(1, 50), st.integers(0, 120))
def test_momentum_goes_from_first_to_final_and_never_back(schedule, first, final, steps, total, step):
    ema = options(schedule=schedule, momentum=first, final_momentum=final, steps=steps)
    end = first if final is None or schedule == "constant" else final
    values = [momentum_at(s, ema, total) for s in (0, step, step + 1, (steps or total))]
    assert values[0] == first and values[3] == pytest.approx(end, abs=1e-15)
    low, high = min(first, end) - 1e-15, max(first, end) + 1e-15
    assert all(low <= value <= high for value in values)
    assert (values[2] - values[1]) * (end - first) >= -1e-15


@pytest.mark.parametrize(
    "keys", [{"momentum": 1.5}, {"final_momentum": -0.1}, {"schedule": "cubic"}, {"steps": -1}, {"moment": 0.5}]
)
def test_bad_options_name_their_key(keys):
    with pytest.raises(InputError, match=rf"ema\.{next(iter(keys))}: "):
        options(**keys)


def test_names_are_those_of_the_root_module():
    shared = nn.Linear(2, 3)
    model = TeacherModel(
        {"backbone": nn.ModuleDict({"a": shared, "b": shared}), "objective.encoder.0": nn.Linear(2, 2)}
    )
    assert set(model.state_dict()) == {
        f"{path}.{key}" for path in ("backbone.a", "backbone.b", "objective.encoder.0") for key in ("weight", "bias")
    }
    assert [name for name, _ in model.named_parameters()][0] == "backbone.a.weight"


@pytest.mark.parametrize("paths", [("backbone", "backbone.layers"), ("backbone.layers", "backbone")])
def test_copies_lie_side_by_side(paths):
    with pytest.raises(AssertionError, match="backbone"):
        TeacherModel({path: nn.Linear(1, 1) for path in paths})
