"""Which rotary embeddings of transformers' families become ours, and that they stay the same function."""

import importlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from jepa_scale.models.families.rotation import adopt_rotations
from tests.models.families.decoders import SHAPE, outcome


def theirs(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.fixture
def untouched(monkeypatch):
    """Modules of transformers whose function is that of transformers, before the test and after it."""

    def of(*families):
        for family in families:
            function = theirs(family).apply_rotary_pos_emb
            monkeypatch.setattr(theirs(family), "apply_rotary_pos_emb", getattr(function, "__wrapped__", function))
        return [theirs(family) for family in families]

    return of


def decoder(family):
    keys = {"rotary_pct": 0.5} if family == "gpt_neox" else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=50, **SHAPE, **keys)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt_neox"])
def test_the_function_stays(family, untouched):
    """GPT-NeoX rotates a part of each head, and keeps its own function for that."""
    (module,) = untouched(family)
    model = decoder(family)
    before, expected = module.apply_rotary_pos_emb, outcome(model)
    adopt_rotations(model)
    adopted = module.apply_rotary_pos_emb
    assert adopted is not before
    for name, value in outcome(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    adopt_rotations(model)
    assert module.apply_rotary_pos_emb is adopted


def test_tables_of_two_different_halves_are_rotated_as_by_the_family(untouched):
    (module,) = untouched("llama")
    made = [torch.randn(s, requires_grad=len(s) == 4) for s in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8))]
    found = []
    for _ in range(2):
        rotated = module.apply_rotary_pos_emb(*made)
        gradients = torch.autograd.grad(sum((r * r.detach().cos()).sum() for r in rotated), made[:2])
        found.append([*rotated, *gradients])
        adopt_rotations(decoder("llama"))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_wider_table_widens_the_result_as_by_the_family(untouched):
    (module,) = untouched("llama")
    adopt_rotations(decoder("llama"))
    q, k = torch.randn(2, 1, 4, 5, 8, dtype=torch.bfloat16).unbind()
    table = torch.randn(2, 1, 5, 8).unbind()
    found, expected = (f(q, k, *table) for f in (module.apply_rotary_pos_emb, module.apply_rotary_pos_emb.__wrapped__))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


def test_another_formula_stays(monkeypatch, untouched):
    """Pairs of neighbours instead of halves."""
    (module,) = untouched("llama")

    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    monkeypatch.setattr(module, "apply_rotary_pos_emb", neighbours)
    adopt_rotations(decoder("llama"))
    assert module.apply_rotary_pos_emb is neighbours


def test_a_decoder_without_a_rotation_is_left_alone():
    adopt_rotations(nn.Linear(2, 2))


def test_a_model_without_data_rotates_alike(untouched):
    """The planner counts what a run computes."""
    (module,) = untouched("qwen3")
    with torch.device("meta"):
        adopt_rotations(decoder("qwen3"))
    assert hasattr(module.apply_rotary_pos_emb, "__wrapped__")
