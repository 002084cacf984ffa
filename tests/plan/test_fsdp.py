"""Shards of FSDP2."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from jepa_scale.plan.fsdp import shard_numel
from jepa_scale.plan.simulate import fake_ranks
from tests.plan.small import HEADS, HORIZON, INNER, KV, LAYERS, MODEL, PARAMETERS, WIDTH, config, planned


@pytest.mark.parametrize("ranks", [1, 3, 8, 4096])
@pytest.mark.parametrize("shape", [(64, 32), (5, 7), (1,), (4096, 2), (128256, 4)])
def test_rank_0_has_what_dtensor_gives_it(shape, ranks):
    with fake_ranks(ranks):
        mesh = init_device_mesh("cpu", (ranks,))
        local, _ = compute_local_shape_and_global_offset(shape, mesh, [Shard(0)])
    assert shard_numel(shape, ranks) == torch.Size(local).numel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_one_rank_sixteen_bytes_a_parameter(precision):
    """Rajbhandari et al., arXiv 1910.02054, section 3.1, with fp32 instead of half-precision parameters and gradients."""
    plan = planned(config({"precision": precision}))
    assert plan.memory.state["parameters"] == 4 * PARAMETERS
    assert plan.memory.state["optimizer"] == 8 * PARAMETERS
    assert plan.memory.most["gradients"] == 4 * PARAMETERS


def test_frozen_weights_take_two_bytes_in_bf16():
    """A and B of rank r take r (inputs + outputs), of each of a block's seven matrices."""
    rank, kv = 2, WIDTH * KV // HEADS
    adapters = LAYERS * rank * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + kv) + 3 * (WIDTH + INNER))
    plans = {p: planned(config({"precision": p}, model={**MODEL, "lora": {"rank": rank}})) for p in ("fp32", "bf16")}
    for precision, width in (("fp32", 4), ("bf16", 2)):
        state = plans[precision].memory.state
        assert state["parameters"] == width * PARAMETERS + 4 * adapters
        assert state["optimizer"] == 8 * adapters


def test_shards_and_replicas():
    """Every dimension is a multiple of 4, so the shards are even."""
    one, four = planned(config()), planned(config(), 4)
    replicated = planned(config(), 8, replicas=2)
    for kind in ("parameters", "optimizer"):
        assert one.memory.state[kind] == 4 * four.memory.state[kind]
        assert four.memory.state[kind] == replicated.memory.state[kind]


def test_the_teacher_is_sharded_in_fp32():
    plan = planned(config({"precision": "bf16"}, objective={**HORIZON, "teacher": "backbone"}), 4)
    assert plan.memory.state["teacher"] == plan.teacher_parameters  # 4 bytes, on one of 4 ranks
