"""A family whose cache gives other logits, or none, is refused by its name."""

import pytest
import torch

from jepa_scale.models.generation.cache_check import check_generation
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError
from tests.models import test_token_rows
from tests.models.families.test_probe import make_half
from tests.models.test_token_rows import MAMBA2, make

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "qwen3_next", "jamba", "lfm2"])
def test_a_family_that_generates_passes_and_stays_as_it_was(name):
    backbone = make(name)
    backbone.decoder.train()
    backbone.layers[0].eval()
    own, state = backbone.decoder.generation_config, torch.get_rng_state()
    check_generation(backbone, CPU, torch.float32)
    assert backbone.decoder.generation_config is own and torch.equal(torch.get_rng_state(), state)
    assert backbone.decoder.training and not backbone.layers[0].training and backbone.layers[1].training


def test_a_family_that_takes_padding_for_text_is_refused(monkeypatch):
    """RWKV has no use for the mask."""
    rwkv = dict(model_type="rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64)
    monkeypatch.setitem(test_token_rows.FAMILIES, "rwkv", rwkv)
    with pytest.raises(InputError, match="RwkvForCausalLM does not compute with its cache what it computes without"):
        check_generation(make("rwkv"), CPU, torch.float32)


def test_a_family_that_cannot_go_on_is_refused(monkeypatch):
    backbone = build_backbone(ModelOptions(family="huggingface", packing="padded", config=dict(MAMBA2)), 50)
    own = backbone.decoder.generation_config
    monkeypatch.setattr(backbone.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(InputError, match=r"Mamba2ForCausalLM cannot generate .* \(division by zero\); choose another"):
        check_generation(backbone, CPU, torch.float32)
    assert backbone.decoder.generation_config is own


def test_kernels_that_do_not_run_where_the_weights_are_are_tried_as_the_run_computes():
    backbone = make_half()
    check_generation(backbone, CPU, torch.bfloat16)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    with pytest.raises(InputError, match=r"MistralForCausalLM cannot generate .* \(needs bfloat16\); choose another"):
        check_generation(backbone, CPU, torch.float32)
