"""A branch that sees the beginning of another segment, against the whole segment computed again."""

import pytest
import torch
import torch.nn.functional as F

from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import IGNORE, Segment, Views, pack

VOCABULARY = 50
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "native": dict(hidden_size=32, num_hidden_layers=3, num_key_value_heads=2),
    "native polar": dict(
        hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, position_embedding="pope", embedding_norm=True
    ),
    "native bridge": dict(hidden_size=32, num_hidden_layers=3, bridge_after=2, tie_word_embeddings=True),
    "llama": dict(model_type="llama", **LLAMA),
    "qwen3": dict(model_type="qwen3", head_dim=16, **LLAMA),
    "qwen3 window": dict(
        model_type="qwen3", use_sliding_window=True, sliding_window=4, layer_types=SLIDING, head_dim=16, **LLAMA
    ),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64, **NO_DROPOUT),
    "olmo2": dict(model_type="olmo2", **LLAMA),
    "gemma3": dict(model_type="gemma3_text", head_dim=16, sliding_window=3, layer_types=SLIDING, **LLAMA),
}
# Of each sample: tokens of its parents, and (parent, prefix, own tokens) of its branches. Windows are shorter than prefixes.
SAMPLES = [
    ((9,), [(0, 6, 1), (0, 6, 2), (0, 9, 3), (0, 1, 4)]),
    ((7, 9), [(1, 6, 1), (0, 7, 1), (0, 5, 4)]),
    ((5,), []),
    ((8,), [(0, 6, 1), (0, 2, 3)]),
]


def make(name, seed=0):
    """A small backbone with every parameter away from its initial value."""
    keys = FAMILIES[name]
    own = name.startswith("native")
    torch.manual_seed(seed)
    backbone = build_backbone(
        ModelOptions(**keys) if own else ModelOptions(family="huggingface", config=dict(keys)), VOCABULARY
    )
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


def samples(branches, labelled, only=None):
    """Views of :data:`SAMPLES`: with branches, or with whole segments in their place. ``only``: own tokens of a branch."""
    generator = torch.Generator().manual_seed(3)

    def random(n):
        return torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()

    views = []
    for lengths, asked in SAMPLES:
        parents = [random(n) for n in lengths]
        segments = [
            Segment(tokens, f"parent{i}", labels=[*tokens[1:], IGNORE] if labelled else None)
            for i, tokens in enumerate(parents)
        ]
        for parent, n, own in asked:
            tokens = random(only or own)
            if branches:
                segments.insert(0, Segment(tokens, "branch", prefix=(f"parent{parent}", n)))
            else:
                segments.insert(
                    0, Segment(parents[parent][:n] + tokens, "branch", positions={"own": range(n, n + len(tokens))})
                )
        views.append(Views(segments))
    return views


def rows(batch, role):
    """Places in the stream of a role's tokens, sample by sample."""
    edges = batch.sequences["main"].table.cu_seqlens.tolist()
    return torch.cat([torch.arange(edges[i], edges[i + 1]) for i in batch.segments[role].tolist()])


def both(labelled=False, only=None):
    """Two batches that say the same, and in each the positions of the branches' own tokens and of the parents'."""
    branched, whole = (pack(samples(branches, labelled, only)) for branches in (True, False))
    own = rows(branched, "branch"), whole.positions["own"]
    parents = [torch.cat([rows(batch, "parent0"), rows(batch, "parent1")]) for batch in (branched, whole)]
    sequences = branched.sequences["main"], whole.sequences["main"]
    assert torch.equal(*(s.input_ids[r] for s, r in zip(sequences, own, strict=True)))
    return list(zip(sequences, own, parents, strict=True))


def outcome(backbone, case, until=None):
    """States of own tokens and of parents, and the gradient of a loss on them (and on the labels) for every parameter."""
    stream, own, parents = case
    backbone.zero_grad(set_to_none=True)
    hidden = backbone.hidden(stream, until=until)
    states = torch.cat([hidden[own], hidden[parents]])
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    loss = (states * direction).mean()
    if len(stream.labelled):
        logits = backbone.logits(hidden[stream.labelled])
        loss = loss + F.cross_entropy(logits, stream.labels[stream.labelled])
    loss.backward()
    return states.detach(), {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}


