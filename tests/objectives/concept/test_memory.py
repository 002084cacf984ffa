"""The two-way memory: its keys find the right slot, which is why training may look slots up."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.objectives.concept.memory import ConceptMemory, name_key


def test_top_slot_of_a_known_name_is_its_own():
    torch.manual_seed(0)
    names = [(first, 50 + last) for first in range(20) for last in range(20)]
    embed = torch.nn.Embedding(100, 64)
    memory = ConceptMemory(names, dim=8)
    keys = memory.key(torch.arange(len(names)), embed)
    queries = name_key(torch.tensor(names), embed)
    assert (queries @ keys.T).argmax(dim=-1).tolist() == list(range(len(names)))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4, unique=True), st.integers(0, 1000))
def test_order_of_a_names_tokens_matters(tokens, seed):
    torch.manual_seed(seed)
    embed = torch.nn.Embedding(31, 60)
    key, reverse = name_key(torch.tensor([tokens, tokens[::-1]]), embed)
    assert F.cosine_similarity(key, reverse, dim=0) < 0.99


def test_names_of_different_lengths():
    torch.manual_seed(0)
    embed = torch.nn.Embedding(10, 64)
    keys = ConceptMemory([(1,), (1, 2), (1, 2, 3)], dim=4).key(torch.arange(3), embed)
    similarity = keys @ keys.T
    assert similarity.argmax(dim=-1).tolist() == [0, 1, 2]


def test_values_start_at_unit_rms():
    torch.manual_seed(0)
    values = ConceptMemory([(i, i) for i in range(500)], dim=64)(torch.arange(500))
    assert abs(values.square().mean().sqrt().item() - 1) < 0.02
