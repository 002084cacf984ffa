import math
from types import SimpleNamespace

import pytest
import torch

from jepa_scale.objectives.base import Loss
from jepa_scale.packing import PackedBatch, Segment, Views, pack
from jepa_scale.training.metrics import MetricAccumulator

FINITE = torch.tensor(1.0)


def batch(tokens: int, step: int, **counts: int) -> PackedBatch:
    made = pack([Views([Segment([1] * tokens, "x")])], step=step)
    made.counts.update({"skipped": 0, "budget": 0} | counts)
    return made


def loss(value: float) -> Loss:
    return Loss(torch.tensor(0.0), {"loss": torch.tensor(value)}, {"gate": torch.tensor(value)})


def test_contributions_add_up_within_a_step_and_are_averaged_over_steps():
    meter = MetricAccumulator(torch.device("cpu"))
    for step, values in enumerate([(1.0, 2.0), (5.0, 0.0)]):
        for value in values:
            meter.add(loss(value), batch(3, step))
        meter.step_done(step, FINITE)
    assert meter.steps == [0, 1]
    values, tokens = meter.read()
    assert values == {"loss": 4.0, "gate": 0.0}
    assert tokens == 12
    meter.add(loss(7.0), batch(2, 5))
    meter.step_done(5, FINITE)
    assert meter.read() == ({"loss": 7.0, "gate": 7.0}, 2)


def test_a_skipped_step_is_named_and_in_no_mean():
    meter = MetricAccumulator(torch.device("cpu"))
    for step, (value, norm) in enumerate([(1.0, 2.0), (math.nan, math.nan), (3.0, math.inf), (5.0, 0.1)]):
        meter.add(loss(value), batch(1, step))
        meter.step_done(step, torch.tensor(norm))
    values, _ = meter.read()
    assert meter.bad_steps == [1, 2]
    assert (values["loss"], values["skipped_steps"]) == (3.0, 2.0)
    meter.add(loss(math.nan), batch(1, 4))
    meter.step_done(4, torch.tensor(math.nan))
    values, _ = meter.read()
    assert math.isnan(values["loss"]) and meter.bad_steps == [4]


def test_what_was_spent_counts_for_skipped_steps_too():
    meter = MetricAccumulator(torch.device("cpu"))
    for step, norm in enumerate([1.0, math.nan]):
        meter.add_flops(3 * 2**40)
        meter.add(loss(1.0), batch(1, step))
        meter.step_done(step, torch.tensor(norm))
    assert meter.flops == 0
    meter.read()
    assert meter.flops == 6 * 2**40
    meter.add_flops(5)
    meter.add(loss(1.0), batch(1, 2))
    meter.step_done(2, FINITE)
    meter.read()
    assert meter.flops == 5


def test_efficiency_and_skipped_samples_are_told_where_there_are_any():
    meter = MetricAccumulator(torch.device("cpu"))
    meter.add(loss(1.0), batch(6, 0, budget=8, skipped=2))
    meter.add(loss(1.0), batch(8, 0, budget=8, skipped=1))
    meter.step_done(0, FINITE)
    values, _ = meter.read()
    assert values["packing_efficiency"] == pytest.approx(14 / 16)
    assert values["skipped_samples"] == 3


def test_waiting_for_data_is_a_share_of_waiting_and_working(monkeypatch):
    """By a clock that the test moves. Steps 0 and 1 wait 1 s and work 3 s each, steps 2 and 3 wait 2 s each."""
    now = 0.0
    monkeypatch.setattr("jepa_scale.training.metrics.time", SimpleNamespace(perf_counter=lambda: now))

    def slow():
        nonlocal now
        for step in range(4):
            now += 1.0 + step // 2
            yield batch(1, step)

    meter = MetricAccumulator(torch.device("cpu"))
    shares = []
    for made in meter.waiting(slow()):
        now += 3.0
        meter.add(loss(1.0), made)
        meter.step_done(made.step, FINITE)
        if made.step % 2:
            shares.append(meter.read()[0]["data_wait"])
            now += 50.0  # an evaluation: neither waiting nor working
    assert shares == pytest.approx([1 / 4, 2 / 5], abs=1e-12)