def assert_same(one, other):
    """To fp32 rounding, by the largest entry: the same sums in another order. The gate's gradient is one that cancels."""
    for tolerance, pairs in (
        (1e-6, {"states": (one[0], other[0])}),
        (2e-6, {k: (g, other[1][k]) for k, g in one[1].items()}),
    ):
        for key, (got, expected) in pairs.items():
            error, size = (got - expected).abs().max(), expected.abs().max()
            assert error <= tolerance * size + 1e-9, f"{key}: {error:.2e} of {size:.2e}"
    assert one[1].keys() == other[1].keys()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_have_the_states_and_gradients_of_whole_segments(name, labelled):
    branched, whole = both(labelled)
    assert branched[0].num_tokens < whole[0].num_tokens and branched[0].keys is not None and whole[0].keys is None
    assert (len(branched[0].labelled) > 0) is labelled
    backbone = make(name)
    assert_same(outcome(backbone, branched), outcome(backbone, whole))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["native", "gemma3"])
def test_branches_of_any_length(name, k):
    branched, whole = both(only=k)
    backbone = make(name)
    assert_same(outcome(backbone, branched), outcome(backbone, whole))


@pytest.mark.parametrize("until", [1, 2, 3])
@pytest.mark.parametrize("name", ["native bridge", "gemma3"])
def test_branches_in_the_lower_blocks_alone(name, until):
    branched, whole = both()
    backbone = make(name)
    assert_same(outcome(backbone, branched, until), outcome(backbone, whole, until))


@pytest.mark.parametrize("name", ["native", "llama", "gpt2", "gemma3"])
def test_activation_checkpointing_computes_a_branch_again(name):
    branched, whole = both(labelled=True)
    backbone = make(name)
    expected = outcome(backbone, whole)
    backbone.decoder.train()
    backbone.decoder.gradient_checkpointing_enable()
    assert_same(outcome(backbone, branched), expected)


@pytest.mark.parametrize("until", [None, 2])
@pytest.mark.parametrize("name", ["native", "native polar", "native bridge", "llama"])
def test_last_tokens_are_read_out_of_branches_too(name, until):
    (stream, _, _), _ = both()
    backbone = make(name)
    outcomes = []
    for read in lambda: backbone.hidden(stream, until=until)[stream.last], lambda: backbone.last_hidden(stream, until):
        backbone.zero_grad(set_to_none=True)
        states = read()
        states.square().mean().backward()
        outcomes.append(
            (states.detach(), {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None})
        )
    assert_same(*outcomes)


def test_states_on_the_way_are_those_of_branches_too():
    (branched, own, _), (whole, same, _) = both()
    backbone = make("native bridge")
    got, expected = backbone.hidden_and_tap(branched, 1), backbone.hidden_and_tap(whole, 1)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[own], b[same], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["native", "gpt2", "gemma3"])
def test_a_branch_sees_its_prefix_and_nothing_else_of_its_parent_which_never_sees_the_branch(name):
    parent, branch = list(range(10, 18)), [1, 2]

    def states(parent, branch):
        views = Views([Segment(parent, "parent"), Segment(branch, "branch", prefix=("parent", 5))])
        batch = pack([views])
        hidden = backbone.hidden(batch.sequences["main"]).detach()
        return hidden[rows(batch, "parent")], hidden[rows(batch, "branch")]

    backbone = make(name)
    before_parent, before = states(parent, branch)
    for place in range(8):
        after = states([*parent[:place], 40, *parent[place + 1 :]], branch)[1]
        assert ((after - before).abs().amax(1) > 1e-4).tolist() == [place < 5] * 2
    after_parent, after = states(parent, [1, 3])
    assert torch.equal(after_parent, before_parent)
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_a_branch_is_as_long_as_with_its_prefix():
    keys = dict(FAMILIES["native"], max_position_embeddings=8)
    backbone = build_backbone(ModelOptions(**keys), VOCABULARY)

    def stream(own):
        views = Views([Segment([1] * 7, "parent"), Segment([2] * own, "branch", prefix=("parent", 6))])
        return pack([views]).sequences["main"]

    backbone.hidden(stream(2))
    with pytest.raises(ValueError, match="a segment has 9 tokens, and the model takes 8 .max_position_embeddings"):
        backbone.hidden(stream(3))


@pytest.mark.parametrize("name", ["native", "llama"])
def test_without_branches_attention_hears_nothing_of_keys(name):
    backbone, heard = make(name), []
    for layer in backbone.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: heard.append("packed_keys" in kwargs), with_kwargs=True
        )
    (branched, _, _), (whole, _, _) = both()
    backbone.hidden(whole)
    assert heard == [False] * 3
    backbone.hidden(branched)
    assert heard == [False] * 3 + [True] * 3
