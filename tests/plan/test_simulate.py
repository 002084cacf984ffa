"""A step without numbers against the same step with them."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from jepa_scale.models import head as lm_head
from jepa_scale.plan.simulate import fake_ranks
from jepa_scale.utils.errors import InputError
from tests.models.test_token_rows import FAMILIES
from tests.plan.small import HORIZON, LAYERS, WIDTH, config, modelled, planned


def test_flops_of_operators_are_those_that_the_objective_counts():
    """All but attention's scores, which a kernel makes once more in the backward."""
    plan = planned(config())
    pairs, heads, width = plan.micro_samples * 16 * 17 // 2, 4, 8
    again = LAYERS * 2 * pairs * heads * width
    assert sum(op.flops for op in plan.memory.ops) == plan.flops + again


def test_checkpointing_keeps_less_and_computes_more():
    kinds = {
        kind: planned(config(train={"batch_size": 64}), checkpointing=kind) for kind in ("none", "selective", "full")
    }
    most = [kinds[kind].memory.most["activations"] for kind in ("none", "selective", "full")]
    assert most[0] > most[1] > most[2]
    flops = {kind: sum(op.flops for op in plan.memory.ops) for kind, plan in kinds.items()}
    assert flops["selective"] == flops["none"] < flops["full"]
    assert {plan.flops for plan in kinds.values()} == {kinds["none"].flops}  # the model's own


def test_few_rows_of_logits_take_little_memory_and_no_product_more(monkeypatch):
    """Of 8 samples of 16 tokens."""
    rows, vocabulary = 8 * 16, 4096
    large = config(model={**config().model, "vocab_size": vocabulary})
    monkeypatch.setattr(lm_head, "_MOST_ROWS", 16)
    pieces = planned(large)
    monkeypatch.setattr(lm_head, "has_label_loss", lambda *_: False)
    at_once = planned(large)
    logits = 4 * rows * vocabulary
    gathered = at_once.memory.most["buffers"] - pieces.memory.most["buffers"]
    assert gathered >= 2 * logits  # themselves, and their gradient
    assert pieces.memory.peak < at_once.memory.peak - logits
    flops = [(sum(op.flops for op in plan.memory.ops), plan.flops) for plan in (at_once, pieces)]
    assert flops[0] == flops[1]


def test_few_columns_of_logits_take_little_memory_and_one_product_more(monkeypatch):
    """The model's own FLOPs are the same."""
    rows, vocabulary = 8 * 16, 4096
    large = config(model={**config().model, "vocab_size": vocabulary})
    monkeypatch.setattr(lm_head, "has_label_loss", lambda *_: False)
    at_once = planned(large)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", 4 * rows * 256)
    pieces = planned(large)
    logits = 4 * rows * vocabulary
    gathered = at_once.memory.most["buffers"] - pieces.memory.most["buffers"]
    assert gathered >= 2 * logits
    assert pieces.memory.peak < at_once.memory.peak - logits
    assert pieces.flops == at_once.flops
    flops = [sum(op.flops for op in plan.memory.ops) for plan in (at_once, pieces)]
    assert flops[1] - flops[0] == 2 * rows * WIDTH * vocabulary


def test_full_checkpointing_keeps_the_blocks_inputs():
    """More blocks are more inputs, (T, d) fp32 each."""
    deep, deeper = (
        planned(
            config(model={**config().model, "num_hidden_layers": n}, train={"batch_size": 64}), checkpointing="full"
        )
        for n in (8, 12)
    )
    stream = 64 * 16 * WIDTH * 4
    grown = deeper.memory.most["activations"] - deep.memory.most["activations"]
    assert grown == pytest.approx(4 * stream, rel=0.02)


def test_a_second_micro_batch_finds_gradients():
    one, two = (planned(config(train={"batch_tokens": 128 * n, "micro_tokens": 128})) for n in (1, 2))
    assert two.accumulation == 2
    assert two.memory.peak - one.memory.peak == pytest.approx(4 * one.parameters, rel=0.3)


def test_a_gpu_keeps_less_of_norms():
    from jepa_scale.plan.hardware import find_gpu

    cpu, gpu = planned(config()), planned(config(), gpu=find_gpu("a100"))
    assert gpu.memory.most["activations"] < cpu.memory.most["activations"]
    assert gpu.memory.state == cpu.memory.state


@pytest.mark.parametrize("ranks", [2, 64])
def test_losses_over_all_ranks_see_all_ranks(ranks):
    objective = {"name": "horizon", **{k: v for k, v in HORIZON.items() if k != "name"}, "loss": "barlow"}
    plan = planned(config(objective=objective, train={"batch_size": ranks * 2}), ranks)
    assert plan.step_tokens == ranks * plan.micro_tokens


def test_the_process_group_is_gone_afterwards():
    with fake_ranks(7):
        assert torch.distributed.get_world_size() == 7
    assert not torch.distributed.is_initialized()
    assert modelled(config())[1].world_size == 1


def test_a_family_that_needs_values_is_named(monkeypatch):
    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", lambda self, x: x * x.sum().item())
    with pytest.raises(
        InputError, match="model: MixtralForCausalLM cannot be planned, as it does not run without data"
    ):
        planned(config(model={"family": "huggingface", "config": FAMILIES["mixtral"], "vocab_size": 128}))
