import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jepa_scale.data.grids.objects import find_objects
from jepa_scale.data.grids.transforms import TRANSFORMS, recolour, shift, turn

GRIDS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(lambda s: arrays(np.int8, s, elements=st.integers(0, 9))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(GRIDS, st.integers(0, 1000))
def test_one_permutation_of_colours_for_all_grids(grids, seed):
    changed = recolour(grids, np.random.default_rng(seed))
    pairs = {(int(a), int(b)) for x, y in zip(grids, changed, strict=True) for a, b in zip(x.flat, y.flat, strict=True)}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert all((a == 0) == (b == 0) and 0 <= b <= 9 for a, b in pairs)


@settings(max_examples=60)
@given(GRIDS, st.integers(0, 1000))
def test_one_turn_for_all_grids(grids, seed):
    changed = turn(grids, np.random.default_rng(seed))
    eight = [lambda g, k=k, t=t: np.rot90(g, k).T if t else np.rot90(g, k) for k in range(4) for t in (False, True)]
    fits = [all(np.array_equal(f(x), y) for x, y in zip(grids, changed, strict=True)) for f in eight]
    assert any(fits)
    probe = [np.arange(6).reshape(2, 3)]
    assert not np.array_equal(turn(probe, np.random.default_rng(seed))[0], probe[0])  # never the identity


def test_all_seven_turns_come():
    probe = [np.arange(6, dtype=np.int8).reshape(2, 3)]
    seen = {
        turn(probe, np.random.default_rng(seed))[0].tobytes() + bytes(turn(probe, np.random.default_rng(seed))[0].shape)
        for seed in range(200)
    }
    assert len(seen) == 7


@settings(max_examples=60)
@given(GRIDS, st.integers(0, 1000))
def test_a_shift_moves_everything_alike_and_loses_nothing(grids, seed):
    grids = [np.pad(grid, ((0, 2), (1, 0))) for grid in grids]
    changed = shift(grids, np.random.default_rng(seed))
    before, after = find_objects(grids, 99), find_objects(changed, 99)
    assert [g.shape for g in grids] == [g.shape for g in changed]
    assert (before.counts == after.counts).all()
    steps = after.boxes - before.boxes
    assert (steps == steps[:1]).all() and (steps[:, :2] == steps[:, 2:]).all()
    assert (np.abs(steps) <= 8).all()


def test_shifts_use_the_room_that_there_is():
    grid = np.zeros((4, 5), dtype=np.int8)
    grid[1, 2] = 3
    places = {tuple(np.argwhere(shift([grid], np.random.default_rng(s))[0])[0].tolist()) for s in range(300)}
    assert places == {(r, c) for r in range(4) for c in range(5)}
    other = np.zeros((4, 5), dtype=np.int8)
    other[0, 4] = 1  # it leaves no room above and to the right
    places = {tuple(np.argwhere(shift([grid, other], np.random.default_rng(s))[0])[0].tolist()) for s in range(300)}
    assert places == {(r, c) for r in (1, 2, 3) for c in (0, 1, 2)}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_arguments_stay_as_they_are(name):
    grids = [np.zeros((3, 3), dtype=np.int8), np.eye(3, dtype=np.int8)]
    kept = [grid.copy() for grid in grids]
    made = TRANSFORMS[name](grids, np.random.default_rng(0))
    assert all((a == b).all() for a, b in zip(grids, kept, strict=True)) and all(g.dtype == np.int8 for g in made)
    again = TRANSFORMS[name](grids, np.random.default_rng(0))
    assert all((a == b).all() for a, b in zip(made, again, strict=True))
