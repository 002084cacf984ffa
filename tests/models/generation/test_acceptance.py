"""Drafts change no distribution: counted on small vocabularies, with a fixed seed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.generation.acceptance import accept, distributions

DRAWS = 20_000


def far_off(counts, expected):
    """Return chi-square's distance from its mean in standard deviations; 5 of them are one in a million."""
    n = sum(counts.values())
    x = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(expected) if p > 0)
    freedom = sum(p > 0 for p in expected) - 1
    return (x - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_first_token_has_the_models_distribution_whatever_is_drafted(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(2 * torch.randn(2, 5, generator=generator), dim=-1)
    actual = torch.stack([p, torch.full((5,), 0.2)])
    counts, kept = Counter(), 0
    for _ in range(DRAWS):
        draft = torch.multinomial(q, 1, generator=generator)
        count, following = accept(draft, q[None], actual, generator)
        kept += count
        counts[int(draft) if count else following] += 1
    assert far_off(counts, p.tolist()) < 5
    # the share of drafts that are kept is the overlap of the distributions
    assert kept / DRAWS == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.02)


def test_tokens_after_a_kept_draft_have_its_distribution():
    """Three tokens of a chain: their joint frequencies."""
    generator = torch.Generator().manual_seed(7)
    chain, guess = (torch.softmax(torch.randn(3, 3, generator=generator), dim=-1) for _ in range(2))
    first = torch.tensor([0.2, 0.5, 0.3])
    expected, counts = [float(first[a] * chain[a, b]) for a in range(3) for b in range(3)], Counter()
    for _ in range(DRAWS):
        a = int(torch.multinomial(guess[0], 1, generator=generator))
        b = int(torch.multinomial(guess[a], 1, generator=generator))
        drafts, drafted = torch.tensor([a, b]), torch.stack([guess[0], guess[a]])
        count, following = accept(drafts, drafted, torch.stack([first, chain[a], chain[b]]), generator)
        tokens = [*drafts[:count].tolist(), following]
        if len(tokens) == 1:
            tokens.append(int(torch.multinomial(chain[tokens[0]], 1, generator=generator)))
        counts[3 * tokens[0] + tokens[1]] += 1
    assert far_off(counts, expected) < 5


@settings(max_examples=60)
@given(st.integers(0, 5), st.integers(0, 2**16))
def test_without_temperature_drafts_are_kept_up_to_the_first_wrong_one(k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(k + 1, 4, generator=generator)
    actual = distributions(logits, 0.0)
    drafts = torch.randint(4, (k,), generator=generator)
    right = logits.argmax(dim=-1).tolist()
    wanted = next((i for i in range(k) if drafts[i] != right[i]), k)
    drafted = distributions(torch.nn.functional.one_hot(drafts, 4).float(), 0.0)
    assert accept(drafts, drafted, actual, generator) == (wanted, right[wanted])


def test_equal_distributions_keep_every_draft():
    generator = torch.Generator().manual_seed(0)
    q = torch.softmax(torch.randn(6, 4, generator=generator), dim=-1)
    drafts = torch.multinomial(q[:5], 1, generator=generator)[:, 0]
    assert all(accept(drafts, q[:5], q, generator)[0] == 5 for _ in range(200))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_divides_the_logits(temperature):
    logits = torch.randn(3, 7)
    torch.testing.assert_close(distributions(logits, temperature), torch.softmax(logits / temperature, dim=-1))


def test_a_tiny_temperature_is_greedy():
    logits = 30 * torch.randn(3, 7)
    assert torch.equal(distributions(logits, 1e-38), distributions(logits, 0.0))
