import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.sampling.packing_bins import bins_of_near_sizes, first_fit_decreasing


def plainly(sizes: list[int], budget: int) -> list[list[int]]:
    """First-fit decreasing, item by item and bin by bin."""
    room: list[int] = []
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for number, left in enumerate(room):
            if left >= sizes[item]:
                room[number] -= sizes[item]
                bins[number].append(item)
                break
        else:
            room.append(budget - sizes[item])
            bins.append([item])
    return [sorted(b) for b in bins]


@settings(max_examples=100)
@given(data=st.data(), budget=st.integers(1, 60))
def test_bins_are_those_of_the_plain_algorithm(data: st.DataObject, budget: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, budget), max_size=60))
    assert [b.tolist() for b in first_fit_decreasing(np.array(sizes, dtype=np.int64), budget)] == plainly(sizes, budget)


def test_many_items_of_real_lengths_leave_little_room() -> None:
    rng = np.random.default_rng(0)
    for sizes, budget in ((rng.integers(5, 400, 30_000), 8192), (np.minimum(rng.lognormal(5, 1, 20_000), 2047), 2048)):
        sizes = sizes.astype(np.int64)
        bins = first_fit_decreasing(sizes, budget)
        assert sorted(np.concatenate(bins).tolist()) == list(range(len(sizes)))
        loads = np.array([sizes[b].sum() for b in bins])
        assert loads.max() <= budget
        assert loads.sum() / (budget * len(bins)) > 0.999


@settings(max_examples=100)
@given(data=st.data(), budget=st.integers(1, 60))
def test_padded_bins_hold_near_sizes_and_are_full(data: st.DataObject, budget: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, budget), max_size=60))
    bins = bins_of_near_sizes(np.array(sizes, dtype=np.int64), budget)
    assert sorted(i for b in bins for i in b.tolist()) == list(range(len(sizes)))
    for one, after in zip(bins, bins[1:], strict=False):
        largest = max(sizes[i] for i in one)
        assert len(one) * largest <= budget < (len(one) + 1) * largest  # the next item finds no room
        assert min(sizes[i] for i in one) >= max(sizes[i] for i in after)
