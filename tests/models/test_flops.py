"""The closed forms against PyTorch's own counter, which sees every product that really runs."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_scale.models.attention.meta import attention_pairs
from jepa_scale.models.flops import Cost, DecoderFlops, linear_cost, peak_flops, peak_of
from jepa_scale.models.layers.mlp import Mlp
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import PackedSequence, Segment, Views, pack, pack_sequence

VOCABULARY, LENGTHS, ROWS = 50, (1, 2, 5, 5, 9), 3
NATIVE = dict(hidden_size=32, num_hidden_layers=3, num_key_value_heads=2)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "native": dict(NATIVE, num_key_value_heads=4),
    "native, shared heads": NATIVE,
    "native, polar": dict(NATIVE, position_embedding="pope", embedding_norm=True),
    "native, tied": dict(NATIVE, tie_word_embeddings=True, output_bias=True),
    "native, bridge": dict(NATIVE, bridge_after=2, bridge_intermediate_size=24),
    "native, barrier": dict(NATIVE, bridge_after=2, bridge_grad_barrier=True),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "llama": dict(model_type="llama", **LLAMA),
    "qwen3": dict(model_type="qwen3", head_dim=16, **LLAMA),
    "olmo2": dict(model_type="olmo2", **LLAMA),
    "gemma3": dict(model_type="gemma3_text", head_dim=16, sliding_window=3, layer_types=SLIDING, **LLAMA),
    "mistral": dict(model_type="mistral", sliding_window=4, **LLAMA),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, **LLAMA),
}


def make(name):
    keys = FAMILIES[name]
    options = (
        ModelOptions(**keys) if name.startswith("native") else ModelOptions(family="huggingface", config=dict(keys))
    )
    torch.manual_seed(0)
    backbone = build_backbone(options, VOCABULARY)
    if name == "mixtral":
        backbone.decoder.set_experts_implementation("eager")
    return backbone


def stream(lengths):
    return pack_sequence([Segment([i % VOCABULARY for i in range(n)], "a") for n in lengths])


def counted(backbone, lengths, rows=ROWS, until=None, train=True):
    """What FlopCounterMode sees, of segments of these lengths or of a stream: (forward, backward). Attention in separate products, which it counts as they are;
    the rotary tables of transformers are outer products, which it counts and we don't."""
    packed, stop_gradient_layer = (
        lengths if isinstance(lengths, PackedSequence) else stream(lengths),
        backbone.stop_gradient_layer,
    )
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(train):
        with FlopCounterMode(display=False) as counter:
            hidden, tap = (
                backbone.hidden_and_tap(packed, stop_gradient_layer)
                if stop_gradient_layer
                else (backbone.hidden(packed, until=until), 0)
            )
            out = backbone.logits(hidden[:rows]) if until is None else hidden
        tables = {k: sum(v.values()) for k, v in counter.get_flop_counts().items() if k.endswith("rotary_emb")}
        forward = counter.get_total_flops() - sum(tables.values())
        if not train:
            return forward, 0
        with FlopCounterMode(display=False) as counter:
            (
                out.sum() + (tap.sum() if stop_gradient_layer else 0)
            ).backward()  # the blocks below a barrier learn from the tap
    return forward, counter.get_total_flops()


def ours(flops, lengths, rows=ROWS):
    forward = flops.count(lengths, rows, square=True)
    return forward, flops.count(lengths, rows, square=True, training=True) - forward


@pytest.mark.parametrize("lengths", [(7,), LENGTHS], ids=["one segment", "several"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_of_forward_and_backward_is_counted(name, lengths):
    backbone = make(name)
    flops = DecoderFlops.of(backbone)
    assert flops.uncounted == ()
    assert ours(flops, lengths) == counted(backbone, lengths)


@pytest.mark.parametrize("name", ["native, polar", "native, bridge", "gemma3", "gpt2"])
@pytest.mark.parametrize("until", [1, 2, 3])
def test_the_lower_blocks_alone(name, until):
    backbone = make(name)
    flops = DecoderFlops.of(backbone, until=until)
    assert ours(flops, LENGTHS, rows=0) == counted(backbone, LENGTHS, until=until)
    lower = DecoderFlops.of(backbone.lower(until))
    assert (lower.per_token, lower.per_pair) == (flops.per_token, flops.per_pair)
    assert lower.per_row == Cost(0, 0)


@pytest.mark.parametrize("name", ["native, polar", "native, bridge", "llama", "gpt2", "olmo2"])
def test_frozen_lower_blocks_have_no_backward(name):
    backbone = make(name)
    for module in (backbone.decoder.get_input_embeddings(), backbone.layers[0]):
        module.requires_grad_(False)
    if name == "gpt2":
        backbone.decoder.transformer.wpe.requires_grad_(False)
    forward, backward = ours(DecoderFlops.of(backbone), LENGTHS)
    assert forward == counted(backbone, LENGTHS)[0]
    extra = 0
    if name == "olmo2":  # no norm before the projections: nothing asks for the gradient of what they read
        attention = backbone.layers[1].self_attn
        projections = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])
        extra = linear_cost(projections).forward * sum(LENGTHS)
    assert backward == counted(backbone, LENGTHS)[1] + extra


