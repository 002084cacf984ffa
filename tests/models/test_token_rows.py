"""Padded rows against each segment alone in transformers' own forward, and against packed attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.models.token_rows import TokenRows, cells
from jepa_scale.packing import Segment, Views, pack, pack_sequence
from jepa_scale.utils.errors import InputError
from tests.models.test_backbone_prefix import rows as own_rows
from tests.models.test_backbone_prefix import samples

VOCABULARY = 50
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
MAMBA2 = dict(
    model_type="mamba2", hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=4
)  # fmt: skip
FAMILIES = {
    "llama": dict(model_type="llama", **LLAMA),
    "gemma2": dict(model_type="gemma2", head_dim=8, sliding_window=3, attn_logit_softcapping=2.0, **LLAMA),
    "mamba2": MAMBA2,
    "falcon_h1": dict(
        model_type="falcon_h1", mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=4, lm_head_multiplier=0.3, **LLAMA,
    ),
    "qwen3_next": dict(
        model_type="qwen3_next", head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, **LLAMA,
    ),
    "jamba": dict(
        model_type="jamba", attn_layer_period=3, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=4, use_mamba_kernels=False, **LLAMA,
    ),
    "lfm2": dict(model_type="lfm2", layer_types=["conv", "full_attention", "conv"], **LLAMA),
    "opt": dict(
        model_type="opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.0,
    ),
    "mixtral": dict(
        model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **LLAMA
    ),
}  # fmt: skip
ALIKE = ("llama", "gemma2", "mixtral", "opt")
"""Families that run packed too."""
LENGTHS = (5, 1, 9, 5, 3, 12)
close = dict(atol=1e-5, rtol=1e-4)


def make(name, packing="padded"):
    """A small backbone with every parameter away from its initial value."""
    torch.manual_seed(0)
    options = ModelOptions(family="huggingface", config=dict(FAMILIES[name]), packing=packing)
    backbone = build_backbone(options, VOCABULARY)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


def stream(lengths=LENGTHS, gaps=False):
    generator = torch.Generator().manual_seed(3)
    segments = []
    for n in lengths:
        tokens = torch.randint(0, VOCABULARY, (n + 1,), generator=generator).tolist()
        segments.append(
            Segment(tokens[:-1], "a", labels=tokens[1:], position_ids=list(range(0, 2 * n, 2)) if gaps else None)
        )
    return pack_sequence(segments)


def loss_and_gradients(backbone, loss):
    backbone.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {key: p.grad for key, p in backbone.named_parameters()}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], **close)
    assert found[1].keys() == expected[1].keys()
    for key, grad in found[1].items():
        wanted = expected[1][key]
        assert (grad is None) == (wanted is None), key
        if grad is not None:
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                grad, wanted, atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_sum_over_segments_alone(name):
    backbone, packed = make(name), stream()

    def together():
        return backbone.label_losses(backbone.hidden(packed), packed.labels).sum()

    def alone():
        total = 0
        with backbone.unpacked() as decoder:
            if name == "gemma2":
                decoder.set_attn_implementation("eager")
            parts = (x.split(packed.table.lengths) for x in (packed.input_ids, packed.labels))
            for ids, labels in zip(*parts, strict=True):
                total = total + F.cross_entropy(decoder(ids[None], use_cache=False).logits[0], labels, reduction="sum")
        return total

    assert_same(loss_and_gradients(backbone, together), loss_and_gradients(backbone, alone))


@pytest.mark.parametrize("gaps", [False, True], ids=["places", "gaps"])
@pytest.mark.parametrize("name", ALIKE)
def test_padded_is_packed(name, gaps):
    """Loss and gradients, states after each block, and those at the last tokens; with gaps in the positions, too."""
    padded, packed, tokens = make(name), make(name, "packed"), stream(gaps=gaps)
    assert tokens.consecutive is not gaps
    for until in (1, 2, None):
        torch.testing.assert_close(padded.hidden(tokens, until=until), packed.hidden(tokens, until=until), **close)
    (hidden, taps), (expected, their_taps) = (b.hidden_and_taps(tokens, [1, 3]) for b in (padded, packed))
    torch.testing.assert_close([hidden, *taps], [expected, *their_taps], **close)
    torch.testing.assert_close(padded.last_hidden(tokens), packed.last_hidden(tokens), **close)
    losses = [lambda b=b: b.label_losses(b.hidden(tokens), tokens.labels).sum() for b in (padded, packed)]
    assert_same(loss_and_gradients(padded, losses[0]), loss_and_gradients(packed, losses[1]))


def test_positions_matter_here():
    """Else the test above could pass with the positions ignored on both sides."""
    backbone = make("llama")
    assert not torch.allclose(backbone.hidden(stream()), backbone.hidden(stream(gaps=True)), atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_a_branch_sees_its_prefix_in_a_row_of_its_own(name):
    backbone = make(name)
    branched, whole = (pack(samples(branches, False)) for branches in (True, False))
    states = [backbone.hidden(batch.sequences["main"]) for batch in (branched, whole)]
    found = [states[0][own_rows(branched, role)] for role in ("parent0", "branch")]
    torch.testing.assert_close(found[0], states[1][own_rows(whole, "parent0")], **close)
    torch.testing.assert_close(found[1], states[1][whole.positions["own"]], **close)


def test_routers_count_no_padding_and_no_prefix():
    padded, packed = make("mixtral"), make("mixtral", "packed")
    branched = pack(samples(True, False)).sequences["main"]
    for tokens in (stream(), branched):
        found = []
        for backbone in (padded, packed):
            with backbone.routers_recorded() as logits:
                backbone.hidden(tokens)
            found.append(logits)
        torch.testing.assert_close(found[0], found[1], **close)
        assert [len(z) for z in found[0]] == [tokens.num_tokens] * 3


def test_a_copy_of_the_lower_blocks_is_padded_too():
    backbone, tokens = make("mamba2"), stream()
    torch.testing.assert_close(backbone.lower(2).hidden(tokens), backbone.hidden_and_tap(tokens, 2)[1], atol=0, rtol=0)


@pytest.mark.parametrize("lengths", [(), LENGTHS])
def test_the_decoder_runs_once(lengths):
    """Ranks with other numbers of segments wait for each other in each call."""
    backbone, calls = make("mamba2"), []
    backbone.decoder.base_model.register_forward_hook(lambda *_: calls.append(1))
    assert backbone.hidden(stream(lengths)).shape == (max(sum(lengths), 1), 32)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_shapes_are_computed_without_data(name):
    """As the planner does; transformers would search the positions for segments, which needs their values."""
    with torch.device("meta"):
        options = ModelOptions(family="huggingface", config=dict(FAMILIES[name]), packing="padded")
        backbone = build_backbone(options, VOCABULARY)
    assert backbone.hidden(stream().to("meta")).shape == (sum(LENGTHS), 32)


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_positions_of_its_own_need_a_family_that_takes_them(packing):
    with pytest.raises(InputError, match="Mamba2ForCausalLM takes no positions"):
        make("mamba2", packing).hidden(stream(gaps=True))


def test_what_was_set_stays():
    from transformers import masking_utils

    search = masking_utils.find_packed_sequence_indices
    backbone = make("llama")
    implementation = backbone.decoder.config._attn_implementation
    backbone.hidden(stream())
    with backbone.unpacked() as decoder:
        decoder.set_attn_implementation("eager")
    assert masking_utils.find_packed_sequence_indices is search
    assert backbone.decoder.config._attn_implementation == implementation == "sdpa"


@settings(max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_rows_hold_the_segments_and_repeat_their_last_token(lengths, data):
    parents = [Segment(list(range(10 * i, 10 * i + n)), f"p{i}") for i, n in enumerate(lengths)]
    branches = []
    for i, n in enumerate(lengths):
        for _ in range(data.draw(st.integers(0, 2))):
            own = data.draw(st.integers(1, 4))
            branches.append(Segment([1000 + 10 * len(branches) + j for j in range(own)], "b", prefix=(f"p{i}", data.draw(st.integers(1, n)))))  # fmt: skip
    packed = pack([Views([*branches, *parents])]).sequences["main"]
    rows = TokenRows.padded(packed)
    shown = rows.spread(packed.input_ids)
    assert shown.numel() == cells(packed)
    wanted = sorted(
        [s.tokens for s in parents] + [parents[int(b.prefix[0][1:])].tokens[: b.prefix[1]] + b.tokens for b in branches]
    )
    found = []
    for row, n in zip(shown.tolist(), packed.key_lengths, strict=True):
        found.append(row[:n])
        assert set(row[n:]) <= {row[n - 1]}
    assert sorted(found) == wanted
    assert torch.equal(rows.pack(shown[..., None])[:, 0], packed.input_ids)
