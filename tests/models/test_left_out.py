"""What masked views rest on: in a packed stream, tokens left out with the others' positions kept are the same as an ordinary
sequence whose mask hides these tokens as keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence

VOCABULARY = 50
SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "rope": dict(SHAPE),
    "pope": dict(SHAPE, position_embedding="pope", embedding_norm=True),
    "llama": dict(family="huggingface", config=dict(model_type="llama", intermediate_size=48, **SHAPE)),
}


def make(name):
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(**FAMILIES[name]), VOCABULARY)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


def dense(backbone, tokens, masked):
    """Final states (n, d) of the whole text, masked tokens hidden by an additive mask from all queries but themselves, whose
    softmax needs something; what they give is used nowhere."""
    n = len(tokens)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) | masked[None, :]
    hidden &= ~torch.eye(n, dtype=torch.bool)
    mask = torch.zeros(n, n).masked_fill(hidden, -torch.inf)
    with backbone.unpacked() as decoder:
        decoder.set_attn_implementation("eager")
        out = decoder.base_model(torch.tensor(tokens)[None], attention_mask=mask[None, None], use_cache=False)
    return out.last_hidden_state[0]


def both(backbone, texts):
    """States of the tokens that are seen, text by text: packed, and from the dense mask."""
    segments = [
        Segment(
            [t for t, m in zip(tokens, masked, strict=True) if not m], "view", position_ids=(~masked).nonzero()[:, 0]
        )
        for tokens, masked in texts
    ]
    packed = backbone.hidden(pack_sequence(segments))
    return packed, torch.cat([dense(backbone, tokens, masked)[~masked] for tokens, masked in texts])


def random_texts(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for n in lengths:
        masked = torch.rand(n, generator=generator) < 0.4
        masked[torch.randint(n, (), generator=generator)] = False
        texts.append((torch.randint(0, VOCABULARY, (n,), generator=generator).tolist(), masked))
    return texts


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_a_dense_mask(name):
    texts = random_texts((1, 6, 9, 14, 14))
    backbone = make(name)
    results = []
    for which in (0, 1):
        states = both(backbone, texts)[which]
        direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        backbone.zero_grad()
        (states * direction).mean().backward()
        results.append((states.detach(), {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}))
    (got, own), (expected, grads) = results
    assert len(got) < sum(len(tokens) for tokens, _ in texts)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert own.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(own[key], grad, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@settings(max_examples=10)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from(["rope", "pope"]))
def test_whatever_is_left_out(lengths, seed, name):
    got, expected = both(make(name), random_texts(lengths, seed))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rope", "pope"])
def test_positions_that_are_kept_matter(name):
    """Else the tests above could pass with positions ignored."""
    backbone = make(name)
    tokens = [3, 1, 4, 1, 5, 9]
    kept = backbone.hidden(pack_sequence([Segment(tokens, "view", position_ids=[0, 1, 4, 6, 7, 30])]))
    closed = backbone.hidden(pack_sequence([Segment(tokens, "view")]))
    assert (kept - closed).abs().max() > 1e-3
