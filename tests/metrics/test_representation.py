"""Spread and retrieval: closed forms, invariances, plain references."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_scale.losses.infonce import NO_KEY
from jepa_scale.metrics import representation
from jepa_scale.metrics.representation import retrieval, std_gap


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_std_gap_is_positive_when_predictions_spread_less():
    targets = torch.tensor([[0.0, 1.0], [2.0, 7.0]])  # biased std 1 and 3
    assert float(std_gap(targets * 0.25 + 9, targets)) == pytest.approx(1.5)
    assert float(std_gap(targets, targets * 0.25)) == pytest.approx(-1.5)
    assert float(std_gap(targets[:1], targets[:1])) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert std_gap(targets[:0], targets[:0]).isnan()


def plain(queries, targets, keys, groups):
    """Reference: one query and one candidate at a time. group → (top1, margin, candidates)."""
    outcome = {}
    for group in sorted(set(groups)):
        rows = [i for i, g in enumerate(groups) if g == group]
        candidates = {}
        for i in rows:
            candidates.setdefault(keys[i], targets[i])
        hits, margins = [], []
        for i in rows:
            cosine = {k: float(F.cosine_similarity(queries[i], t, dim=0)) for k, t in candidates.items()}
            own = cosine.pop(keys[i])
            best = max(cosine.values(), default=-math.inf)
            hits.append(own > best)
            margins.append(own - best)
        margin = sum(margins) / len(rows) if len(candidates) > 1 else math.nan
        outcome[group] = (sum(hits) / len(rows), margin, len(candidates))
    return outcome


def by_group(result):
    columns = (result.groups.tolist(), result.top1.tolist(), result.margin.tolist(), result.candidates.tolist())
    return {group: values for group, *values in zip(*columns, strict=True)}


ROWS = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([2, 8, 32])), min_size=1, max_size=25)


@settings(max_examples=40)
@given(ROWS, st.integers(0, 1000), st.integers(1, 9))
def test_retrieval_equals_a_plain_reference_whatever_the_chunk_and_the_order(rows, seed, chunk):
    keys, groups = [k for k, _ in rows], [g for _, g in rows]
    table = randn(7, 4, seed=seed)
    targets = table[torch.tensor(keys)]
    queries = targets + randn(len(rows), 4, seed=seed + 1)
    expected = plain(queries, targets, keys, groups)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(representation, "CHUNK", chunk)
        for some in (torch.arange(len(rows)), order):
            inputs = (queries[some], targets[some], torch.tensor(keys)[some], torch.tensor(groups)[some])
            got = by_group(retrieval(*inputs))
            assert got.keys() == expected.keys()
            for group, want in expected.items():
                assert got[group] == pytest.approx(want, abs=1e-5, nan_ok=True)


def test_equal_rows_are_all_found():
    rows = randn(30, 8)
    result = retrieval(rows, rows * 3, torch.arange(30), torch.zeros(30, dtype=torch.int64))
    assert result.groups.tolist() == [0] and result.candidates.tolist() == [30]
    assert float(result.top1) == 1 and 0 < float(result.margin) < 2


def test_cosines_are_fp32_under_autocast():
    queries, targets, keys = randn(30, 8), randn(30, 8, seed=1), torch.arange(30)
    expected = retrieval(queries, targets, keys, keys % 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = retrieval(queries, targets, keys, keys % 2)
    assert torch.equal(got.margin, expected.margin)


def test_only_the_first_of_each_key_is_a_candidate():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    result = retrieval(queries, targets, torch.tensor([5, 3, 5]), torch.tensor([1, 1, 1]))
    assert result.candidates.tolist() == [2]
    # cosines with the candidates (1, 0) and (0, 1): the first two find theirs, the third is opposite its own
    assert float(result.top1) == pytest.approx(2 / 3)
    assert float(result.margin) == pytest.approx((1 + 1 - 1) / 3)


def test_collapsed_rows_find_nothing():
    rows = torch.ones(40, 5)
    result = retrieval(rows, rows, torch.arange(40), torch.zeros(40, dtype=torch.int64))
    assert float(result.top1) == 0 and float(result.margin) == pytest.approx(0, abs=1e-6)


def test_a_lone_candidate_has_no_margin():
    result = retrieval(randn(3, 2), randn(3, 2), torch.tensor([4, 4, 9]), torch.tensor([0, 0, 7]))
    assert result.groups.tolist() == [0, 7] and result.candidates.tolist() == [1, 1]
    assert result.top1.tolist() == [1, 1] and result.margin.isnan().all()


def test_filled_up_rows_are_left_out():
    rows, keys = randn(6, 4), torch.tensor([3, NO_KEY, 1, 2, NO_KEY, 0])
    groups = torch.tensor([0, 0, 1, 0, 9, 1])
    keep = keys != NO_KEY
    got = retrieval(rows, rows.flip(1), keys, groups)
    expected = retrieval(rows[keep], rows.flip(1)[keep], keys[keep], groups[keep])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    none = retrieval(rows[:0], rows[:0], keys[:0], groups[:0])
    assert all(len(x) == 0 for x in none)


def test_no_matrix_of_all_pairs():
    """The largest tensor that 3,000 rows make is one chunk of scores."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(x.numel() for x in made)])
            return out

    rows = randn(3000, 4)
    with Watch():
        result = retrieval(rows, rows, torch.arange(3000), torch.zeros(3000, dtype=torch.int64))
    assert result.top1 > 0.99
    assert largest == representation.CHUNK * 3000
