from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.sampling.order import MIXTURE_BLOCK, Mixed, Permuted, Windowed, shuffled
from jepa_scale.utils.errors import InputError

some = settings(max_examples=80)
shards = st.lists(st.integers(0, 9), min_size=1, max_size=17).filter(sum)
AS_THEY_LIE = Permuted(3, lambda epoch: np.arange(3))


def pairs(taken: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(*(x.tolist() for x in taken), strict=True))


@some
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), n=st.integers(1, 300))
def test_an_order_is_a_permutation_and_a_pure_function(seed: int, epoch: int, n: int) -> None:
    first = shuffled(seed, epoch, n).copy()
    assert sorted(first.tolist()) == list(range(n))
    shuffled.cache_clear()
    assert (shuffled(seed, epoch, n) == first).all()


def test_orders_differ_between_epochs_and_seeds() -> None:
    assert len({tuple(shuffled(s, e, 50)) for s in range(4) for e in range(4)}) == 16
    with pytest.raises(ValueError, match="read-only"):
        shuffled(0, 0, 50)[0] = 1


def test_every_place_is_equally_likely() -> None:
    n, epochs = 7, 3000
    places = np.stack([shuffled(0, e, n) for e in range(epochs)])
    for column in places.T:
        counts = np.bincount(column, minlength=n)
        assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 22.5  # chi², 6 degrees of freedom, p = 0.001


@some
@given(
    lengths=shards, seed=st.integers(0, 99), window=st.integers(1, 40), cuts=st.lists(st.integers(0, 30), max_size=8)
)
def test_windows_give_every_sample_once_an_epoch_wherever_one_begins(
    lengths: list[int], seed: int, window: int, cuts: list[int]
) -> None:
    n = sum(lengths)
    whole = pairs(Windowed(np.array(lengths), seed, window).take(0, 3 * n))
    assert Counter(whole) == {(e, i): 1 for e in range(3) for i in range(n)}
    assert [e for e, _ in whole] == sorted(e for e, _ in whole)
    at = 0
    for count in cuts:
        count = min(count, 3 * n - at)
        assert pairs(Windowed(np.array(lengths), seed, window).take(at, count)) == whole[at : at + count]
        at += count


def test_a_window_reads_its_shards_and_no_others() -> None:
    """100 shards of 50: a window of 100 samples touches three shards at most, so reading stays local."""
    order = Windowed(np.full(100, 50), 3, 100)
    _, samples = order.take(0, 5000)
    for window in np.split(samples // 50, 50):
        assert len(set(window.tolist())) <= 3
    first = [int(w[0]) for w in np.split(samples // 50, 50)]
    assert first != sorted(first)
    assert (order.take(5000, 5000)[1] != samples).mean() > 0.9
    assert (Windowed(np.full(100, 50), 4, 100).take(0, 5000)[1] != samples).mean() > 0.9


def test_a_window_larger_than_the_data_is_a_uniform_shuffle() -> None:
    firsts = np.bincount([Windowed(np.array([2, 3, 1]), s, 100).take(0, 1)[1][0] for s in range(3000)], minlength=6)
    assert ((firsts - 500) ** 2 / 500).sum() < 20.5  # chi², 5 degrees of freedom, p = 0.001


def test_samples_as_they_lie_go_on_in_the_next_epoch() -> None:
    assert pairs(AS_THEY_LIE.take(2, 5)) == [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert AS_THEY_LIE.take(4, 0)[0].shape == (0,)
    assert pairs(Permuted(2, lambda e: np.array([1, 0])).take(0, 3)) == [(0, 1), (0, 0), (1, 1)]


@settings(max_examples=10)  # of three blocks each
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
    start=st.integers(0, 25_000),
    count=st.integers(0, 12_000),
)
def test_a_mixture_holds_its_shares_and_each_part_its_own_order(
    lengths: list[int], data: st.DataObject, start: int, count: int
) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 1), min_size=len(lengths), max_size=len(lengths)))
    parts = [Windowed(np.array([n]), 1, 7) for n in lengths]
    mixed = Mixed(parts, lengths, weights, seed=2)
    epochs, samples = mixed.take(0, 3 * MIXTURE_BLOCK)
    offsets = np.cumsum([0, *lengths])
    part_of = np.searchsorted(offsets, samples, side="right") - 1
    for part, order in enumerate(parts):
        here = part_of == part
        share = weights[part] / sum(weights)
        for block in range(3):
            got = here[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK].sum()
            assert abs(got - share * MIXTURE_BLOCK) <= 1
        expected = order.take(0, int(here.sum()))
        assert (epochs[here] == expected[0]).all()
        assert (samples[here] - offsets[part] == expected[1]).all()
    if start + count <= 3 * MIXTURE_BLOCK:
        again = mixed.take(start, count)
        assert (again[0] == epochs[start : start + count]).all()
        assert (again[1] == samples[start : start + count]).all()


def test_a_share_that_never_comes_is_refused() -> None:
    with pytest.raises(InputError, match=r"^data.parts: number 1 .*raise its weight"):
        Mixed([AS_THEY_LIE, AS_THEY_LIE], [3, 3], [1.0, 1e-6], 0)
