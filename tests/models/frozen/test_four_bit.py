"""Frozen weights in 4 bits: what transformers makes of the same files by bitsandbytes, and who is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.frozen import four_bit
from jepa_scale.models.frozen.four_bit import FourBitLinear, PlannedFourBitLinear, check_device, coded_size, quantise
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions, check_options
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
ROWS = 40
TOKENS = [1, 7, 3, 22, 39, 4]


def saved(folder, config):
    """Weights that bf16 can hold, as published ones are; biases are not zero."""
    torch.manual_seed(3)
    decoder = build_backbone(ModelOptions(family="huggingface", config=config), ROWS).decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    decoder.bfloat16().save_pretrained(folder)
    return str(folder)


def options(folder, **keys):
    return ModelOptions(
        **{"family": "huggingface", "pretrained": folder, "lora": {"rank": 2}, "load_in_4bit": True, **keys}
    )


def quantised(folder, dtype, **keys):
    torch.manual_seed(0)
    backbone = build_backbone(options(folder, **keys), ROWS)
    quantise(backbone, dtype, lambda _, weight: weight)
    return backbone


@torch.no_grad()
def logits(backbone):
    sequence = pack_sequence([Segment(TOKENS, "text")])
    return backbone.logits(backbone.hidden(sequence))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_transformers_computes_with_bitsandbytes(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path, LLAMA)
    ours = logits(quantised(folder, dtype).to(dtype))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")
    theirs.train()  # in eval mode it rounds the scales to bf16, for a kernel of some CPUs
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        wanted, unquantised = (model(torch.tensor([TOKENS])).logits[0] for model in (theirs, plain))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert (wanted - unquantised).abs().max() > 0.05  # else nothing would be quantised


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_matrices_of_the_blocks_alone_are_quantised(tmp_path, config):
    """What is adapted and what is not; embedding, LM head, norms and biases stay as they are."""
    pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path, config)
    before = dict(build_backbone(options(folder), ROWS).named_parameters())
    target = "q_proj" if config is LLAMA else "c_fc"
    backbone = quantised(folder, torch.float32, lora={"rank": 2, "targets": [target]})
    left = dict(backbone.named_parameters())
    layers = [m for m in backbone.modules() if isinstance(m, FourBitLinear)]
    assert len(layers) == 2 * (7 if config is LLAMA else 4)
    matrices = [
        n for n, p in left.items() if p.dim() == 2 and ".lora_" not in n and "embed" not in n and "head" not in n
    ]
    assert all("wte" in name or "wpe" in name for name in matrices), matrices
    biases = [name for name in left if name.endswith(".bias") and ".lora_" not in name]
    assert biases and all(torch.equal(left[n], before[n]) for n in biases if n in before)
    reference = build_backbone(options(folder, lora={"rank": 2, "targets": [target]}), ROWS)
    difference = (logits(backbone) - logits(reference)).abs()
    assert 0 < difference.mean() < 0.3 * logits(reference).std()  # transposed weights would give anything


def test_gradients_are_those_of_the_matrix_that_the_codes_stand_for(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    coded = FourBitLinear(layer, layer.weight.detach(), torch.float32)
    matrix = functional.dequantize_4bit(coded._codes.packed, coded._codes.state)
    assert 0.01 < (matrix - layer.weight).abs().mean() / layer.weight.abs().mean() < 0.2
    x, same = (torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    g = torch.randn(5, 96)
    coded(x).backward(g)
    nn.functional.linear(same, matrix, layer.bias).backward(g)
    torch.testing.assert_close(x.grad, same.grad)
    assert copy.deepcopy(coded)._codes is coded._codes


@pytest.mark.parametrize("shape", [(96, 64), (5, 30), (300, 256)])
def test_the_size_of_codes(shape):
    pytest.importorskip("bitsandbytes")
    layer = nn.Linear(shape[1], shape[0], bias=False)
    codes = FourBitLinear(layer, layer.weight.detach(), torch.float32)._codes
    state = codes.state
    held = [codes.packed, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    assert coded_size(shape[0] * shape[1]) == sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False)])
def test_the_planned_layer_has_its_shapes_and_keeps_nothing(layer):
    planned = PlannedFourBitLinear(layer.to("meta"))
    kept = []
    x = torch.empty(3, 6, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = planned(x)
    y.sum().backward()
    assert y.shape == (3, 4) and x.grad.shape == (3, 6) and not kept


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match=r"model.load_in_4bit: bitsandbytes cannot be imported .*'jepa-scale\[4bit\]'"):
        check_device(torch.device("cpu"))


def test_on_a_device_without_kernels_it_is_refused(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    check_device(torch.device("cpu"))

    def quantize_4bit(*args, **keys):
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(functional, "quantize_4bit", quantize_4bit)
    message = r"bitsandbytes cannot quantise on cpu \(NotImplementedError: no kernel for this device\); install"
    with pytest.raises(InputError, match=f"model.load_in_4bit: {message}"):
        check_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": None}, "model.load_in_4bit: needs model.lora"),
        ({"random_init": True}, "model.load_in_4bit: needs the weights of model.pretrained"),
        ({"pretrained": None, "config": LLAMA}, "model.load_in_4bit: needs the weights of model.pretrained"),
        ({"allow_missing": ["model.layers.1"]}, "model.allow_missing: random weights cannot be quantised"),
        ({"family": "native", "pretrained": None}, "model.load_in_4bit: needs model.family: huggingface"),
    ],
)
def test_what_does_not_go_with_it(keys, message):
    with pytest.raises(InputError, match=message):
        check_options(options("somewhere", **keys))


def test_a_layer_without_frozen_weight_is_left(tmp_path):
    pytest.importorskip("bitsandbytes")
    backbone = quantised(saved(tmp_path, LLAMA), torch.float32)
    assert isinstance(backbone, Backbone)
    assert list(four_bit.frozen_layers(backbone)) == []
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
