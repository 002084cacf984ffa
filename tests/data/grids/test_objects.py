"""Object extraction against a flood fill, cell by cell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jepa_scale.data.grids.objects import FEATURES, GEOMETRY, find_objects, near
from tests.data.grids.flood_fill import flood_fill

# few colours, so that cells hang together; long thin grids, so that chains are long
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)).flatmap(
    lambda s: arrays(np.int8, s[:2], elements=st.integers(0, s[2]))
)


@settings(max_examples=100)
@given(st.lists(GRIDS, min_size=1, max_size=5), st.sampled_from([4, 8]), st.sampled_from(["cells", "gridjepa"]))
def test_objects_are_those_of_a_flood_fill(grids, connectivity, kind):
    objects = find_objects(grids, 10**6, connectivity, kind)
    at = cell = 0
    for number, grid in enumerate(grids):
        expected = flood_fill(grid.tolist(), connectivity, kind)
        assert objects.counts[number] == objects.found[number] == len(expected)
        for slot, wanted in enumerate(expected):
            assert (objects.grid[at], objects.slot[at], objects.colours[at]) == (number, slot, wanted["colour"])
            np.testing.assert_allclose(objects.features[at], wanted["features"], atol=1e-6)
            own = [divmod(int(c), grid.shape[1]) for c in objects.cells[cell : cell + objects.sizes[at]]]
            assert own == wanted["cells"]
            rows, columns = zip(*own, strict=True)
            assert objects.boxes[at].tolist() == [min(rows), min(columns), max(rows), max(columns)]
            cell += len(own)
            at += 1
    assert at == len(objects.features) and cell == len(objects.cells)


def spiral(side: int) -> np.ndarray:
    """One object that winds inwards: the longest way that a label can have to travel."""
    grid = np.zeros((side, side), dtype=np.int8)
    row, column, step = 0, 0, (0, 1)
    grid[0, 0] = 1
    turns = 0
    while turns < 2:
        r, c = row + step[0], column + step[1]
        ahead = (r + step[0], c + step[1])
        free = 0 <= r < side and 0 <= c < side and not grid[r, c]
        if free and (not (0 <= ahead[0] < side and 0 <= ahead[1] < side) or not grid[ahead]):
            row, column, turns = r, c, 0
            grid[row, column] = 1
        else:
            step, turns = (step[1], -step[0]), turns + 1
    return grid


def test_a_spiral_and_a_comb_are_one_object():
    comb = np.ones((30, 30), dtype=np.int8)
    comb[:-1, 1::2] = 0  # teeth that meet in the last row alone
    for grid in (spiral(30), comb, comb[::-1], comb.T, spiral(30).T):
        assert find_objects([grid]).found.tolist() == [1]
        np.testing.assert_allclose(
            find_objects([grid]).features[0], flood_fill(grid.tolist())[0]["features"], atol=1e-6
        )


@settings(max_examples=60)
@given(st.lists(GRIDS, min_size=1, max_size=4), st.integers(1, 5))
def test_the_largest_are_kept(grids, slots):
    all_of_them, kept = find_objects(grids, 10**6), find_objects(grids, slots)
    stays = all_of_them.slot < slots
    for name in ("features", "boxes", "grid", "slot", "sizes"):
        assert (getattr(kept, name) == getattr(all_of_them, name)[stays]).all()
    assert (kept.found == all_of_them.found).all()
    assert (kept.counts == np.minimum(all_of_them.found, slots)).all()
    assert (kept.cells == all_of_them.cells[np.repeat(stays, all_of_them.sizes)]).all()


def test_neighbouring_grids_do_not_touch():
    full = np.full((2, 3), 4, dtype=np.int8)
    assert find_objects([full, full, full[:1]]).counts.tolist() == [1, 1, 1]


def test_features_have_the_units_that_are_told():
    """An L of 4 cells in a grid of 5 × 10: area, centroid, corner and extent in cells, the rest as shares."""
    grid = np.zeros((5, 10), dtype=np.int8)
    grid[2:5, 6], grid[4, 7] = 3, 3
    (row,) = find_objects([grid]).features
    assert row.shape == (FEATURES,)
    np.testing.assert_allclose(row[0] * 900, 4, atol=1e-4)
    np.testing.assert_allclose(row[1:7] * 30, [3.25, 6.25, 2, 6, 3, 2], atol=1e-5)
    np.testing.assert_allclose(row[7:GEOMETRY], [4 / 6, -1 / 5, 10 / 16, 2 / 4, 3 / 4, 1 / 4], atol=1e-6)
    assert row[GEOMETRY:].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_grids_without_objects():
    empty = np.zeros((3, 4), dtype=np.int8)
    objects = find_objects([empty])
    assert objects.features.shape == (0, FEATURES) and objects.boxes.shape == (0, 4)
    assert objects.counts.tolist() == [0] and not len(objects.cells)
    assert find_objects([empty, empty + 1, empty]).counts.tolist() == [0, 1, 0]


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_near_boxes(reach):
    """Against the cells themselves: two boxes are near if some cell of one is at most ``reach`` away from one of the other."""
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 8, (12, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 3, (12, 2))], axis=1)
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes):
            gaps = [
                max(abs(r - y), abs(c - x))
                for r in range(a[0], a[2] + 1)
                for c in range(a[1], a[3] + 1)
                for y in range(b[0], b[2] + 1)
                for x in range(b[1], b[3] + 1)
            ]
            assert near(boxes, boxes, reach)[i, j] == (min(gaps) <= reach)
    assert (near(boxes, boxes, reach) == near(boxes, boxes, reach).T).all()
