import time

import pytest
import torch

from jepa_scale.meter import Meter
from jepa_scale.objectives.base import Loss
from jepa_scale.packing import PackedBatch, Segment, Views, pack


def batch(tokens: int, step: int, **counts: int) -> PackedBatch:
    made = pack([Views([Segment([1] * tokens, "x")])], step=step)
    made.counts.update({"skipped": 0, "budget": 0} | counts)
    return made


def loss(value: float) -> Loss:
    return Loss(torch.tensor(0.0), {"loss": torch.tensor(value)}, {"gate": torch.tensor(value)})


def test_contributions_add_up_within_a_step_and_are_averaged_over_steps():
    meter = Meter(torch.device("cpu"))
    for step, values in enumerate([(1.0, 2.0), (5.0, 0.0)]):
        for value in values:
            meter.add(loss(value), batch(3, step))
    values, tokens = meter.read()
    assert values == {"loss": 4.0, "gate": 0.0}
    assert tokens == 12
    meter.add(loss(7.0), batch(2, 5))
    assert meter.read() == ({"loss": 7.0, "gate": 7.0}, 2)


def test_efficiency_and_skipped_samples_are_told_where_there_are_any():
    meter = Meter(torch.device("cpu"))
    meter.add(loss(1.0), batch(6, 0, budget=8, skipped=2))
    meter.add(loss(1.0), batch(8, 1, budget=8, skipped=1))
    values, _ = meter.read()
    assert values["packing_efficiency"] == pytest.approx(14 / 16)
    assert values["skipped_samples"] == 3


def test_waiting_for_data_is_a_share_of_waiting_and_working():
    def slow():
        for step in range(4):
            time.sleep(0.05)
            yield batch(1, step)

    meter = Meter(torch.device("cpu"))
    shares = []
    for made in meter.waiting(slow()):
        time.sleep(0.05)
        meter.add(loss(1.0), made)
        if made.step % 2:
            shares.append(meter.read()[0]["data_wait"])
            time.sleep(0.3)  # an evaluation: neither waiting nor working
    assert shares == pytest.approx([0.5, 0.5], abs=0.12)
