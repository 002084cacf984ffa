"""States on the way, a copy of the lower blocks, and an LM head that stays as it is."""

import pytest
import torch

from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence

VOCABULARY, LAYERS = 50, 3
NATIVE = dict(hidden_size=32, num_hidden_layers=LAYERS, num_key_value_heads=2)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
FAMILIES = {
    "native": NATIVE,
    "native tied": dict(tie_word_embeddings=True, output_bias=True, **NATIVE),
    "native bridge": dict(bridge_after=2, **NATIVE),
    "native bridge barrier": dict(bridge_after=1, bridge_grad_barrier=True, tie_word_embeddings=True, **NATIVE),
    "gpt2": dict(
        model_type="gpt2",
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_key_value_heads=2,
        final_logit_softcapping=5.0,
        **LLAMA,
    ),
    "qwen3": dict(model_type="qwen3", head_dim=16, num_key_value_heads=2, tie_word_embeddings=True, **LLAMA),
    "cohere": dict(model_type="cohere", num_key_value_heads=2, **LLAMA),
}
HEADS = ["native", "native tied", "gpt2", "gemma3", "cohere"]


def make(name, seed=0):
    torch.manual_seed(seed)
    keys = FAMILIES[name]
    own = name.startswith("native")
    options = ModelOptions(**keys) if own else ModelOptions(family="huggingface", config=keys)
    backbone = build_backbone(options, VOCABULARY)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


def stream(lengths=(1, 2, 5, 5, 9), seed=3):
    generator = torch.Generator().manual_seed(seed)
    return pack_sequence(
        [Segment(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist(), "a") for n in lengths]
    )


def gradients(backbone):
    return {name: None if p.grad is None else p.grad.clone() for name, p in backbone.named_parameters()}


# -- states on the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_and_tap_are_what_two_runs_give(name, tap):
    backbone, packed = make(name), stream()
    hidden, tapped = backbone.hidden_and_tap(packed, tap)
    assert torch.equal(hidden, backbone.hidden(packed))
    assert torch.equal(tapped, backbone.hidden(packed, until=tap))
    assert not any(block._forward_hooks for block in backbone.layers)
    assert torch.equal(backbone(packed), hidden)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["native bridge", "native bridge barrier", "gpt2", "gemma3"])
