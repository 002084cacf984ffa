"""What cannot be cut is refused; what is cut computes 1/tp of the products."""

import pytest

from jepa_scale.utils.errors import InputError
from tests.plan.small import MODEL, config, modelled, planned


@pytest.mark.parametrize(
    ("model", "tp", "key"),
    [
        ({}, 4, "num_key_value_heads, which is 2"),
        ({"num_key_value_heads": 4, "intermediate_size": 46}, 4, "intermediate_size, which is 46"),
        ({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}, 2, "num_attention_heads, which is 3"),
    ],
)
def test_sizes_that_tp_does_not_divide_are_named(model, tp, key):
    with pytest.raises(InputError, match=f"engine.tp: {tp} does not divide model.{key}"):
        modelled(config(model={**MODEL, **model}), world_size=tp, tp=tp)


def test_a_family_without_a_plan_is_named():
    gpt2 = {"family": "huggingface", "vocab_size": 64, "config": {"model_type": "gpt2", "n_embd": 32, "n_head": 4}}
    with pytest.raises(InputError, match="no tensor-parallel plan for GPT2LMHeadModel"):
        modelled(config(model=gpt2), world_size=2, tp=2)


LLAMA = {
    "family": "huggingface",
    "vocab_size": MODEL["vocab_size"],
    "config": {"model_type": "llama", **{key: value for key, value in MODEL.items() if key != "vocab_size"}},
}


@pytest.mark.parametrize(
    "model", [MODEL, {**MODEL, "position_embedding": "pope"}, LLAMA], ids=["rope", "pope", "llama"]
)
def test_products_and_activations_are_divided(model):
    whole, half = (planned(config(model=model), tp, tp=tp) for tp in (1, 2))
    assert sum(op.flops for op in half.memory.ops) * 2 == sum(op.flops for op in whole.memory.ops)
    # the stream is gathered for attention and MLP, everything else is halved
    assert 0.5 < half.memory.most["activations"] / whole.memory.most["activations"] < 0.75
    assert half.flops == whole.flops


def test_both_engines_divide_alike():
    shares = []
    for engine in ({}, {"name": "deepspeed", "deepspeed": "configs/ds/zero1.json"}):
        whole, half = (planned(config(engine), tp, tp=tp) for tp in (1, 2))
        shares.append(half.memory.most["activations"] / whole.memory.most["activations"])
    assert shares[0] == pytest.approx(shares[1], rel=0.02)
