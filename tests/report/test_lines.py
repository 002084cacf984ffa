"""What is on a plot, read from the figure's artists."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.report.compare import Variant
from jepa_scale.report.compare_plots import by_horizon, figure_by_horizon, overlaid
from jepa_scale.report.figure import COLOURS
from jepa_scale.report.lines import Curve
from jepa_scale.report.plots import figure_of
from jepa_scale.report.step_time_plots import figure_of_breakdown
from jepa_scale.telemetry.records import RunRecord, summarize

STEPS = list(range(1, 101))


def axes_of(metric, *lines, **more):
    figure = figure_of(metric, list(lines), **more)
    figure.canvas.draw()
    (axes,) = figure.axes
    return axes


def painted(line):
    """For each tenth of a point along the line's period, whether it has ink there; None = all of it."""
    offset, pattern = line._unscaled_dash_pattern
    if pattern is None:
        return None
    on, off = pattern
    return [((x / 10 + offset) % (on + off)) < on for x in range(round(10 * (on + off)))]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_each_of_several_equal_curves_has_ink_of_its_own(number):
    values = [1 / step for step in STEPS]
    lines = axes_of("gate", *(Curve(f"run{n}", STEPS, values) for n in range(number))).lines
    ink = np.array([painted(line) for line in lines])
    assert (ink.sum(axis=0) == 1).all(), "at every place one of them is drawn, and nothing is drawn over it"
    assert ink.any(axis=1).all()


@pytest.mark.parametrize("metric", ["gate", "loss"])  # on a linear and on a logarithmic axis
def test_dashes_tell_that_curves_coincide_and_others_are_whole(metric):
    falling = np.geomspace(100, 1, len(STEPS))
    near = falling * (1 + 1e-4 * np.sin(STEPS))
    lines = axes_of(
        metric,
        Curve("a", STEPS, list(falling)),
        Curve("b", STEPS, list(0.5 * falling)),
        Curve("c", STEPS, list(near)),
    ).lines
    assert [painted(line) is None for line in lines] == [False, True, False]
    apart = axes_of(metric, Curve("a", STEPS, list(falling)), Curve("b", STEPS, list(0.5 * falling))).lines
    assert all(painted(line) is None for line in apart)


def test_curves_that_part_after_a_while_coincide_until_then():
    control = [float(step) for step in STEPS]
    parted = [value if step <= 40 else 2.0 * value for step, value in zip(STEPS, control, strict=True)]
    lines = axes_of("gate", Curve("control", STEPS, control), Curve("run", STEPS, parted)).lines
    assert None not in [painted(line) for line in lines]
    crossing = axes_of("gate", Curve("up", STEPS, control), Curve("down", STEPS, control[::-1])).lines
    assert [painted(line) for line in crossing] == [None, None]


def test_a_marker_below_another_is_a_ring_around_it():
    few = [1, 2, 3]
    lines = axes_of("gate", *(Curve(name, few, [1.0, 2.0, 3.0]) for name in "abc")).lines
    sizes = [line.get_markersize() for line in lines]
    assert sizes == sorted(sizes, reverse=True) and min(-np.diff(sizes)) >= 2, sizes
    assert [line.get_marker() for line in lines] == ["o"] * 3


def test_seeds_of_one_group_share_colour_and_are_never_dashed():
    line = [float(step) for step in STEPS]
    lines = axes_of("gate", *(Curve(f"seed{n}", STEPS, line, "jepa") for n in range(3))).lines
    assert len({line.get_color() for line in lines}) == 1 and [painted(line) for line in lines] == [None] * 3
    assert [line.get_label() for line in lines if not line.get_label().startswith("_")] == ["jepa"]


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=40, unique=True).map(sorted), st.randoms())
def test_axes_show_no_step_and_no_value_that_cannot_be(steps, random):
    """The unit is a fraction, so values lie between 0 and 1, as the axis has to."""
    values = [random.choice((0.0, 1.0, random.random())) for _ in steps]
    axes = axes_of("exact_match", Curve("eval/valid", steps, values))
    assert axes.get_xlim() == (steps[0], steps[-1])
    bottom, top = axes.get_ylim()
    if max(values) - min(values) > 1e-3:
        assert 0 <= bottom <= min(values) and max(values) <= top <= 1


def test_an_axis_below_zero_needs_a_negative_value():
    seconds = axes_of("time_data", Curve("train", [1, 2, 3], [0.0, 0.01, 3.0]))
    assert seconds.get_ylim()[0] == 0
    assert axes_of("gate", Curve("train", [1, 2, 3], [-0.1, 0.01, 3.0])).get_ylim()[0] < -0.1


@pytest.mark.parametrize(
    ("values", "label"),
    [([0.5, 0.5, 0.5], "0.5000"), ([1e-3, 1e-3, 1e-3 + 1e-12], "0.001000"), ([0.0, 0.0, 0.0], "0")],
)
def test_a_constant_has_one_tick_with_its_value(values, label):
    axes = axes_of("gate", Curve("train", [1, 2, 3], values))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [label]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert [line.get_ydata().tolist() for line in axes.lines] == [values]


def test_values_are_written_in_full_and_not_as_a_difference():
    axes = axes_of("gate", Curve("train", [1, 2, 3], [1000.001, 1000.502, 1001.003]))
    labels = [float(tick.get_text().replace("\N{MINUS SIGN}", "-")) for tick in axes.get_yticklabels()]
    assert axes.yaxis.get_offset_text().get_text() == "" and min(labels) > 999


def record(tmp_path, name, rows):
    return RunRecord(tmp_path, name, rows, {"name": name, **summarize(rows)}, {}, "")


def test_a_variant_has_one_colour_on_the_whole_page(tmp_path, monkeypatch):
    """The first variant has no values by horizon, and takes its colour with it."""
    rows = [{"step": 1, "split": "eval/valid", "mrr_h2": 0.5, "mrr_h8": 0.2, "ppl": 3.0}]
    of = [Variant(name, [record(tmp_path, name, r)]) for name, r in (("lm", [{**rows[0]}]), ("a", rows), ("b", rows))]
    for name in ("mrr_h2", "mrr_h8"):
        del of[0].runs[0].summary["final"]["eval/valid"][name]
    (axes,) = figure_by_horizon(of, "eval/valid", "mrr", [2, 8]).axes
    assert [(line.get_label(), line.get_color()) for line in axes.lines] == [("a", COLOURS[1]), ("b", COLOURS[2])]
    assert None not in [painted(line) for line in axes.lines], "both have the same values"
    assert list(by_horizon(of)) == [("eval/valid", "mrr")] and overlaid(of) == {}, "measured once: no curve"
    one = [{"step": 1, "split": "eval/valid", "mrr_h2": 0.5}]
    assert by_horizon([Variant("a", [record(tmp_path, "a", one)])]) == {}


def test_the_bars_of_a_step_begin_with_the_run_and_end_with_it():
    rows = [
        {"step": s, "split": "train", "time_data": 0.1, "time_forward": 0.3, "time_per_step": 0.4} for s in (10, 20, 25)
    ]
    (axes,) = figure_of_breakdown(rows).axes
    assert axes.get_xlim() == (0, 25) and axes.get_ylim()[0] == 0
    assert math.isclose(max(bar.get_y() + bar.get_height() for bar in axes.patches), 0.4)
