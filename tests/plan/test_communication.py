"""Bytes that a rank sends, in closed form."""

from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.plan.communication import OF_OBJECTIVE, Traffic
from jepa_scale.plan.planner import Request, make_plan
from tests.plan.small import BLOCK, HORIZON, LAYERS, PARAMETERS, VOCAB, WIDTH, config, planned, zero


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


def test_an_objective_sends_what_its_own_code_gathers_and_reduces():
    """Barlow's matrix of the horizon objective, d × d, and its moments; rows of InfoNCE from every rank, and their gradients."""
    horizon = {**HORIZON, "jepa_weight": 1.0, "off_diag_scale": 0.5}
    plan = planned(config(objective=horizon, train={"batch_tokens": 64 * 2 * 3, "micro_tokens": 64}), 2)
    own = [t for t in plan.traffic if t.what == OF_OBJECTIVE]
    assert [(t.kind, t.ranks, t.span, t.overlaps) for t in own] == [("all-reduce", 2, 2, False)]
    assert own[0].calls % 3 == 0 and own[0].size % (3 * 4) == 0  # each of three micro-batches, in fp32
    assert own[0].size >= 3 * 4 * WIDTH * WIDTH
    assert [t for t in planned(config(), 2).traffic if t.what == OF_OBJECTIVE] == []  # lm has nothing to compare


def test_rows_that_are_gathered_are_those_of_all_ranks():
    """Eight facts a rank give sixteen names: their concepts in fp32 and their ids as int64, and a gradient of the concepts."""
    experiment = validate(load_config("configs/reversal.yaml", ["train.batch_size=32"]))
    plan = make_plan(experiment, Request(4, None, search=False))
    own = {t.kind: t for t in plan.traffic if t.what == OF_OBJECTIVE}
    concepts, ids = 4 * 16 * experiment.model.hidden_size * 4, 4 * 16 * 8
    assert {kind: (t.size, t.calls) for kind, t in own.items()} == {
        "all-gather": (concepts + ids, 2),
        "reduce-scatter": (concepts, 1),
    }


def test_latency_counts_calls():
    """FSDP2 gathers blocks twice and the root once, and reduces every unit; ZeRO reduces buckets."""
    calls = {
        t.kind: t.calls for t in planned(config(train={"batch_tokens": 64 * 4 * 3, "micro_tokens": 64}), 4).traffic
    }
    assert calls == {"all-gather": 3 * (2 * LAYERS + 1), "reduce-scatter": 3 * (LAYERS + 1)}
    two = planned(config(zero(2, precision="bf16")), 4)
    assert {t.what: t.calls for t in two.traffic} == {"gradients": 1, "parameters after the step": 1}


def test_one_rank_sends_nothing():
    assert planned(config()).traffic == []
