"""The span predictor against a plain stack on one dense sequence at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_scale.models.layers.drop_path import segments_kept
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.span.predictor import SpanPredictor
from jepa_scale.packing import PackedSequence, Segment, Views, pack
from jepa_scale.utils.errors import InputError

POSITIONS = 40
NATIVE = dict(hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, rope_theta=300.0, rms_norm_eps=1e-5)
KINDS = {"rope": NATIVE, "pope": dict(NATIVE, position_embedding="pope")}
# of each view: which of its tokens are masked; the positions have gaps
VIEWS = [[0, 1, 1, 0, 0, 1, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0], [1], [0, 1, 0, 1, 0, 1]]


def make(kind="rope", layers=2, **options):
    torch.manual_seed(0)
    predictor = SpanPredictor.of(build_backbone(ModelOptions(**KINDS[kind], **options), 50), layers, POSITIONS)
    with torch.no_grad():
        for p in predictor.parameters():
            p += 0.1 * torch.randn_like(p)
        for name, p in predictor.named_parameters():
            if name.endswith("delta"):
                p.uniform_(-6, -0.1)
    return predictor.eval()


def positions_of(view):
    return [i + i // 3 for i in range(len(view))]


def packed(views, reverse=False) -> tuple[PackedSequence, torch.Tensor, torch.Tensor]:
    """The stream, and the positions of the kept and of the masked tokens, view by view."""
    samples = []
    for number, view in enumerate(views):
        where = {"kept": [i for i, m in enumerate(view) if not m], "masked": [i for i, m in enumerate(view) if m]}
        tokens, queries = [0] * len(view), sum(view)
        segment = Segment(tokens, "v", position_ids=positions_of(view), positions=where, queries=queries)
        samples.append(Views([segment], seed=100 * number))
    batch = pack(samples[::-1] if reverse else samples)
    return batch.sequences["main"], batch.positions["kept"], batch.positions["masked"]


def states_of(views, width=32):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(len(view) - sum(view), width, generator=generator) for view in views]


def plain(predictor, view, states, kept=None):
    """(n, d) of one view, before the final norm: every step written out, on all of its tokens.

    ``kept``: (layers, 2) of DropPath."""
    at, masked = torch.tensor(positions_of(view)), torch.tensor(view, dtype=torch.bool)
    x = predictor.mask_embedding.weight[at].clone()
    x[~masked] = states
    config, n = predictor.config, len(view)
    heads, shared, width = 4, 4 // config.num_key_value_heads, 8
    for number, layer in enumerate(predictor.layers):
        scale = [1.0, 1.0]
        if kept is not None:
            rate = config.drop_path * number / max(1, len(predictor.layers) - 1)
            scale = [float(flag) / (1 - rate) for flag in kept[number]]
        y = F.rms_norm(x, (32,), layer.input_layernorm.weight, config.rms_norm_eps)
        own = layer.self_attn
        q, k, v = (y @ p.weight.T for p in (own.q_proj, own.k_proj, own.v_proj))
        out = []
        for h in range(heads):
            q_h = q[:, h * width : (h + 1) * width]
            k_h, v_h = (t[:, (h // shared) * width : (h // shared + 1) * width] for t in (k, v))
            distance = (at[None, :] - at[:, None]).float()
            if config.position_embedding == "pope":
                delta = own.pope.delta.view(-1, width)[h // shared]
                angle = distance[..., None] * 300.0 ** (-torch.arange(width) / width) + delta
                score = torch.einsum("ic,jc,ijc->ij", F.softplus(q_h), F.softplus(k_h), angle.cos())
            else:  # a pair as a complex number: Re(q* k e^{i(s−t)θ})
                turn = distance[..., None] * 300.0 ** (-torch.arange(width // 2) * 2 / width)
                z_q, z_k = (torch.complex(t[:, : width // 2], t[:, width // 2 :]) for t in (q_h, k_h))
                score = (z_q.conj()[:, None] * z_k[None] * torch.polar(torch.ones_like(turn), turn)).real.sum(-1)
            out.append((score / width**0.5).softmax(-1) @ v_h)
        x = x + scale[0] * torch.cat(out, dim=-1) @ own.o_proj.weight.T
        y = F.rms_norm(x, (32,), layer.post_attention_layernorm.weight, config.rms_norm_eps)
        x = x + scale[1] * (F.silu(y @ layer.mlp.gate_proj.weight.T) * (y @ layer.mlp.up_proj.weight.T)) @ (
            layer.mlp.down_proj.weight.T
        )
    assert x.shape == (n, 32)
    return x[masked]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_places_are_filled_in_as_by_a_plain_stack(kind, layers):
    predictor = make(kind, layers)
    stream, kept, masked = packed(VIEWS)
    results = []
    for run in (
        lambda states: predictor(torch.cat(states), kept, masked, stream),
        lambda states: torch.cat([plain(predictor, view, s) for view, s in zip(VIEWS, states, strict=True)]),
    ):
        states = [s.requires_grad_() for s in states_of(VIEWS)]
        predictor.zero_grad()
        out = run(states)
        assert out.shape == (sum(map(sum, VIEWS)), 32)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        grads = {name: p.grad.clone() for name, p in predictor.named_parameters() if p.grad is not None}
        results.append((out.detach(), grads, [s.grad for s in states]))
    (got, own, inputs), (expected, grads, expected_inputs) = results
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert own.keys() == grads.keys() == {n for n, _ in predictor.named_parameters()} - {"norm.weight"}
    for name in grads:
        torch.testing.assert_close(own[name], grads[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8).filter(any), min_size=1, max_size=5),
    st.sampled_from(sorted(KINDS)),
)
def test_any_views_in_any_order_of_places(views, kind):
    predictor = make(kind)
    stream, kept, masked = packed(views)
    states = states_of(views)
    order = torch.randperm(len(masked))
    out = predictor(torch.cat(states), kept, masked[order], stream)
    expected = torch.cat([plain(predictor, view, s) for view, s in zip(views, states, strict=True)])
    torch.testing.assert_close(out, expected[order], atol=1e-5, rtol=1e-5)


def test_every_token_sees_its_whole_view_and_no_other():
    predictor = make()
    stream, kept, masked = packed(VIEWS)
    states = torch.cat(states_of(VIEWS))
    before = predictor(states, kept, masked, stream)
    owner = torch.repeat_interleave(torch.arange(len(VIEWS)), torch.tensor([sum(v) for v in VIEWS]))
    first = 0
    for number, view in enumerate(VIEWS):
        n = len(view) - sum(view)
        if n:
            changed = states.clone()
            changed[first + n - 1] += 1  # the last token that was seen: masked ones before it hear of it
            moved = (predictor(changed, kept, masked, stream) - before).abs().amax(1) > 1e-5
            assert torch.equal(moved, owner == number)
        first += n


@pytest.mark.parametrize("views", [[], [[1, 1]], [[1]]])
def test_with_nothing_kept_or_masked_every_parameter_still_takes_part(views):
    predictor = make(layers=2).train()
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    stream, kept, masked = packed(views) if views else (pack([]).sequences["main"], nothing[0], torch.tensor([0]))
    states = torch.randn(len(kept), 32, requires_grad=True)
    out = predictor.norm(predictor(states, kept, masked, stream))
    assert out.shape == (len(masked), 32)
    out.sum().backward()
    assert states.grad is not None and all(p.grad is not None for p in predictor.parameters())


def test_the_last_block_is_spared_what_is_not_asked_for():
    predictor = make(layers=3)
    stream, kept, masked = packed(VIEWS)
    rows = {"self_attn.q_proj": [], "self_attn.k_proj": [], "self_attn.o_proj": [], "mlp": []}
    for layer in predictor.layers:
        for name, found in rows.items():
            layer.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, found=found: found.append(output.shape[1])
            )
    predictor(torch.cat(states_of(VIEWS)), kept, masked, stream)
    everything = [stream.num_tokens] * 2
    expected = dict.fromkeys(rows, [*everything, len(masked)]) | {"self_attn.k_proj": [*everything, stream.num_tokens]}
    assert rows == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_drop_path_follows_the_segments_seeds(reverse):
    predictor = make(layers=3, drop_path=0.6).train()
    stream, kept, masked = packed(VIEWS, reverse)
    order = VIEWS[::-1] if reverse else VIEWS
    states = states_of(VIEWS)
    states = states[::-1] if reverse else states
    flags = segments_kept(stream.seeds, stream.table, 0.6, 3, stack=1)[:, :, 0, stream.first]  # (3, 2, S)
    assert not torch.equal(flags, segments_kept(stream.seeds, stream.table, 0.6, 3)[:, :, 0, stream.first])
    expected = []
    for number, (view, s) in enumerate(zip(order, states, strict=True)):
        seed = 100 * (len(VIEWS) - 1 - number if reverse else number)
        expected.append(plain(predictor, view, s, flags[:, :, stream.seeds.tolist().index(seed)]))
    out = predictor(torch.cat(states), kept, masked, stream)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, predictor.eval()(torch.cat(states), kept, masked, stream), atol=1e-3)


def test_it_mirrors_the_native_decoder():
    keys = dict(NATIVE, intermediate_size=48, position_embedding="pope", drop_path=0.2, hidden_dropout=0.1)
    keys |= dict(initializer_range=0.05, embedding_init_std=0.5, embedding_norm=True)
    predictor = SpanPredictor.of(build_backbone(ModelOptions(**keys), 50), 2, POSITIONS)
    own = predictor.config
    for name in keys.keys() - {"num_hidden_layers", "rope_theta", "embedding_norm"}:
        assert getattr(own, name) == keys[name], name
    assert own.rope_parameters["rope_theta"] == 300.0 and len(predictor.layers) == 2
    assert [layer.drop_path.rate for layer in predictor.layers] == [0.0, 0.2]
    assert predictor.mask_embedding.weight.shape == (POSITIONS, 32)
    assert predictor.mask_embedding.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert predictor.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(predictor.norm.weight, torch.ones(32))
    assert not any(layer.self_attn.is_causal for layer in predictor.layers)


LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(model_type="llama", rope_theta=700.0, rms_norm_eps=1e-4, **LLAMA), (48, 2, 700.0, 1e-4)),
        (dict(model_type="gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64), (128, 4, 10_000.0, 1e-5)),
        (dict(model_type="gemma3_text", head_dim=16, **LLAMA), (48, 2, 10_000.0, 1e-6)),
    ],
)
def test_it_has_the_shape_of_a_decoder_of_transformers(config, expected):
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), 50)
    predictor = SpanPredictor.of(backbone, 2, POSITIONS)
    own = predictor.config
    assert (own.hidden_size, own.num_attention_heads) == (32, 4)
    found = own.intermediate_size, own.num_key_value_heads, own.rope_parameters["rope_theta"], own.rms_norm_eps
    assert found == expected
    stream, kept, masked = packed(VIEWS)
    out = predictor(backbone.hidden(stream)[kept], kept, masked, stream)
    assert out.shape == (len(masked), 32) and out.isfinite().all()


def test_a_shape_that_the_blocks_cannot_have_is_told():
    keys = dict(LLAMA, hidden_size=36, head_dim=16)  # heads of 9
    backbone = build_backbone(ModelOptions(family="huggingface", config=dict(model_type="qwen3", **keys)), 50)
    with pytest.raises(InputError, match="can't be shaped like the model's blocks: hidden_size: 36"):
        SpanPredictor.of(backbone, 2, POSITIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_close_to_fp32(kind):
    predictor = make(kind)
    stream, kept, masked = packed(VIEWS)
    states = torch.cat(states_of(VIEWS))
    want = predictor(states, kept, masked, stream)
    got = predictor.bfloat16()(states, kept, masked, stream)  # states of another dtype are taken
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.04 * want.abs().max()
    predictor.norm(got).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in predictor.parameters())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_counted(kind, layers):
    predictor = make(kind, layers).train()
    stream, kept, masked = packed(VIEWS)
    states = torch.cat(states_of(VIEWS)).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = predictor(states, kept, masked, stream)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
    flops = predictor.flops()
    assert flops.count(stream, len(masked), training=False) == forward
    assert flops.count(stream, len(masked), training=True) == forward + counter.get_total_flops()


def test_blocks_are_in_a_list_that_can_be_sharded():
    predictor = make(layers=3)
    assert isinstance(predictor.layers, nn.ModuleList) and isinstance(predictor.norm, nn.RMSNorm)
