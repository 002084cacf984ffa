"""The probe passes what agrees, and names the first block of what does not."""

import re

import pytest
import torch
from torch import nn

from jepa_scale.models.attention.packed import NAME as PACKED
from jepa_scale.models.families import probe as module
from jepa_scale.models.families.probe import probe
from jepa_scale.models.families.windows import WINDOW
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

CPU = torch.device("cpu")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


MAMBA2 = dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=4, hidden_size=32, num_hidden_layers=3)
BLOOM = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
SET, OTHER = "; set model.packing: padded", "; choose another family"


def make(model_type="mistral", lora=None, packing="packed", **keys):
    torch.manual_seed(0)
    sizes = {"mamba2": MAMBA2, "bloom": BLOOM}.get(model_type, SIZES)
    config = {"model_type": model_type, **sizes, **keys}
    backbone = build_backbone(ModelOptions(family="huggingface", config=config, lora=lora, packing=packing), 50)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "keys",
    [
        dict(sliding_window=4),
        dict(lora=dict(rank=2)),
        dict(model_type="gemma2", head_dim=8),
        dict(packing="padded", sliding_window=4),
        dict(packing="padded", model_type="mamba2"),
        dict(packing="padded", model_type="gemma2", head_dim=8, lora=dict(rank=2)),
    ],
)
def test_a_family_that_agrees_passes_and_is_left_as_it_was(keys, dtype):
    backbone = make(**keys)
    backbone.decoder.train()
    backbone.layers[0].eval()
    before = {name: (x.data_ptr(), x.clone()) for name, x in backbone.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.modules()]
    generator = torch.get_rng_state()
    probe(backbone, CPU, dtype)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in backbone.modules()] == hooks
    after = backbone.state_dict()
    assert all(after[n].data_ptr() == at and torch.equal(after[n], x) for n, (at, x) in before.items())
    assert all(isinstance(p, nn.Parameter) for m in backbone.modules() for p in m._parameters.values() if p is not None)
    assert backbone.decoder.training and not backbone.layers[0].training and backbone.layers[1].training
    wanted = PACKED
    if backbone.padded:
        wanted = "sdpa" if keys.get("model_type") is None else "eager"
    assert backbone.decoder.config._attn_implementation == wanted


def refused(backbone, message, dtype=torch.float32, way=OTHER):
    with pytest.raises(InputError) as error:
        probe(backbone, CPU, dtype)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(way) and str(error.value).count(";") == 1


class Leak(nn.Module):
    """Adds the state of the token before, whichever segment that is in."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 3])
def test_a_block_that_sees_the_segment_before_is_named(block, dtype):
    backbone = make()
    backbone.layers[block - 1].mlp = Leak(backbone.layers[block - 1].mlp)
    refused(
        backbone,
        f"on packed segments what it computes on each alone: block {block} of 3 is the first to differ",
        dtype,
        SET,
    )


class Ahead(Leak):
    """Adds the state of the token after, which is padding at the end of a row."""

    def forward(self, x):
        return self.inner(x + torch.nn.functional.pad(x, (0, 0, -1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["mistral", "mamba2"])
def test_a_block_that_sees_the_padding_is_named(model_type, dtype):
    backbone = make(model_type, packing="padded")
    name = "mixer" if model_type == "mamba2" else "mlp"
    part = getattr(backbone.layers[1], name)
    if model_type == "mamba2":
        part.in_proj = Ahead(part.in_proj)
    else:
        backbone.layers[1].mlp = Ahead(part)
    refused(backbone, "in padded rows what it computes on each alone: block 2 of 3 is the first to differ", dtype)


def test_a_block_that_sees_ahead_has_no_way_out():
    backbone = make()
    backbone.layers[0].mlp = Ahead(backbone.layers[0].mlp)
    refused(backbone, "block 1 of 3 is the first to differ")


def test_a_window_longer_than_the_segments_is_noticed():
    backbone = make(sliding_window=40, max_position_embeddings=64)
    for part in backbone.layers[1].modules():
        setattr(part, WINDOW, None)
    refused(backbone, "has a sliding window of 40 tokens in block 2 of 3, and no on packed segments", way=SET)
    beyond = make(sliding_window=64, max_position_embeddings=64)  # it hides nothing
    for part in beyond.layers[1].modules():
        setattr(part, WINDOW, None)
    probe(beyond, CPU, torch.float32)


def test_a_family_that_cannot_run_packed_is_refused():
    doge = make("doge")
    refused(doge, "DogeAttention needs a mask of its own", way=SET)
    message = "NemotronForCausalLM cannot run on packed segments (attention 'jepa_packed' needs packed"
    with pytest.raises(InputError, match=re.escape(message) + ".*" + SET):
        probe(make("nemotron"), CPU, torch.float32)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "does not support another attention, so it cannot run packed"),
        ("minimax", "has layers of kind 'linear_attention', which cannot run packed"),
    ],
)
def test_what_is_known_not_to_run_packed_is_refused_when_it_is_built(model_type, reason):
    keys = dict(model_type=model_type, **({} if model_type == "bloom" else dict(head_dim=8, num_local_experts=2)))
    with pytest.raises(InputError, match=f"{reason}{SET}$"):
        make(**keys)
    with torch.device("meta"), pytest.raises(InputError, match=f"{reason}; try model.packing: padded$"):
        make(**keys)
    probe(make(**keys, packing="padded"), CPU, torch.float32)


def test_no_way_is_named_that_leads_nowhere():
    """GPT-1 cannot run packed, and has no final norm."""
    options = ModelOptions(family="huggingface", config=dict(model_type="openai-gpt", n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(InputError, match=f"does not support another attention, so it cannot run packed{OTHER}$"):
        build_backbone(options, 50)


def test_other_logits_are_noticed():
    backbone = make("cohere")
    backbone.decoder.logit_scale = 1.0  # the config says otherwise
    refused(backbone, "logits is the first to differ")


def test_values_that_are_not_finite_do_not_pass():
    backbone = make()
    with torch.no_grad():
        backbone.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    refused(backbone, "block 1 of 3 is the first to differ, by nan")


class Half(nn.Module):
    """Runs in bf16 alone, as some kernels do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if x.dtype != torch.bfloat16:
            raise TypeError("needs bfloat16")
        return self.inner(x)


def test_kernels_that_cannot_run_on_the_host_are_compared_where_the_run_computes():
    backbone = make_half()
    probe(backbone, CPU, torch.bfloat16)
    backbone.layers[2].mlp = Leak(backbone.layers[2].mlp)
    refused(backbone, "see the segment before its own: block 3 of 3 differs by", torch.bfloat16, SET)
    refused(make_half(), "cannot run alone (needs bfloat16)")


def make_half():
    backbone = make()
    backbone.layers[1].mlp = Half(backbone.layers[1].mlp)
    return backbone


def test_a_failure_leaves_the_backbone_whole(monkeypatch):
    backbone = make()
    names = {name for name, _ in backbone.named_parameters()}
    monkeypatch.setattr(backbone.layers[1].mlp, "forward", lambda x: 1 / 0)
    refused(backbone, "cannot run alone (division by zero)", torch.bfloat16)
    assert {name for name, p in backbone.named_parameters() if p.dtype == torch.float32} == names


def test_a_short_model_is_probed_with_as_many_tokens_as_it_has():
    probe(make(max_position_embeddings=4), CPU, torch.float32)
    assert max(module.LENGTHS) > 4
