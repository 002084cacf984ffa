import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.grids import grid_fault, pair, windows

A, B, C, D, E = ([[n, n], [n, 9]] for n in range(5))


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ([[1, 2], [3]], "ragged grid"),
        ([[1], [10]], "colour outside 0-9"),
        ([[-1]], "colour outside 0-9"),
        ([], "empty grid"),
        ([[]], "empty grid"),
        ([[], []], "empty grid"),
        ([[1.0]], "not an integer colour"),
        ([[True]], "not an integer colour"),
        ([["1"]], "not an integer colour"),
        ([[None]], "not an integer colour"),
        ([1, 2], "not a grid"),
        ("ab", "not a grid"),
        (None, "not a grid"),
    ],
)
def test_faults_of_a_grid(grid, reason):
    assert grid_fault(grid)[0] == reason
    bad = pair("f#train[0]", [A], grid, ("input", "output"))
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"f#train[0]: {reason}: output: ")
    (bad,) = windows("f:3", [A, B, grid])
    assert str(bad).startswith(f"f:3: {reason}: frames[2]: ")


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_whole_grids_have_no_fault(height, width, colour):
    assert grid_fault([[colour] * width] * height) is None


def test_windows_slide_over_frames():
    assert list(windows("f:1", [A, B, C, D, E])) == [
        Record("f:1#frames[3]", {"context": [A, B, C], "target": D}),
        Record("f:1#frames[4]", {"context": [B, C, D], "target": E}),
    ]
    assert list(windows("f:1", [A, B, C])) == [Record("f:1#frames[2]", {"context": [A, B], "target": C})]
    assert list(windows("f:1", [A, B])) == [Record("f:1#frames[1]", {"context": [A], "target": B})]
    for few in ([], [A]):
        (bad,) = windows("f:1", few)
        assert (bad.where, bad.reason) == ("f:1", "too few frames")
    (bad,) = windows("f:1", "x")
    assert bad.reason == "not a grid"


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_windows_of_any_length_and_distance(n, context, offset):
    frames = [[[k % 10, k // 10]] for k in range(n)]
    records = list(windows("w", frames, context=context, offset=offset))
    if n <= offset:
        assert str(records[0]) == f"w: too few frames: frames holds {n}, a context and a target need {offset + 1}"
        return
    length = min(context, n - offset)
    starts = range(n - length - offset + 1)
    assert [r.value["context"] for r in records] == [frames[s : s + length] for s in starts]
    assert [r.value["target"] for r in records] == [frames[s + length + offset - 1] for s in starts]


@given(st.integers(4, 12))
def test_every_frame_after_the_context_is_a_target_once(n):
    frames = [[[k % 10]] for k in range(n)]
    records = list(windows("w", frames))
    assert [r.value["target"] for r in records] == frames[3:]
    assert all(r.value["context"] == frames[k : k + 3] for k, r in enumerate(records))


def test_a_context_without_grids_is_bad():
    assert isinstance(pair("w", [], A, ("context", "target")), BadRecord)
    assert pair("w", [A, B], C, ("context", "target")) == Record("w", {"context": [A, B], "target": C})
    assert "context[1]: row 1" in str(pair("w", [A, [[1, 2], [3]]], C, ("context", "target")))
