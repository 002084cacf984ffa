"""InfoNCE over the global batch: values against a plain reference, gradients for any split into micro-batches."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.infonce import NO_KEY, contrast, first_index_of, first_of_each, gather_contrast

SCALE = torch.tensor(7.0)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain(queries, wanted, table, entities):
    """Reference: every distinct entity once, in a loop."""
    losses = []
    distinct = sorted(set(entities))
    for q, w in zip(queries, wanted, strict=True):
        logits = torch.stack([SCALE * (q * table[e]).sum() for e in distinct])
        losses.append(-torch.log_softmax(logits, 0)[distinct.index(w)])
    return torch.stack(losses)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(0, 100))
def test_repeated_entities_count_once(entities, seed):
    table = unit(7, 5, seed=seed)
    queries = unit(len(entities), 5, seed=seed + 1)
    keys = torch.tensor(entities)
    result = contrast(queries, keys, table[keys], keys, SCALE, capacity=12)
    expected = plain(queries, entities, table, entities)
    torch.testing.assert_close(result.losses, expected)


def test_uniform_scores_give_log_of_candidates():
    candidates = unit(9, 4)
    result = contrast(torch.zeros(3, 4), torch.tensor([0, 4, 8]), candidates, torch.arange(9), SCALE, capacity=9)
    torch.testing.assert_close(result.losses, torch.full((3,), 9.0).log())


def test_perfect_predictions_hit():
    candidates = unit(9, 4)
    result = contrast(candidates, torch.arange(9), candidates, torch.arange(9), torch.tensor(1e4), capacity=9)
    assert result.hits.tolist() == [1.0] * 9
    assert result.losses.max() < 1e-3


def test_padding_of_a_gather_is_no_candidate():
    keys = torch.tensor([3, NO_KEY, 3, 5, NO_KEY])
    keep, ordered, order = first_of_each(keys)
    assert keep.tolist() == [True, False, False, True, False]
    assert first_index_of(torch.tensor([3, 5]), ordered, order).tolist() == [0, 3]


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_micro_batches_change_neither_loss_nor_gradient(micros, per_micro, seed):
    """The sum over micro-batches equals one large batch, in value and in every gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = micros * per_micro
    entities = torch.randint(0, 5, (n,), generator=generator)

    def parameters():
        table = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()
        guesses = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed + 2)).requires_grad_()
        return table, guesses, torch.tensor(3.0, requires_grad=True)

    def embed(table, guesses, rows):
        return F.normalize(guesses[rows], dim=-1), F.normalize(table, dim=-1)[entities[rows]]

    table, guesses, scale = parameters()
    everything = torch.arange(n)
    queries, candidates = embed(table, guesses, everything)
    whole = contrast(queries, entities, candidates, entities, scale, capacity=n).losses.sum()
    whole.backward()
    expected = [p.grad for p in (table, guesses, scale)]

    table, guesses, scale = parameters()
    parts = everything.split(per_micro)
    gathered = []
    for rows in parts:
        queries, candidates = embed(table, guesses, rows)
        gathered.append(gather_contrast(queries, entities[rows], candidates, entities[rows], per_micro))
    total = 0.0
    for micro, rows in enumerate(parts):
        queries, candidates = embed(table, guesses, rows)
        result = contrast(
            queries,
            entities[rows],
            candidates,
            entities[rows],
            scale,
            per_micro,
            gathered if micros > 1 else [],
            micro,
        )
        loss = result.losses.sum() + result.elsewhere
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    for got, want in zip([p.grad for p in (table, guesses, scale)], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_half_precision_is_computed_in_fp32_even_under_autocast():
    queries, candidates = unit(6, 8).bfloat16(), unit(6, 8, seed=1).bfloat16()
    keys = torch.arange(6)
    expected = contrast(queries.float(), keys, candidates.float(), keys, SCALE, capacity=6).losses
    with torch.autocast("cpu", torch.bfloat16):
        got = contrast(queries, keys, candidates, keys, SCALE, capacity=6).losses
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_a_queue_adds_negatives_but_no_second_copy_of_what_is_in_the_batch():
    table = unit(9, 5)
    queries, keys = unit(3, 5, seed=1), torch.tensor([2, 4, 2])
    # the queue has an older copy of 4, an empty place, and 6 twice, of which the first is the newest
    queue_keys = torch.tensor([4, NO_KEY, 6, 8, 6])
    queue = torch.stack([unit(1, 5, seed=7)[0], torch.full((5,), 9.0), table[6], table[8], unit(1, 5, seed=8)[0]])
    result = contrast(queries, keys, table[keys], keys, SCALE, capacity=4, queue=(queue, queue_keys))
    assert result.candidates.item() == 4  # 2, 4, 6, 8
    torch.testing.assert_close(result.losses, plain(queries, [2, 4, 2], table, [2, 4, 6, 8]))


def test_candidates_without_gradient_need_no_pass_over_the_others_queries():
    """Candidates of a teacher get no gradient from the other micro-batches; the sum is the loss of one large batch."""
    table, entities = unit(5, 4), torch.tensor([0, 1, 2, 3, 4, 1])
    guesses = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    queue = (unit(3, 4, seed=5), torch.tensor([7, 8, 9]))
    whole = contrast(F.normalize(guesses, dim=-1), entities, table[entities], entities, SCALE, 6, queue=queue)
    (expected,) = torch.autograd.grad(whole.losses.sum(), guesses)
    parts = torch.arange(6).split(2)
    gathered = [
        gather_contrast(F.normalize(guesses[p], dim=-1), entities[p], table[entities[p]], entities[p], 2) for p in parts
    ]
    total = 0.0
    for micro, p in enumerate(parts):
        queries = F.normalize(guesses[p], dim=-1)
        result = contrast(queries, entities[p], table[entities[p]], entities[p], SCALE, 2, gathered, micro, queue)
        total = total + result.losses.sum() + result.elsewhere
        assert result.candidates == whole.candidates == 8
    (got,) = torch.autograd.grad(total, guesses)
    torch.testing.assert_close(got, expected)
