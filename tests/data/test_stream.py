from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.stream import SampleStream, shuffled
from jepa_scale.errors import InputError

some = settings(max_examples=60, deadline=None)


def step_samples(n: int, seed: int, batch: int, step: int, accumulation: int = 1, world: int = 1) -> list[list[int]]:
    """[epoch, sample] of a whole step, micro-batch by micro-batch and in each of them rank by rank."""
    found: list[list[int]] = []
    for micro in range(accumulation):
        for rank in range(world):
            stream = SampleStream(n, seed, batch, accumulation, rank, world)
            found += np.stack(stream.micro_batch(step, micro), axis=1).tolist()
    return found


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
    n=st.integers(1, 40),
    per_part=st.integers(1, 5),
    world=st.integers(1, 8),
    accumulation=st.integers(1, 4),
    step=st.integers(0, 30),
)
def test_a_step_has_the_same_samples_however_it_is_dealt_out(
    n: int, per_part: int, world: int, accumulation: int, step: int
) -> None:
    batch = per_part * world * accumulation
    whole = step_samples(n, 3, batch, step)
    assert len(whole) == batch
    assert step_samples(n, 3, batch, step, accumulation, world) == whole
    stream = SampleStream(n, 3, batch, accumulation, world - 1, world)
    assert len(stream.micro_batch(step, accumulation - 1)[0]) == stream.micro_batch_size == per_part


@some
@given(n=st.integers(1, 30), batch=st.integers(1, 70), step=st.integers(0, 9))
def test_a_step_is_a_cut_of_the_epochs_laid_end_to_end(n: int, batch: int, step: int) -> None:
    endless = [[e, int(i)] for e in range((step + 1) * batch // n + 1) for i in shuffled(9, e, n)]
    assert step_samples(n, 9, batch, step) == endless[step * batch : (step + 1) * batch]


@some
@given(n=st.integers(1, 30), batch=st.integers(1, 70), epochs=st.integers(1, 4))
def test_every_sample_comes_exactly_once_an_epoch(n: int, batch: int, epochs: int) -> None:
    steps = -(-n * epochs // batch)
    seen = [tuple(x) for step in range(steps) for x in step_samples(n, 0, batch, step)][: n * epochs]
    assert Counter(seen) == {(e, i): 1 for e in range(epochs) for i in range(n)}
    assert [e for e, _ in seen] == sorted(e for e, _ in seen)


@some
@given(
    step=st.integers(0, 1000),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    parts=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3])),
)
def test_resuming_elsewhere_continues_at_the_same_sample(
    step: int, worlds: tuple[int, int], parts: tuple[int, int]
) -> None:
    before = SampleStream(100, 5, 24, parts[0], worlds[0] - 1, worlds[0], "x")
    after = SampleStream(100, 5, 24, parts[1], 0, worlds[1], "x")
    state = before.state(step)
    assert state["position"] == 24 * step
    assert after.resume(state) == step


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = SampleStream(100, 5, 24, fingerprint="x").state(5)
    with pytest.raises(InputError, match="^data: "):
        SampleStream(100, 5, 24, fingerprint="y").resume(state)
    with pytest.raises(InputError, match="^run.seed: "):
        SampleStream(100, 6, 24, fingerprint="x").resume(state)
    with pytest.raises(InputError, match="^train.batch_size: "):
        SampleStream(100, 5, 25, fingerprint="x").resume(state)


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(InputError, match="train.batch_size: 10 .*train.accumulation=2 .* 3 ranks.* multiple of 6"):
        SampleStream(100, 0, 10, accumulation=2, rank=0, world_size=3)
    with pytest.raises(InputError, match="^data: "):
        SampleStream(0, 0, 10)
