"""PoPE against its closed form, summed channel by channel in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM, JepaDecoderModel, position_table
from jepa_scale.models.layers.pope import PolarEmbedding, within_a_turn
from jepa_scale.models.layers.rotary import rotary_table

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
BASE = 300.0


def scores(q, k, delta, at_q, at_k, base=BASE):
    """(H, T_q, T) of q (T_q, H, D) and k (T, H_kv, D): the sum as the paper writes it."""
    width, shared = q.shape[-1], q.shape[1] // k.shape[1]
    q, k, delta = F.softplus(q.double()), F.softplus(k.double()), delta.double().clamp(-2 * math.pi, 0)
    total = torch.zeros(q.shape[1], len(q), len(k), dtype=torch.float64)
    for h in range(q.shape[1]):
        for c in range(width):
            angle = (at_k[None, :] - at_q[:, None]).double() * base ** (-c / width) + delta[h // shared, c]
            total[h] += q[:, h, c, None] * k[None, :, h // shared, c] * angle.cos()
    return total / width**0.5


def make(**options):
    torch.manual_seed(0)
    config = JepaDecoderConfig(**{**SHAPE, "position_embedding": "pope", **options})
    model = JepaDecoderForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for layer in model.model.layers:
            layer.self_attn.pope.delta.uniform_(-7, 0.5)  # some of them outside of the range
    return model


@settings(max_examples=25)
@given(st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([2, 6, 8]), st.integers(0, 99))
def test_the_product_of_wide_queries_and_keys_is_the_sum_over_channels(heads_kv, shared, width, seed):
    torch.manual_seed(seed)
    pope = PolarEmbedding(heads_kv, width)
    torch.nn.init.uniform_(pope.delta, -7, 0.5)
    q, k = torch.randn(3, heads_kv * shared, width), torch.randn(5, heads_kv, width)
    at_q, at_k = torch.randint(0, 60, (3,)), torch.randint(0, 60, (5,))
    tables = [rotary_table(at[None], 2 * width, BASE) for at in (at_q, at_k)]
    wide_q, wide_k = pope(q[None], k[None], *tables)
    assert wide_q.shape == (1, 3, heads_kv * shared, 2 * width) and wide_k.shape == (1, 5, heads_kv, 2 * width)
    got = torch.einsum("qhd,khd->hqk", wide_q[0], wide_k[0].repeat_interleave(shared, dim=1)) / width**0.5
    expected = scores(q, k, pope.delta.detach().view(heads_kv, width), at_q, at_k)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


@settings(max_examples=25)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
def test_scores_depend_on_the_distance_alone(a, b, shift):
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    pope = PolarEmbedding(1, 8)
    torch.nn.init.uniform_(pope.delta, -6, 0)

    def score(i, j):
        at = [rotary_table(torch.tensor([[place]]), 16, 10_000.0) for place in (i, j)]
        wide_q, wide_k = pope(q, k, *at)
        return (wide_q * wide_k).sum()

    torch.testing.assert_close(score(a, b), score(a + shift, b + shift), atol=2e-3, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layer_attends_as_the_closed_form_says(implementation):
    model = make(rope_theta=BASE)
    model.set_attn_implementation(implementation)
    attention = model.model.layers[1].self_attn
    x, at = torch.randn(1, 7, 32), torch.tensor([0, 1, 3, 4, 9, 20, 21])
    mask = torch.full((7, 7), -torch.inf).triu(1)
    out, _ = attention(x, position_table(model.config, at[None], x.dtype), mask[None, None])
    q, k, v = (p(x[0]).view(7, -1, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = (scores(q, k, attention.pope.delta.view(2, 8), at, at) + mask).softmax(-1)
    heads = [weights[h] @ v[:, h // 2].double() for h in range(4)]
    expected = attention.o_proj(torch.cat(heads, dim=-1).float())
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-5)


def test_a_phase_starts_at_zero_and_is_no_matrix():
    model = JepaDecoderForCausalLM(JepaDecoderConfig(**SHAPE, position_embedding="pope"))
    phases = [p for name, p in model.named_parameters() if name.endswith(".pope.delta")]
    assert [p.shape for p in phases] == [(2 * 8,)] * 2 and not any(p.any() for p in phases)
    assert not [
        name for name, _ in JepaDecoderForCausalLM(JepaDecoderConfig(**SHAPE)).named_parameters() if "pope" in name
    ]


@pytest.mark.parametrize("how", ["direct", "meta"])
def test_phases_and_the_embedding_norm_begin_as_told(how):
    config = JepaDecoderConfig(**SHAPE, position_embedding="pope", embedding_norm=True, embedding_init_std=0.3)
    with torch.device("meta" if how == "meta" else "cpu"):
        model = JepaDecoderModel(config)
    if how == "meta":
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(9.0)
        for module in model.modules():
            model._init_weights(module)
    assert not model.layers[1].self_attn.pope.delta.any()
    torch.testing.assert_close(model.embedding_norm.weight, torch.full((32,), 0.3))
    assert torch.equal(model.norm.weight, torch.ones(32))


def test_phases_are_clamped_and_keep_their_gradient():
    turn = 2 * math.pi
    delta = torch.tensor([-1.0, 0.0, 0.3, -turn, -turn - 1], requires_grad=True)
    clamped = within_a_turn(delta)
    torch.testing.assert_close(clamped, torch.tensor([-1.0, 0.0, 0.0, -turn, -turn]))
    clamped.backward(torch.tensor([1.0, -2, 3, -4, 5]))
    assert delta.grad.tolist() == [1, -2, 3, -4, 5]


@pytest.mark.parametrize("outside", [0.2, -2 * math.pi - 0.2])
def test_a_phase_that_was_carried_out_of_the_range_comes_back(outside):
    def after(clamp, steps=60):
        delta = torch.tensor([outside], requires_grad=True)
        for _ in range(steps):
            (grad,) = torch.autograd.grad((clamp(delta) + 3).square().sum(), delta)
            delta.data -= 0.1 * grad
        return delta.item()

    assert after(within_a_turn) == pytest.approx(-3, abs=1e-3)
    assert after(lambda x: x.clamp(-2 * math.pi, 0)) == pytest.approx(outside)  # what would happen


@pytest.mark.parametrize("delta", [0.0, 0.3, -1.0])
def test_the_gradient_of_a_batch_is_the_sum_of_its_parts(delta):
    """Whatever the side of the edge: two texts together, or one after the other as micro-batches or on two ranks."""
    model = make()
    phases = [layer.self_attn.pope.delta for layer in model.model.layers]
    for phase in phases:
        torch.nn.init.constant_(phase, delta)
    ids = torch.randint(0, 50, (2, 9))

    def gradients(*batches):
        model.zero_grad()
        for batch in batches:
            model(batch, labels=batch, use_cache=False).loss.mul(len(batch)).backward()
        return torch.cat([phase.grad for phase in phases])

    whole, parts = gradients(ids), gradients(ids[:1], ids[1:])
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)
    assert (whole < 0).any() and (whole > 0).any()


def test_bf16_weights_keep_exact_angles():
    model = make(rope_theta=100.0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 4
    far = dict(position_ids=250 * torch.arange(9)[None], attention_mask=torch.ones(1, 9), use_cache=False)
    ids = torch.arange(9)[None]
    want = model(ids, **far).logits
    got = model.bfloat16()(ids, **far).logits.float()
    assert (got - want).abs().max() < 0.03 * want.abs().max()


def test_flash_kernels_of_transformers_are_refused_by_name():
    """They take heads of one width; the packed attention pads them instead."""
    with pytest.raises(ValueError, match="JepaDecoderForCausalLM does not support Flash Attention"):
        make()._flash_attn_can_dispatch(2)
    assert JepaDecoderForCausalLM(JepaDecoderConfig(**SHAPE))._supports_flash_attn


def test_an_unknown_position_embedding_is_refused():
    with pytest.raises(ValueError, match="^position_embedding: 'alibi' is not offered"):
        JepaDecoderConfig(**SHAPE, position_embedding="alibi")
