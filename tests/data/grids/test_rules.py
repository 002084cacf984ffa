import numpy as np

from jepa_scale.data.grids.objects import find_objects
from jepa_scale.data.grids.rules import OBJECTS, SIDES, _Object, frames


def painted(thing: _Object, height: int, width: int, count: int) -> list[np.ndarray]:
    grids = []
    for _ in range(count):
        grid = np.zeros((height, width), dtype=int)
        rows, columns = thing.mask.shape
        grid[thing.top : thing.top + rows, thing.left : thing.left + columns][thing.mask] = thing.colour
        grids.append(grid)
        thing.advance(height, width)
    return grids


def thing(mask=((1, 0), (1, 1)), **rules) -> _Object:
    values = {"top": 1, "left": 0, "colour": 8, "step": [0, 0], "recolour": 0, "grow": -1, "reflect": -1}
    return _Object(mask=np.array(mask, dtype=bool), **(values | rules))


def test_each_rule_does_what_it_says():
    first, *moved = painted(thing(step=[0, 1]), 5, 4, 4)
    assert (moved[0] == np.roll(first, 1, axis=1)).all() and (moved[1] == np.roll(first, 2, axis=1)).all()
    assert (moved[2] == moved[0]).all()  # turned round at the border
    colours = [grid.max() for grid in painted(thing(recolour=1), 5, 4, 4)]
    assert colours == [8, 9, 1, 2]
    grown = painted(thing(grow=2), 5, 4, 6)  # downwards, until there is no more room
    assert [int((grid > 0).sum()) for grid in grown] == [3, 5, 7, 9, 9, 9]
    assert grown[2][:, :2].tolist() == [[0, 0], [8, 0], [8, 8], [8, 8], [8, 8]]
    flipped = painted(thing(reflect=1), 5, 4, 3)
    assert (flipped[1][1:3, :2] == flipped[0][1:3, 1::-1]).all() and (flipped[2] == flipped[0]).all()


def test_a_sequence_is_a_function_of_seed_and_number():
    for number in range(20):
        ours, again = frames(3, number, 6), frames(3, number, 6)
        assert all((a == b).all() for a, b in zip(ours, again, strict=True))
        assert all((a == b).all() for a, b in zip(ours, frames(3, number, 9), strict=False))
        others = (frames(4, number, 1)[0], frames(3, number + 100, 1)[0])
        assert all(ours[0].shape != other.shape or (ours[0] != other).any() for other in others)


def test_sequences_are_grids_with_objects_that_change():
    changes = []
    for number in range(100):
        grids = frames(0, number, 6)
        height, width = grids[0].shape
        assert SIDES[0] <= min(height, width) and max(height, width) <= SIDES[1]
        assert all(grid.shape == grids[0].shape and grid.dtype == np.int8 for grid in grids)
        assert all(grid.min() >= 0 and grid.max() <= 9 for grid in grids)
        counts = find_objects(grids).found
        assert counts.min() >= 1 and counts.max() <= 16 and np.median(counts) <= OBJECTS[1] + 3
        changes.append(np.mean([(a != b).any() for a, b in zip(grids, grids[1:], strict=False)]))
    assert np.mean(changes) > 0.9
