"""Codebooks: a comparison with plain loops, and the behaviour of unused codes."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.losses.quantizer import assigned, commitment, follow, nearest, perplexity, refresh, straight_through


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40)
@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(0, 100))
def test_nearest_and_assigned_are_what_a_loop_finds(n, codes, dim, seed):
    rows, codebook = randn(n, dim, seed=seed), randn(codes, dim, seed=seed + 1)
    found = nearest(rows, codebook)
    wanted = [min(range(codes), key=lambda k: float((row - codebook[k]).square().sum())) for row in rows]
    assert found.tolist() == wanted and found.dtype == torch.int64
    counts, sums = assigned(rows, found, codes)
    assert counts.tolist() == [wanted.count(k) for k in range(codes)]
    for k in range(codes):
        torch.testing.assert_close(
            sums[k], sum((r for r, w in zip(rows, wanted, strict=True) if w == k), torch.zeros(dim))
        )


def test_of_equal_codes_the_first_is_taken():
    assert nearest(torch.ones(2, 3), torch.zeros(4, 3)).tolist() == [0, 0]


def test_the_gradient_goes_through_to_the_rows_and_the_commitment_pulls_them():
    rows, codes = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    out = straight_through(rows, codes)
    torch.testing.assert_close(out, codes)
    out.backward(randn(4, 3, seed=2))
    torch.testing.assert_close(rows.grad, randn(4, 3, seed=2))
    assert codes.grad is None
    rows.grad = None
    loss = commitment(rows, codes)
    torch.testing.assert_close(loss, ((rows - codes) ** 2).mean(dim=1))
    loss.sum().backward()
    torch.testing.assert_close(rows.grad, 2 * (rows - codes).detach() / 3)
    assert codes.grad is None


@settings(max_examples=40)
@given(st.floats(0.2, 0.999), st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 100))
def test_codes_are_the_ratio_of_two_moving_averages(decay, steps, seed):
    """For the codes in use, compare with the usual form in fp64: the ratio of the averages of sums and counts."""
    codes, dim = 4, 3
    codebook, sizes = randn(codes, dim, seed=seed), torch.zeros(codes)
    count, total = torch.zeros(codes).double(), torch.zeros(codes, dim).double()
    for number, used in enumerate(steps):
        rows = randn(5, dim, seed=seed + number + 1)
        which = torch.full((5,), used)
        counts, sums = assigned(rows, which, codes)
        codebook, sizes = follow(codebook, sizes, counts, sums, decay)
        count = decay * count + (1 - decay) * counts.double()
        total = decay * total + (1 - decay) * sums.double()
    for code in set(steps):
        torch.testing.assert_close(codebook[code].double(), total[code] / count[code], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sizes.double(), count, rtol=1e-4, atol=1e-5)


def test_unused_codes_stay_where_they_are_to_the_bit():
    """After thousands of steps the size of an unused code is 0; the code is unchanged and finite, and can be used again."""
    first, sizes = randn(3, 4), torch.tensor([5.0, 5.0, 5.0])
    codebook = first
    row = randn(1, 4, seed=9)
    for _ in range(5000):
        codebook, sizes = follow(
            codebook, sizes, torch.tensor([1.0, 0.0, 0.0]), torch.cat([row, torch.zeros(2, 4)]), 0.95
        )
    assert torch.equal(codebook[1:], first[1:]) and (sizes[1:] < 1e-30).all()
    torch.testing.assert_close(codebook[:1], row)
    codebook, sizes = follow(
        codebook, sizes, torch.tensor([0.0, 2.0, 0.0]), torch.stack([row[0] * 0, 2 * row[0], row[0] * 0]), 0.95
    )
    torch.testing.assert_close(codebook[1], row[0])
    assert codebook.isfinite().all() and torch.equal(codebook[2], first[2])


def test_a_code_never_leaves_the_hull_of_what_it_was_given():
    codebook, sizes = torch.full((1, 1), 0.5), torch.zeros(1)
    for step in range(200):
        value = float(step % 7 == 0)
        codebook, sizes = follow(codebook, sizes, torch.ones(1), torch.full((1, 1), value), 0.9)
        assert 0 <= float(codebook) <= 1


def test_dead_codes_are_those_below_the_threshold_relative_to_the_number_of_codes():
    codebook, pool = torch.zeros(4, 2), randn(4, 2)
    sizes = torch.tensor([0.50, 0.41, 0.06, 0.03])  # shares; a fair one is 0.25
    everything = torch.ones(4, dtype=torch.bool)
    for threshold, dead in ((0.0, []), (0.2, [3]), (0.25, [3, 2]), (2.1, [3, 2, 1, 0])):
        new, left, replaced = refresh(codebook, sizes, pool, everything, threshold)
        assert replaced.nonzero()[:, 0].tolist() == sorted(dead)
        for place, code in enumerate(dead):  # the deadest gets the first of the pool
            assert torch.equal(new[code], pool[place]) and left[code] == 0
        kept = ~replaced
        assert torch.equal(new[kept], codebook[kept]) and torch.equal(left[kept], sizes[kept])
    few = torch.tensor([True, False, False, False])
    _, _, replaced = refresh(codebook, sizes, pool, few, 2.1)
    assert replaced.tolist() == [False, False, False, True]


def test_no_two_codes_come_to_lie_at_one_place():
    """Between two equal codes, rounding would decide which is the nearest."""
    codebook, rows = randn(6, 3), randn(3, 3, seed=1)
    codebook[0] = rows[0]
    sizes = torch.tensor([1.0, 1, 0, 0, 0, 0])
    nearly = rows * (1 + 1e-6)
    pool = torch.stack([nearly[0], rows[1], nearly[1], rows[2], rows[2], randn(3, seed=9)])
    valid = torch.tensor([True, True, True, True, True, False])
    new, _, replaced = refresh(codebook, sizes, pool, valid, 0.1)
    assert replaced.tolist() == [False, False, True, True, False, False]
    assert torch.equal(new[2], rows[1]) and torch.equal(new[3], rows[2])  # rows[0] has a code, each other one gets one
    assert torch.equal(new[[0, 1, 4, 5]], codebook[[0, 1, 4, 5]])
    far = codebook.clone()
    far[0] += 1e6  # what lies far away is no place of the rows, and hides none
    assert refresh(far, sizes, pool, valid, 0.1)[2].tolist() == [False, False, True, True, True, False]


def test_perplexity():
    assert math.isclose(float(perplexity(torch.ones(8))), 8, rel_tol=1e-6)
    assert math.isclose(float(perplexity(torch.tensor([3.0, 0, 0]))), 1, rel_tol=1e-6)
    assert float(perplexity(torch.zeros(3))) == 1


def test_half_precision_is_looked_up_in_fp32():
    codebook = torch.tensor([[1.0, 0.0], [1.001, 0.0]])  # the same in bf16
    rows = torch.tensor([[1.0009, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(rows, codebook).tolist() == [1]
        counts, sums = assigned(torch.full((300, 1), 1.0), torch.zeros(300, dtype=torch.int64), 1)
    assert counts.item() == sums.item() == 300  # bf16 would say 300 = 299 or so
