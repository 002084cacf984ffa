"""Bytes that a rank sends, in closed form."""

from jepa_scale.plan.communication import Traffic
from tests.plan.small import BLOCK, LAYERS, PARAMETERS, VOCAB, WIDTH, config, planned, zero


def sent(plan):
    return {(t.kind, t.what): t.sent for t in plan.traffic}


def test_rings():
    assert Traffic("all-gather", "", 4, 4, 100, True).sent == 75
    assert Traffic("all-reduce", "", 4, 4, 100, True).sent == 150


def test_fsdp_gathers_blocks_twice_and_the_root_once():
    plan = planned(config({"precision": "bf16"}), 4)
    root = 2 * VOCAB * WIDTH + WIDTH
    assert sent(plan) == {
        ("all-gather", "parameters"): 2 * (2 * LAYERS * BLOCK + root) * 3 // 4,
        ("reduce-scatter", "gradients"): 4 * PARAMETERS * 3 // 4,
    }


def test_replicas_all_reduce_their_shards():
    plan = planned(config(), 8, replicas=2)
    assert sent(plan)["all-reduce", "gradients of replicas"] == 2 * (4 * PARAMETERS // 4) * 1 // 2


def test_every_micro_batch_gathers_and_reduces():
    one, three = (planned(config(train={"batch_tokens": 64 * 2 * n, "micro_tokens": 64}), 2) for n in (1, 3))
    assert {key: 3 * size for key, size in sent(one).items()} == sent(three)


def test_zero():
    reduced, gathered = 2 * 4 * PARAMETERS * 3 // 4, 2 * PARAMETERS * 3 // 4
    for stage in (0, 1, 2):
        plan = planned(config(zero(stage, precision="bf16")), 4)
        assert sent(plan)["all-reduce", "gradients"] == reduced
        assert sent(plan).get(("all-gather", "parameters after the step"), 0) == (gathered if stage else 0)
    three = sent(planned(config(zero(3, precision="bf16")), 4))
    assert three == {("reduce-scatter", "gradients"): 4 * PARAMETERS * 3 // 4}  # every parameter is small, and stays


def test_tensor_parallel_exchanges_the_stream():
    plan = planned(config(), 2, tp=2)
    stream = 4 * plan.micro_tokens * WIDTH
    assert sent(plan)["all-gather", "activations (tp)"] == stream * (4 * LAYERS + 4) // 2
    assert plan.traffic[0].what == "activations (tp)"  # one data rank has nobody to send to


def test_one_rank_sends_nothing():
    assert planned(config()).traffic == []
