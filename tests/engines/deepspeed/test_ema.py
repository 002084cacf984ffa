"""Who averages which elements of a replicated copy."""

from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.engines.deepspeed.ema import OwnedRange, Share, even_shares, owned_ranges


def test_parameters_are_cut_where_a_rank_ends():
    shares = even_shares({"a": 5, "b": 0, "c": 6}, 3)
    assert shares == {
        "a": [Share(0, 0, 4), Share(1, 4, 1)],
        "b": [],
        "c": [Share(1, 0, 3), Share(2, 3, 3)],
    }
    assert list(owned_ranges(shares, {"a": 0, "b": 5, "c": 5})) == [
        OwnedRange(0, 0, 4),
        OwnedRange(1, 4, 8),
        OwnedRange(2, 8, 11),
    ]


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 6))
def test_even_shares_cover_everything_once(sizes, world_size):
    names = {str(i): size for i, size in enumerate(sizes)}
    shares = even_shares(names, world_size)
    elements = [
        (owner, name, i)
        for name, of_name in shares.items()
        for owner, start, length in of_name
        for i in range(start, start + length)
    ]
    assert [(name, i) for _, name, i in elements] == [(name, i) for name, size in names.items() for i in range(size)]
    owners = [owner for owner, *_ in elements]
    assert owners == sorted(owners) and all(owners.count(o) <= -(-sum(sizes) // world_size) for o in owners)
    assert set(owners) <= set(range(world_size))

    offsets = {name: sum(sizes[:i]) for i, name in enumerate(names)}
    found = list(owned_ranges(shares, offsets))
    assert [owner for owner, begin, end in found for _ in range(begin, end)] == owners
    assert len(found) == len(set(owners)), "one stretch a rank"