def test_frozen_matrices_only_pass_the_gradient_on():
    backbone = make("llama")
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("norm" in name)
    assert ours(DecoderFlops.of(backbone), LENGTHS) == counted(backbone, LENGTHS)


def test_nothing_trains():
    backbone = make("llama").requires_grad_(False)
    flops = DecoderFlops.of(backbone)
    assert flops.count(LENGTHS, ROWS, training=True) == flops.count(LENGTHS, ROWS)
    assert ours(flops, LENGTHS) == counted(backbone, LENGTHS, train=False)


@pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.layers.2.mlp"])
def test_only_a_part_at_the_top_trains(part):
    backbone = make("llama").requires_grad_(False)
    backbone.decoder.get_submodule(part).requires_grad_(True)
    if part.endswith("mlp"):
        backbone.layers[2].input_layernorm.requires_grad_(True)
    assert ours(DecoderFlops.of(backbone), LENGTHS) == counted(backbone, LENGTHS)


def test_lora():
    peft = pytest.importorskip("peft")
    backbone = make("llama")
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
    peft.inject_adapter_in_model(config, backbone.decoder)
    flops = DecoderFlops.of(backbone)
    assert flops.uncounted == ()
    forward, backward = ours(flops, LENGTHS)
    assert forward == counted(backbone, LENGTHS)[0]
    first = backbone.layers[0].self_attn
    read = [m for p in (first.q_proj, first.k_proj, first.v_proj) for m in (p.base_layer, p.lora_A["default"])]
    extra = linear_cost(nn.ModuleList(read)).forward * sum(
        LENGTHS
    )  # as the module says: once too often, in this one block
    assert backward == counted(backbone, LENGTHS)[1] + extra


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_lora_with_new_rows(name):
    """The embedding's new rows train: what the lowest block reads asks for a gradient, and every product is as it is counted."""
    keys = dict(FAMILIES[name], tie_word_embeddings=True)
    lora = dict(rank=2, new_ids_from=VOCABULARY - 4)
    backbone = build_backbone(ModelOptions(family="huggingface", config=keys, lora=lora), VOCABULARY)
    flops = DecoderFlops.of(backbone)
    assert flops.uncounted == ()
    assert ours(flops, LENGTHS) == counted(backbone, LENGTHS)


def test_a_barrier_stops_the_gradient():
    backbone = make("native, barrier")
    for part in (backbone.decoder.model.bridge, backbone.layers[2], backbone.decoder.model.norm):
        part.requires_grad_(False)
    flops = DecoderFlops.of(backbone)
    assert ours(flops, LENGTHS) == counted(backbone, LENGTHS)
    assert flops.per_row.backward == flops.per_row.forward


def test_unusual_parameters_are_named():
    backbone = make("llama")
    backbone.layers[1].mlp.odd = nn.Parameter(torch.zeros(2, 3))
    assert DecoderFlops.of(backbone).uncounted == ("block 2: mlp.odd",)
    mixture = make("mixtral")
    vars(mixture.decoder.config)["num_experts_per_tok"] = None  # past the config's own check
    assert "block 1: mlp.experts.gate_up_proj" in DecoderFlops.of(mixture).uncounted


def test_experts_in_a_list_run_for_some_tokens_only():
    backbone = make("llama")
    before = DecoderFlops.of(backbone).per_token.forward
    backbone.decoder.config.num_experts_per_tok = 2
    mlp = backbone.layers[0].mlp
    mlp.experts = nn.ModuleList(nn.Linear(32, 8) for _ in range(4))
    mlp.shared_experts = nn.ModuleList([nn.Linear(32, 8)])
    assert DecoderFlops.of(backbone).per_token.forward - before == (2 + 1) * 2 * 32 * 8


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_pairs_are_those_that_a_mask_leaves(window):
    expected = 0
    for n in LENGTHS:
        behind = torch.arange(n)[:, None] - torch.arange(n)
        expected += int(((behind >= 0) & (behind < (window or n))).sum())
    assert attention_pairs(LENGTHS, window) == expected
    assert attention_pairs(LENGTHS, window, causal=False) == sum(n * n for n in LENGTHS)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 20])
