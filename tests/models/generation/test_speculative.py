"""Generation with drafts is generation without: the same greedy tokens, and samples of the same distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from jepa_scale.models.generation.batches import Prompts, greedy
from jepa_scale.models.generation.speculative import Generation, generate
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.mtp.config import MtpOptions
from jepa_scale.objectives.mtp.objective import Mtp
from jepa_scale.objectives.next_latent.config import NextLatentOptions
from jepa_scale.objectives.next_latent.objective import NextLatent
from jepa_scale.packing import Segment, pack_sequence
from tests.models.generation.test_acceptance import far_off

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "native": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.5},
    "pope": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
        "position_embedding": "pope",
        "tie_word_embeddings": True,
    },
    "llama": {"family": "huggingface", "config": {"model_type": "llama", "initializer_range": 0.5, **SHAPE}},
    "gpt2": {
        "family": "huggingface",
        "config": {
            "model_type": "gpt2",
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.5,
        },
    },
    "mistral": {  # the window is shorter than what is generated
        "family": "huggingface",
        "config": {
            "model_type": "mistral",
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "initializer_range": 0.5,
            **SHAPE,
        },
    },
}
PROMPT = [3, 1, 4, 1, 5]


def model(family: str, vocabulary: int = 23):
    torch.manual_seed(0)
    return build_backbone(ModelOptions(**FAMILIES[family]), vocabulary).eval()


def objective(name: str, backbone):
    """With heads that guess right now and then."""
    torch.manual_seed(1)
    if name == "mtp":
        made = Mtp(MtpOptions(heads=4), backbone, None)
        with torch.no_grad():  # a head near the decoder's last block and final norm
            for head in made.heads:
                for p in head.parameters():
                    p += 0.05 * torch.randn_like(p)
        return made.eval()
    made = NextLatent(NextLatentOptions(), backbone, None)
    nn.init.normal_(made.dynamics.mlp[-1].weight, std=0.2)
    return made.eval()


def plain(backbone, new_tokens: int, stop=()) -> list[int]:
    with backbone.unpacked() as decoder:
        out = greedy(decoder, Prompts.of([torch.tensor(PROMPT).numpy()]), stop, new_tokens)
    return out.tokens[0, : int(out.lengths[0])].tolist()


@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
@pytest.mark.parametrize("name", ["next_latent", "mtp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_plain_generation(family, name, drafts):
    backbone = model(family)
    drafter = objective(name, backbone).drafter(backbone)
    drafts = min(drafts, drafter.most or drafts)
    found = generate(backbone, PROMPT, (), 40, drafter, drafts)
    assert found.tokens == plain(backbone, 40) and not found.stopped
    assert found.drafted <= drafts * found.forwards and found.accepted + found.forwards + 1 == 40
    if drafts == 0:
        assert found.forwards == 39 and not found.drafted


@pytest.mark.parametrize("name", ["next_latent", "mtp"])
def test_a_stop_token_ends_the_text_wherever_it_is_found(name):
    backbone = model("llama")
    whole = plain(backbone, 40)
    for stop in sorted(set(whole)):
        for drafts in (0, 3):
            found = generate(backbone, PROMPT, {stop}, 40, objective(name, backbone).drafter(backbone), drafts)
            assert found.tokens == whole[: whole.index(stop)] and found.stopped


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5])
def test_no_more_tokens_than_asked_for(new_tokens):
    backbone = model("native")
    found = generate(backbone, PROMPT, (), new_tokens, objective("next_latent", backbone).drafter(backbone), 3)
    assert found.tokens == plain(backbone, new_tokens)


class Perfect:
    """A drafter that knows what follows."""

    tap, most = 0, None

    def __init__(self, tokens):
        self.tokens, self.read = tokens, 0

    def observe(self, hidden, tapped):
        self.read += len(hidden)

    def draft(self, token, count, choose):
        at = self.read - len(PROMPT)
        assert token == self.tokens[at]
        guesses = self.tokens[at + 1 : at + 1 + count]
        return guesses, [torch.nn.functional.one_hot(torch.tensor(g), 23).float() for g in guesses]


def test_right_drafts_save_forwards():
    backbone = model("mistral")
    tokens = plain(backbone, 41)
    found = generate(backbone, PROMPT, (), 41, Perfect(tokens), 4)
    assert found == Generation(tokens, False, drafted=32, accepted=32, forwards=8)


@pytest.mark.parametrize(("name", "temperature"), [("next_latent", 1.0), ("mtp", 0.7)])
def test_samples_have_the_distribution_of_the_model(name, temperature):
    """Three tokens of a vocabulary of four, against the product of their exact probabilities."""
    backbone = model("native", 4)
    made = objective(name, backbone)
    sequences = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    expected = []
    with torch.no_grad():
        for tokens in sequences:
            text = [1, 2, *tokens]
            logits = backbone.logits(backbone.hidden(pack_sequence([Segment(text[:-1], "x")])))
            chances = torch.softmax(logits.float() / temperature, dim=-1)
            expected.append(float(torch.stack([chances[1 + i, token] for i, token in enumerate(tokens)]).prod()))
    assert sum(expected) == pytest.approx(1, abs=1e-4)
    generator, counts, kept = torch.Generator().manual_seed(0), Counter(), 0
    for _ in range(2500):
        found = generate(backbone, [1, 2], (), 3, made.drafter(backbone), 1, temperature, generator)
        counts[sequences.index(tuple(found.tokens))] += 1
        kept += found.accepted
    assert far_off(counts, expected) < 5
    assert 100 < kept < 2400, "some drafts are kept, and some are not"
