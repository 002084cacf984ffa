"""Which norms of transformers' families become ours, and that the decoder stays the same function."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from jepa_scale.models.families.norms import adopt_norms
from jepa_scale.models.layers.norm import RMSNorm
from tests.models.families.decoders import SHAPE, outcome

FAMILIES = {"llama": 5, "qwen3": 9, "olmo2": 9, "gemma": 0, "gemma3_text": 0}
"""Norms that become ours: Gemma's gain is 1 + its weight."""


def decoder(family, **keys):
    config = AutoConfig.for_model(
        family, vocab_size=50, **SHAPE, head_dim=8, num_key_value_heads=2, rms_norm_eps=1e-5, **keys
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in made.modules():
            if "norm" in type(module).__name__.lower():
                module.weight.normal_()
    return made


@pytest.mark.parametrize(("family", "number"), FAMILIES.items())
def test_the_function_and_the_names_stay(family, number):
    model = decoder(family)
    expected, kinds = outcome(model), [type(m) for m in model.modules()]
    assert adopt_norms(model) == number == sum(isinstance(m, RMSNorm) for m in model.modules())
    assert number or kinds == [type(m) for m in model.modules()]
    found = outcome(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_without_data_has_the_same_norms():
    """The planner counts what a run computes."""
    with torch.device("meta"):
        model = decoder("llama")
        adopted = adopt_norms(model)
    assert adopted == FAMILIES["llama"] and all(p.is_meta for p in model.parameters())


class OtherRMSNorm(nn.Module):
    """By its name and parameters an RMSNorm."""

    def __init__(self, formula):
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.ones(8)), 1e-3, formula

    def forward(self, x):
        return self.formula(self, x)


@pytest.mark.parametrize(
    ("formula", "same"),
    [
        (lambda n, x: n.weight * x * (x.pow(2).mean(-1, keepdim=True) + n.eps).rsqrt(), True),
        (lambda n, x: n.weight * x * (x.pow(2).sum(-1, keepdim=True) + n.eps).rsqrt(), False),
        (lambda n, x: n.weight * x * x.pow(2).mean(-1, keepdim=True).rsqrt(), False),
        (lambda n, x: n.weight * (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + n.eps).rsqrt(), False),
        (lambda n, x: x * (x.pow(2).mean(-1, keepdim=True) + n.eps).rsqrt(), False),
    ],
    ids=["rms", "sum", "no epsilon", "layer norm", "no gain"],
)
def test_what_computes_something_else_stays(formula, same):
    assert adopt_norms(nn.ModuleList([OtherRMSNorm(formula)])) == same
