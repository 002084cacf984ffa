"""Bounds in closed form."""

import pytest

from jepa_scale.plan.communication import Traffic
from jepa_scale.plan.hardware import Gpu, find_gpu
from jepa_scale.plan.layout import layout_of
from jepa_scale.plan.memory_tracker import OpCost
from jepa_scale.plan.roofline import estimate
from tests.plan.small import config, planned

GPU = Gpu("NVIDIA H200", 100, bandwidth=1e12, link=100e9, network=10e9)
PEAK = 989.4e12


def of(ops, traffic=(), accumulation=1, updated=0, averaged=0, efficiency=1.0, **slower):
    layout = layout_of(config({"precision": "bf16"}).engine, 16)
    flops = sum(op.flops for op in ops) * accumulation
    return estimate(ops, accumulation, updated, averaged, traffic, flops, GPU, layout, True, efficiency, **slower)


def test_an_operator_waits_for_the_slower_of_products_and_memory():
    assert of([OpCost(int(PEAK), 0)]).seconds == pytest.approx(1)
    assert of([OpCost(int(PEAK), 0)]).mfu == pytest.approx(1)
    assert of([OpCost(int(PEAK), int(3e12)), OpCost(0, int(1e12))]).seconds == pytest.approx(4)
    assert of([OpCost(0, int(1e12))], accumulation=5, efficiency=0.5).seconds == pytest.approx(10)


def test_the_update_reads_and_writes_its_elements():
    assert of([], updated=10**10, averaged=10**10).seconds == pytest.approx((28 + 12) / 100)


def test_links():
    """Eight of sixteen ranks a machine: all eight network cards carry a ring; one of eight uses one card."""
    assert GPU.reach(8, 8) == 100e9
    assert GPU.reach(16, 16) == 80e9
    assert GPU.reach(2, 16) == 10e9
    whole = Traffic("all-gather", "", 16, 16, int(80e9 * 16 / 15), True)
    assert of([], [whole]).seconds == pytest.approx(1)
    covered = of([OpCost(int(2 * PEAK), 0)], [whole])
    assert covered.seconds == pytest.approx(2) and covered.bound == "compute"
    waits = Traffic("all-gather", "", 16, 16, int(80e9 * 16 / 15), False)
    assert of([OpCost(int(2 * PEAK), 0)], [whole, waits]).seconds == pytest.approx(3)


def test_slower_links_and_latencies():
    sent = int(80e9 * 16 / 15)  # a second
    whole, waits = (Traffic("all-gather", "", 16, 16, sent, overlaps, calls=500) for overlaps in (True, False))
    assert of([], [whole], links=0.5).seconds == pytest.approx(2)
    assert of([], [whole], latency=1e-3).seconds == pytest.approx(1.5)
    assert of([OpCost(int(3 * PEAK), 0)], [whole, waits], latency=1e-3).seconds == pytest.approx(4.5)
    gpu = find_gpu("h100")
    plan = planned(config(), 16, gpu=gpu)
    calls, sent = (sum(getattr(t, name) for t in plan.traffic) for name in ("calls", "sent"))
    assert plan.slower["latency"] == pytest.approx(max(plan.time.compute, plan.time.hidden + 20e-6 * calls))
    assert plan.slower["links"] == pytest.approx(max(plan.time.compute, 2 * sent / gpu.reach(16, 16)))


def test_days_of_a_budget():
    plan = planned(config(), 1, gpu=find_gpu("h100"), tokens=1e9)
    assert plan.days * plan.tokens_per_day == pytest.approx(1e9)
    assert plan.tokens_per_day == pytest.approx(plan.step_tokens * 86_400 / plan.time.seconds)
