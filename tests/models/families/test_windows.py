"""The window of each block is that of the mask which the family makes."""

import pytest
import torch

from jepa_scale.models.families.windows import WINDOW
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        (dict(model_type="llama"), [None] * 4),
        (dict(model_type="mistral", sliding_window=7), [7] * 4),
        (dict(model_type="phimoe", sliding_window=7, **MOE), [7] * 4),  # in the config alone
        (dict(model_type="qwen2", sliding_window=7), [None] * 4),  # not used
        (dict(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=2), [None, None, 7, 7]),
        (dict(model_type="gpt_oss", sliding_window=7, head_dim=8, **MOE), [7, None, 7, None]),
        (dict(model_type="cohere2", sliding_window=7, sliding_window_pattern=4), [7, 7, 7, None]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_windows_of_families(keys, windows, device):
    with torch.device(device):
        backbone = build_backbone(ModelOptions(family="huggingface", config={**SIZES, **keys}), 50)
    assert [getattr(block, WINDOW) for block in backbone.layers] == windows
    assert [getattr(block.self_attn, WINDOW) for block in backbone.layers] == windows
    assert not any(type(block).__name__ == "_Placeholder" for block in backbone.layers)


def test_outputs_are_still_recorded_afterwards():
    """transformers installs its hooks once; it must not have installed them on the placeholders."""
    config = {"model_type": "mixtral", "output_router_logits": True, **SIZES, **MOE}
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), 50)
    with backbone.unpacked() as decoder:
        out = decoder(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert len(out.router_logits) == 4 and len(out.hidden_states) == 5
