"""Which perceptrons of transformers' families become ours, and that the decoder stays the same function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from jepa_scale.models.decoder import JepaMLP
from jepa_scale.models.families.gates import adopt_gates
from tests.models.families.decoders import SHAPE, outcome

FAMILIES = {"llama": 2, "qwen3": 2, "mistral": 2, "gemma": 0, "phi3": 0, "gpt_neox": 0}
"""Perceptrons that become ours: Gemma's activation is GELU, Phi-3 has one layer for gate and up, GPT-NeoX no gate."""


def decoder(family):
    config = AutoConfig.for_model(family, vocab_size=50, pad_token_id=0, **SHAPE, head_dim=8, num_key_value_heads=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(("family", "number"), FAMILIES.items())
def test_the_function_and_the_names_stay(family, number):
    model = decoder(family)
    expected = outcome(model)
    state = torch.get_rng_state()
    assert adopt_gates(model) == number == sum(isinstance(m, JepaMLP) for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state), "the trial's numbers are its own"
    found = outcome(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert adopt_gates(model) == 0, "they are ours already"


def test_a_model_without_data_has_the_same_perceptrons():
    with torch.device("meta"):
        model = decoder("llama")
        adopted = adopt_gates(model)
    assert adopted == FAMILIES["llama"] and all(p.is_meta for p in model.parameters())


class Other(nn.Module):
    """By the names of its layers SwiGLU."""

    def __init__(self, formula, **extra):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.formula = formula
        for name, module in extra.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.formula(self, x)


def swiglu(m, x):
    return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Other(swiglu), True),
        (Other(lambda m, x: swiglu(m, x) + x), False),
        (Other(lambda m, x: m.down_proj(F.gelu(m.gate_proj(x)) * m.up_proj(x))), False),
        (Other(lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x))), False),
        (Other(lambda m, x: m.down_proj((F.silu(m.gate_proj(x)) * m.up_proj(x)).clamp(max=1.0))), False),
        (Other(lambda m, x: swiglu(m, x.view(-1, 4))), False),
        (Other(lambda m, x: (swiglu(m, x),)), False),
        (Other(lambda m, x: swiglu(m, m.norm(x)), norm=nn.LayerNorm(4)), False),
    ],
    ids=["swiglu", "residual", "gelu", "exchanged", "clamped", "fixed width", "tuple", "norm"],
)
def test_what_computes_something_else_stays(other, same):
    layers = dict(other.named_children())
    assert adopt_gates(nn.ModuleList([other])) == same
    assert dict(other.named_children()) == layers and (type(other) is JepaMLP) == same
