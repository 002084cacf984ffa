from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.sampling.batches import WINDOW_BINS, DataParallelSlice, SampleBatchSampler, TokenBatchSampler
from jepa_scale.data.sampling.order import Mixed, Permuted, Windowed, shuffled
from jepa_scale.utils.errors import InputError

some = settings(max_examples=60)


def uniform(n: int, seed: int) -> Permuted:
    return Permuted(n, lambda epoch: shuffled(seed, epoch, n))


def samples_of(n: int, seed: int, batch: int, *dp_slice: int, **options: Any) -> SampleBatchSampler:
    return SampleBatchSampler(uniform(n, seed), seed, batch, DataParallelSlice(*dp_slice), **options)


def whole_step(make: Any, step: int, accumulation: int = 1, world: int = 1) -> list[list[tuple[int, int]]]:
    """The micro-batches of a step, in the order of its slices, as (epoch, sample)."""
    streams = [make(DataParallelSlice(accumulation, rank, world)) for rank in range(world)]
    found = []
    for micro in range(accumulation):
        for stream in streams:
            epochs, samples = stream.micro_batch(step, micro)
            found.append(list(zip(epochs.tolist(), samples.tolist(), strict=True)))
    return found


def flat(parts: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [pair for part in parts for pair in part]


# -- counted in samples ---------------------------------------------------------------------------------------------------


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

    def make(dp_slice: DataParallelSlice) -> SampleBatchSampler:
        return SampleBatchSampler(uniform(n, 3), 3, batch, dp_slice)

    whole = flat(whole_step(make, step))
    assert len(whole) == batch
    dp_slice = whole_step(make, step, accumulation, world)
    assert flat(dp_slice) == whole
    assert (
        {len(part) for part in dp_slice}
        == {per_part}
        == {make(DataParallelSlice(accumulation, 0, world)).max_samples(step)}
    )


@some
@given(n=st.integers(1, 30), batch=st.integers(1, 70), step=st.integers(0, 9))
def test_a_step_is_a_cut_of_the_epochs_laid_end_to_end(n: int, batch: int, step: int) -> None:
    endless = [(e, int(i)) for e in range((step + 1) * batch // n + 1) for i in shuffled(9, e, n)]
    found = flat(whole_step(lambda dp_slice: SampleBatchSampler(uniform(n, 9), 9, batch, dp_slice), step))
    assert found == endless[step * batch : (step + 1) * batch]


@some
@given(n=st.integers(1, 30), parts=st.integers(1, 9), each=st.integers(1, 5), epochs=st.integers(1, 4), world=st.data())
def test_with_epochs_every_sample_comes_exactly_once_an_epoch_and_then_nothing(
    n: int, parts: int, each: int, epochs: int, world: st.DataObject
) -> None:
    ranks = world.draw(st.sampled_from([w for w in range(1, 9) if parts % w == 0]))

    def make(dp_slice: DataParallelSlice) -> SampleBatchSampler:
        return SampleBatchSampler(uniform(n, 0), 0, parts * each, dp_slice, epochs=epochs)

    steps = make(DataParallelSlice()).steps
    assert steps is not None
    seen = [p for s in range(steps) for p in flat(whole_step(make, s, parts // ranks, ranks))]
    assert Counter(seen) == {(e, i): 1 for e in range(epochs) for i in range(n)}
    assert [e for e, _ in seen] == sorted(e for e, _ in seen)
    assert not flat(whole_step(make, steps, parts // ranks, ranks))


@some
@given(batches=st.tuples(st.integers(1, 40), st.integers(1, 40)), n=st.integers(1, 50), stop=st.integers(0, 20))
def test_resuming_at_another_batch_size_repeats_and_loses_nothing(batches: tuple[int, int], n: int, stop: int) -> None:
    before, after = samples_of(n, 5, batches[0], fingerprint="x"), samples_of(n, 5, batches[1], fingerprint="x")
    assert after.resume(before.state(stop)) == stop
    seen = [p for s in range(stop) for p in flat([pairs(before, s)])] + [
        p for s in range(stop, stop + 5) for p in pairs(after, s)
    ]
    assert seen == pairs(samples_of(n, 5, len(seen)), 0)


@some
@given(
    n=st.integers(1, 40),
    per_part=st.integers(1, 5),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epochs=st.integers(0, 2),
)
def test_samples_of_near_sizes_share_a_micro_batch(
    n: int, per_part: int, world: int, accumulation: int, epochs: int
) -> None:
    """A step has its samples, sorted by size over its slices, however it is dealt out."""
    sizes, batch = np.random.default_rng(n).integers(1, 50, n), per_part * world * accumulation

    def make(dp_slice: DataParallelSlice, near: Any = lambda samples: sizes[samples]) -> SampleBatchSampler:
        return SampleBatchSampler(uniform(n, 3), 3, batch, dp_slice, epochs=epochs, near=near)

    for step in range(4):
        usual = whole_step(lambda dp_slice: make(dp_slice, None), step, accumulation, world)
        parts = whole_step(make, step, accumulation, world)
        assert sorted(flat(parts)) == sorted(flat(usual))
        assert [len(part) for part in parts] == [len(part) for part in usual]
        assert flat(parts) == flat(whole_step(make, step))
        found = [sizes[i] for _, i in flat(parts)]
        assert found == sorted(found)


def pairs(stream: Any, step: int) -> list[tuple[int, int]]:
    return [(int(e), int(s)) for e, s in zip(*stream.micro_batch(step, 0), strict=True)]


def test_a_state_that_does_not_fit_is_refused() -> None:
    state = samples_of(100, 5, 24, fingerprint="x").state(5)
    assert state["position"] == 120
    with pytest.raises(InputError, match=r"^data: .*data.accept_changes=true"):
        samples_of(100, 5, 24, fingerprint="y").resume(state)
    assert samples_of(100, 5, 24, fingerprint="y").resume(state, accept_changes=True) == 5
    with pytest.raises(InputError, match="^run.seed: "):
        samples_of(100, 6, 24, fingerprint="x").resume(state)
    with pytest.raises(InputError, match=r"^train: .*batch_tokens"):
        tokens_of([3] * 9, 10).resume(state)


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(InputError, match=r"train.batch_size: 10 .*train.accumulation=2 .* 3 ranks.* multiple of 6"):
        samples_of(100, 0, 10, 2, 0, 3)
    with pytest.raises(InputError, match="^data: "):
        samples_of(0, 0, 10)
    with pytest.raises(InputError, match=r"^train.epochs: a mixture"):
        SampleBatchSampler(Mixed([Permuted(3, lambda epoch: np.arange(3))], [3], [1.0], 0), 0, 2, epochs=1)


# -- counted in tokens ----------------------------------------------------------------------------------------------------


def tokens_of(sizes: list[int], budget: int, *dp_slice: int, seed: int = 5, **options: Any) -> TokenBatchSampler:
    """Samples of these sizes in shards of seven."""
    lengths = np.array([min(7, len(sizes) - at) for at in range(0, len(sizes), 7)])
    known = np.array(sizes)
    return TokenBatchSampler(
        Windowed(lengths, seed, 10),
        seed,
        lambda s: known[s],
        budget,
        float(known.mean()),
        DataParallelSlice(*dp_slice),
        **options,
    )


sizes_and_budget = st.integers(1, 40).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), min_size=1, max_size=60), st.just(budget))
)


@pytest.mark.parametrize("near", [False, True])
@some
@given(data=sizes_and_budget, world=st.integers(1, 8), accumulation=st.integers(1, 3), epochs=st.integers(1, 3))
def test_bins_hold_their_budget_and_every_sample_once_an_epoch(
    near: bool, data: tuple[list[int], int], world: int, accumulation: int, epochs: int
) -> None:
    sizes, budget = data

    def make(dp_slice: DataParallelSlice) -> TokenBatchSampler:
        place = dp_slice.accumulation, dp_slice.rank, dp_slice.world_size
        return tokens_of(sizes, budget, *place, epochs=epochs, near=near)

    steps = make(DataParallelSlice(accumulation, 0, world)).steps
    assert steps is not None
    parts = [part for s in range(steps) for part in whole_step(make, s, accumulation, world)]
    assert Counter(flat(parts)) == {(e, i): 1 for e in range(epochs) for i in range(len(sizes))}
    assert max(sum(sizes[i] for _, i in part) for part in parts) <= budget
    if near:
        assert all(len(part) * max(sizes[i] for _, i in part) <= budget for part in parts if part)
    assert not flat(whole_step(make, steps, accumulation, world))
    assert any(parts[-accumulation * world :])  # the last step isn't empty
    largest = make(DataParallelSlice(accumulation, world - 1, world)).max_samples(0)
    assert largest == max(1, *(len(p) for p in whole_step(make, 0, accumulation, world)))


@settings(max_examples=15)  # of twenty pairs of world sizes; an example packs windows up to 36 times
@given(data=sizes_and_budget, worlds=st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 4, 12])))
def test_steps_are_the_same_at_any_world_size(data: tuple[list[int], int], worlds: tuple[int, int]) -> None:
    def make(dp_slice: DataParallelSlice) -> TokenBatchSampler:
        return tokens_of(*data, dp_slice.accumulation, dp_slice.rank, dp_slice.world_size)

    one, other = ([whole_step(make, s, 12 // w, w) for s in range(3)] for w in worlds)
    assert one == other


@settings(max_examples=120)
@given(data=sizes_and_budget, stops=st.lists(st.integers(0, 6), min_size=1, max_size=3), choices=st.data())
def test_resuming_again_and_again_with_other_ranks_and_budgets_delivers_every_sample_once(
    data: tuple[list[int], int], stops: list[int], choices: st.DataObject
) -> None:
    sizes, budget = data
    epochs, seen, state, step = 2, [], None, 0
    while True:
        world, accumulation = choices.draw(st.integers(1, 8)), choices.draw(st.integers(1, 3))
        wider = budget + choices.draw(st.sampled_from([0, 0, 7]))
        near = choices.draw(st.booleans())

        def make(
            dp_slice: DataParallelSlice,
            wider: int = wider,
            near: bool = near,
            state: dict[str, Any] | None = state,
        ) -> TokenBatchSampler:
            place = dp_slice.accumulation, dp_slice.rank, dp_slice.world_size
            stream = tokens_of(sizes, wider, *place, epochs=epochs, near=near)
            if state is not None:
                assert stream.resume(state) == state["step"]
            return stream

        here = make(DataParallelSlice(accumulation, 0, world))
        last = here.steps
        assert last is not None
        stop = step + stops.pop() if stops else last
        for s in range(step, min(stop, last)):
            seen += flat(whole_step(make, s, accumulation, world))
        step = min(stop, last)
        if step == last:
            break
        state = here.state(step)
    assert Counter(seen) == {(e, i): 1 for e in range(epochs) for i in range(len(sizes))}


@some
@given(data=sizes_and_budget, stop=st.integers(0, 9))
def test_resuming_as_before_gives_the_same_micro_batches(data: tuple[list[int], int], stop: int) -> None:
    before, after = tokens_of(*data, 2), tokens_of(*data, 2)
    state = before.state(stop)
    assert after.resume(state) == stop
    for step in range(stop, stop + 4):
        for micro in range(2):
            a, b = before.micro_batch(step, micro), after.micro_batch(step, micro)
            assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    assert after.state(stop + 3) == before.state(stop + 3)


@some
@given(data=sizes_and_budget, stops=st.tuples(st.integers(0, 9), st.integers(0, 9)), wider=st.sampled_from([0, 7]))
def test_changed_data_go_on_at_the_same_count(data: tuple[list[int], int], stops: tuple[int, int], wider: int) -> None:
    """Also twice, and also if what is left of a window with another budget comes first."""
    (sizes, budget), epochs, done, state = data, 3, 0, None
    for stop, fingerprint in zip((*stops, 999), "xxy", strict=True):
        stream = tokens_of(sizes, budget, epochs=epochs, fingerprint=fingerprint)
        first = 0 if state is None else stream.resume(state, accept_changes=True)
        assert stream.steps is not None
        last = min(first + stop, stream.steps)
        done += sum(len(stream.micro_batch(step, 0)[0]) for step in range(first, last))
        state, budget = stream.state(last), budget + wider
    assert done == epochs * len(sizes)


def test_a_state_without_the_key_is_of_bins_by_their_sum() -> None:
    """As those of runs before there were padded rows."""
    sizes = [1, 9, 2, 8, 3, 7, 4, 6] * 20
    state = tokens_of(sizes, 10, epochs=1).state(5)
    assert state.pop("near") is False
    one, other = (tokens_of(sizes, 10, epochs=1, near=near) for near in (True, False))
    assert one.resume(state) == other.resume(state) == 5
    left = [{i for step in range(5, s.steps or 0) for i in s.micro_batch(step, 0)[1].tolist()} for s in (one, other)]
    assert left[0] == left[1] and len(left[0]) < len(sizes)


def test_smaller_data_end_where_they_end() -> None:
    state = tokens_of([3] * 90, 10, epochs=1, fingerprint="x").state(7)
    smaller = tokens_of([3] * 15, 10, epochs=1, fingerprint="y")
    assert smaller.resume(state, accept_changes=True) == 7
    assert smaller.steps == 7 and not len(smaller.micro_batch(7, 0)[0])


def test_a_state_is_small_and_plain() -> None:
    state = tokens_of([3, 4, 5] * 500, 64).state(77)
    assert all(value is None or isinstance(value, (int, str)) for value in state.values())


def test_views_of_other_sizes_cannot_go_on_in_the_middle_of_a_window() -> None:
    state = tokens_of([3] * 500, 10, fingerprint="x").state(7)
    with pytest.raises(InputError, match=r"^objective: .*same objective options"):
        tokens_of([4] * 500, 10, fingerprint="x").resume(state)


@pytest.mark.parametrize("mean", [1, 5, 40])
def test_little_room_is_left(mean: int) -> None:
    sizes = (1 + np.random.default_rng(mean).poisson(mean, 20_000)).tolist()
    stream = tokens_of(sizes, 64 * mean)
    used = sum(sizes[i] for step in range(2 * WINDOW_BINS) for i in stream.micro_batch(step, 0)[1])
    assert used / (64 * mean * 2 * WINDOW_BINS) > 0.99