def test_gradient_flows_from_both(name, checkpointing):
    backbone, packed = make(name), stream()
    weights = torch.randn(2, packed.num_tokens, 32)
    outcomes = []
    for both in (
        lambda: backbone.hidden_and_tap(packed, 2),
        lambda: (backbone.hidden(packed), backbone.hidden(packed, until=2)),
    ):
        backbone.zero_grad()
        if checkpointing and not outcomes:
            backbone.decoder.train()
            backbone.decoder.gradient_checkpointing_enable()
        else:
            backbone.decoder.gradient_checkpointing_disable()
        sum((w * x).sum() for w, x in zip(weights, both(), strict=True)).backward()
        outcomes.append(gradients(backbone))
    for key, grad in outcomes[0].items():
        torch.testing.assert_close(grad, outcomes[1][key], atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_a_failing_run_takes_its_hook_along():
    backbone = make("native")
    long = pack_sequence([Segment([1] * 3000, "a")])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        backbone.hidden_and_tap(long, 1)
    assert not backbone.layers[0]._forward_hooks


# -- a copy of the lower blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_lower_gives_the_states_after_its_last_block(name, until):
    backbone, packed = make(name), stream()
    lower = backbone.lower(until)
    expected = backbone.hidden(packed, until=until)
    assert torch.equal(lower(packed), expected) and torch.equal(lower.hidden(packed, until=until), expected)
    assert lower.num_layers == until


@pytest.mark.parametrize("name", FAMILIES)
def test_lower_has_the_names_of_what_it_kept_and_nothing_else(name):
    backbone = make(name)
    ours = dict(backbone.named_parameters())
    kept = dict(backbone.lower(2).named_parameters())
    assert all(torch.equal(ours[key], value) and ours[key] is not value for key, value in kept.items())
    lost = {id(p) for p in backbone.parameters_above(2)}
    assert {key for key, p in ours.items() if id(p) not in lost} == kept.keys()
    assert any("bridge" in key for key in kept) is (name == "native bridge barrier")  # whose bridge follows block 1
    for part in ("lm_head", "model.norm.", "ln_f"):
        assert not any(part in key for key in kept)
    assert any("embed_tokens" in key or "wte" in key for key in kept)
    students = dict(backbone.named_modules(remove_duplicate=False))
    buffers = [key for key, _ in backbone.lower(2).named_buffers()]
    assert all(key.rpartition(".")[0] in students for key in buffers)


@pytest.mark.parametrize("name", FAMILIES)
def test_lower_is_a_copy_of_its_own_and_the_original_is_unharmed(name):
    backbone, packed = make(name), stream()
    before, parameters = backbone.logits(backbone.hidden(packed)), list(backbone.named_parameters())
    head, tied = backbone.head_name, backbone.decoder.get_output_embeddings().weight
    lower = backbone.lower(2)
    assert torch.equal(backbone.logits(backbone.hidden(packed)), before)
    assert [(key, id(p)) for key, p in backbone.named_parameters()] == [(key, id(p)) for key, p in parameters]
    assert backbone.head_name == head and backbone.decoder.get_output_embeddings().weight is tied
    assert backbone.num_layers == LAYERS

    states = lower(packed)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(1.0)
    assert torch.equal(lower(packed), states)
    with torch.no_grad():
        for p in lower.parameters():
            p.zero_()
    assert all(p.any() for p in backbone.parameters())


def test_lower_must_end_with_a_block_and_a_refusal_harms_nothing():
    backbone, packed = make("native bridge"), stream()
    before = backbone.logits(backbone.hidden(packed))
    for until in (0, 4):
        with pytest.raises(ValueError, match="1 … 3"):
            backbone.lower(until)
    assert torch.equal(backbone.logits(backbone.hidden(packed)), before)


# -- a head that stays as it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_a_frozen_head_gives_the_same_logits_and_gradients_to_the_rows_alone(name):
    backbone = make(name)
    weights = torch.randn(7, VOCABULARY)
    outcomes = []
    for frozen in (False, True):
        backbone.zero_grad(set_to_none=True)
        rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        logits = backbone.logits(rows, frozen=frozen)
        (logits * weights).sum().backward()
        outcomes.append((logits, rows.grad, gradients(backbone)))
    (logits, grad, free), (same_logits, same_grad, barred) = outcomes
    assert torch.equal(logits, same_logits) and torch.equal(grad, same_grad)
    head = [key for key, value in free.items() if value is not None]
    assert head and all(value is None for value in barred.values())  # a tied embedding too


@pytest.mark.parametrize("name", HEADS)
def test_after_a_frozen_call_the_head_learns_as_before(name):
    backbone, rows = make(name), torch.randn(7, 32)
    names = [(key, id(p)) for key, p in backbone.named_parameters(remove_duplicate=False)]
    backbone.logits(rows).square().sum().backward()
    expected = gradients(backbone)
    backbone.zero_grad(set_to_none=True)
    frozen = backbone.logits(rows, frozen=True)
    assert not frozen.requires_grad
    assert [(key, id(p)) for key, p in backbone.named_parameters(remove_duplicate=False)] == names
    (
        backbone.logits(rows).square().sum() + backbone.logits(rows.clone().requires_grad_(), frozen=True).sum()
    ).backward()
    for key, grad in gradients(backbone).items():
        torch.testing.assert_close(grad, expected[key], msg=key)


@pytest.mark.parametrize("name", HEADS)
def test_after_an_exception_in_a_frozen_call_the_head_is_whole(name):
    backbone, rows = make(name), torch.randn(7, 32)
    names = [(key, id(p)) for key, p in backbone.named_parameters(remove_duplicate=False)]
    with pytest.raises(RuntimeError):
        backbone.logits(torch.randn(7, 31), frozen=True)
    assert [(key, id(p)) for key, p in backbone.named_parameters(remove_duplicate=False)] == names
    head = backbone.decoder.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks
    backbone.logits(rows).sum().backward()
    assert head.weight.grad.any()


def test_an_engine_may_shard_the_head_again_after_a_frozen_call():
    """As FSDP2 does: gathered parameters before the forward, the shards after it."""
    backbone, rows = make("native"), torch.randn(7, 32)
    head = backbone.decoder.get_output_embeddings()
    shard, whole = torch.nn.Parameter(torch.zeros(3, 32)), head.weight
    head._parameters["weight"] = shard
    head.register_forward_pre_hook(lambda module, args: module._parameters.update(weight=whole))
    head.register_forward_hook(lambda module, args, output: module._parameters.update(weight=shard))
    for frozen in (True, False, True):
        logits = backbone.logits(rows, frozen=frozen)
        assert head.weight is shard and logits.requires_grad is not frozen
        torch.testing.assert_close(logits.detach(), rows @ whole.detach().T, atol=1e-5, rtol=1e-4)


def test_no_rows_reach_a_frozen_head_too():
    backbone, rows = make("native tied"), torch.zeros(0, 32, requires_grad=True)
    logits = backbone.logits(rows, frozen=True)
    logits.sum().backward()
    assert logits.shape == (0, VOCABULARY) and rows.grad.shape == (0, 32)


# -- what is where ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_above_are_those_that_the_states_at_the_tap_do_not_need(name, tap):
    """Told by gradient: what the tapped states depend on is below, and so is a tied embedding."""
    backbone, packed = make(name), stream()
    backbone.decoder.config.bridge_grad_barrier = False
    above = list(backbone.parameters_above(tap))
    assert len({id(p) for p in above}) == len(above)
    backbone.hidden(packed, until=tap).square().sum().backward()
    below = {key for key, p in backbone.named_parameters() if p.grad is not None}
    names = {id(p): key for key, p in backbone.named_parameters()}
    assert {names[id(p)] for p in above} | below == set(names.values())
    assert not {names[id(p)] for p in above} & below


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_found_by_its_name(name):
    backbone = make(name)
    assert backbone.get_submodule(backbone.head_name) is backbone.decoder.get_output_embeddings()
    assert backbone.head_size == 32


def test_the_head_may_read_less_than_the_decoder_is_wide():
    backbone = make("native")
    narrow = torch.nn.Linear(24, VOCABULARY, bias=False)
    backbone.decoder.set_output_embeddings(narrow)
    assert (backbone.head_size, backbone.hidden_size) == (24, 32)