def test_a_branch_is_charged_for_its_prefix(window):
    own, keys = (1, 1, 3, 4, 9), (1, 7, 10, 5, 9)
    expected = 0
    for n, k in zip(own, keys, strict=True):
        behind = torch.arange(k - n, k)[:, None] - torch.arange(k)
        expected += int(((behind >= 0) & (behind < (window or k))).sum())
    assert attention_pairs(own, window, key_lengths=keys) == expected
    assert attention_pairs(own, window, causal=False, key_lengths=keys) == sum(
        n * k for n, k in zip(own, keys, strict=True)
    )
    assert attention_pairs(own, window, key_lengths=own) == attention_pairs(own, window)
    if window is None:
        assert expected == sum(n * (k - n) + n * (n + 1) // 2 for n, k in zip(own, keys, strict=True))


@pytest.mark.parametrize("name", ["native, polar", "native, bridge", "gpt2", "gemma3"])
def test_every_product_of_branches_is_counted(name):
    """Those of a parent, its branches and a stranger, by PyTorch's counter again."""
    segments = [Segment([1] * 9, "p"), Segment([2] * 3, "b", prefix=("p", 5)), Segment([3], "c", prefix=("p", 9))]
    packed = pack([Views([*segments, Segment([4] * 5, "d")])]).sequences["main"]
    backbone = make(name)
    flops, lengths, keys = DecoderFlops.of(backbone), packed.table.lengths, packed.key_lengths
    forward = flops.count(lengths, ROWS, square=True, key_lengths=keys)
    training = flops.count(lengths, ROWS, square=True, key_lengths=keys, training=True)
    assert (forward, training - forward) == counted(backbone, packed)
    narrow = sum(cost.forward * attention_pairs(lengths, w, key_lengths=keys) for w, cost in flops.per_pair.items())
    square = sum(cost.forward * attention_pairs(lengths, None, False, keys) for cost in flops.per_pair.values())
    assert forward - flops.count(lengths, ROWS, key_lengths=keys) == square - narrow > 0


def test_causal_attention_costs_the_pairs_that_are_seen():
    flops = DecoderFlops.of(make("gemma3"))
    one_pair = 2 * 4 * (16 + 16)
    assert flops.per_pair == {3: Cost(2 * one_pair, 4 * one_pair), None: Cost(one_pair, 2 * one_pair)}
    saved = flops.count((9,), square=True) - flops.count((9,))
    assert saved == one_pair * (2 * (81 - (6 + 6 * 3)) + (81 - 45))


def test_the_window_is_the_one_that_attention_gets():
    assert set(DecoderFlops.of(make("mistral")).per_pair) == {4}  # the config's, handed to every block
    gemma = make("gemma3")
    gemma.layers[0].self_attn.sliding_window = 5  # the module's own goes before the config's
    assert set(DecoderFlops.of(gemma).per_pair) == {5, None, 3}
    assert set(DecoderFlops.of(make("qwen3")).per_pair) == {None}


def test_the_rule_of_six():
    """A long-known check (Kaplan et al. 2020, arXiv 2001.08361): six operations per token and weight."""
    backbone = make("llama")
    weights = sum(p.numel() for n, p in backbone.named_parameters() if p.dim() == 2 and "embed" not in n)
    flops = DecoderFlops.of(backbone)
    assert flops.count((1,) * 100, 100, training=True) == 100 * (6 * weights + 3 * 3 * 2 * 4 * (8 + 8))


def test_heads_of_an_objective():
    head, x = Mlp(6, 4), torch.randn(7, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = head(x)
    assert 7 * linear_cost(head).forward == counter.get_total_flops() == 7 * 2 * (6 * 8 + 8 * 4)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert 7 * linear_cost(head).backward == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GH200 480GB", 989.4),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(name, expected):
    assert peak_flops(name, torch.bfloat16) == (expected and pytest.approx(expected * 1e12))


def test_there_is_no_peak_without_a_gpu(monkeypatch):
    assert peak_of(torch.device("cpu"), torch.bfloat16, True) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    found = [
        peak_of(torch.device("cuda", 0), p, tf32)
        for p, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
    ]
    assert found == [312e12, 156e12, 19.5e12]


def test_peak_by_dtype():
    name = "NVIDIA A100-SXM4-80GB"
    assert peak_flops(name, torch.float32) == 19.5e12
    assert peak_flops(name, torch.float32, tf32=True) == 156e12
    assert peak_flops(name, torch.float64) is None
