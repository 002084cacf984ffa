"""ZeRO's bytes a parameter (Rajbhandari et al., arXiv 1910.02054, figure 1), with fp32 gradients as the engine keeps them."""

import pytest

from tests.plan.small import PARAMETERS, config, planned, zero

PADDED = 1.01  # partitions are rounded up


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    ("stage", "parameters", "optimizer"),
    [(0, 2, 12), (1, 2, 12), (2, 2, 12), (3, 2, 12)],
)
def test_bf16(stage, parameters, optimizer, ranks):
    state = planned(config(zero(stage, precision="bf16")), ranks).memory.state
    parameters /= ranks if stage == 3 else 1
    optimizer /= ranks if stage > 0 else 1
    assert 1 <= state["parameters"] / (parameters * PARAMETERS) < PADDED
    assert 1 <= state["optimizer"] / (optimizer * PARAMETERS) < PADDED


def test_gradients():
    """Stage 1 in bf16 keeps all of them in fp32, stage 3 its part; the others none between steps."""
    states = {stage: planned(config(zero(stage, precision="bf16")), 4).memory.state for stage in range(4)}
    assert states[1]["gradients"] == 4 * PARAMETERS
    assert 1 <= states[3]["gradients"] / PARAMETERS < PADDED
    assert states[0]["gradients"] == states[2]["gradients"] == 0


def test_sixteen_bytes_a_parameter_on_one_rank():
    plan = planned(config(zero(0, precision="bf16")))
    assert sum(plan.memory.state.values()) == 14 * PARAMETERS
    assert plan.memory.most["gradients"] == 6 * PARAMETERS  # 2, and 4 more in fp32 while the optimizer steps


def test_fp32_has_masters_only_where_it_shards():
    assert planned(config(zero(0))).memory.state["optimizer"] == 8 * PARAMETERS
    assert planned(config(zero(2))).memory.state["optimizer"] == pytest.approx(12 * PARAMETERS, rel=0.01)


def test_buckets_are_counted():
    plan = planned(config(zero(2, precision="bf16")), 2)
    assert plan.memory.peak > 2 * 50_000_000 * 2
    assert planned(config(zero(3)), 2).memory.state["buffers"] > 4 * 50_000_000
