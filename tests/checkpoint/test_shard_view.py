"""Ranges of flattened tensors as shard views."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.checkpoint.shard_view import ShardView


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape of up to four dimensions and the bounds of a range of its elements."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    bounds = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, bounds[0], bounds[1]


def place(boxes: ShardView, whole: torch.Tensor) -> None:
    for offset, box in boxes.parts:
        assert len(offset) == whole.dim() and box.dim() == whole.dim() and box.numel() > 0
        region = whole[tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))]
        assert region.shape == box.shape, "reaches out of the tensor"
        assert (region == -1).all(), "overlaps another box"
        region.copy_(box)


@given(ranges())
def test_boxes_tile_the_range(case):
    shape, start, end = case
    boxes = ShardView.of_range(shape, start, torch.arange(start, end))
    whole = torch.full(shape, -1)
    place(boxes, whole)
    expected = torch.full((math.prod(shape),), -1)
    expected[start:end] = torch.arange(start, end)
    assert torch.equal(whole.flatten(), expected)
    assert len(boxes.parts) <= max(1, 2 * len(shape) - 1)
    assert boxes.shape == shape and boxes.dtype == torch.int64 and boxes.nbytes == 8 * (end - start)


@given(ranges())
def test_boxes_are_views(case):
    shape, start, end = case
    flat = torch.arange(start, end)
    copied = ShardView.of_range(shape, start, flat).copy()
    for _, box in ShardView.of_range(shape, start, flat).parts:
        box.mul_(-1)
    assert torch.equal(flat, -torch.arange(start, end))
    for _, box in copied.parts:
        assert (box >= 0).all(), "a copy is no view"


def test_most_boxes():
    """All but the first and last element of a cube: part of a row, rows, planes, then rows and part of a row."""
    boxes = ShardView.of_range((4, 4, 4), 1, torch.arange(62))
    assert [tuple(box.shape) for _, box in boxes.parts] == [(1, 1, 3), (1, 3, 4), (2, 4, 4), (1, 3, 4), (1, 1, 3)]


def test_whole():
    tensor = torch.arange(6).view(2, 3).t()  # not contiguous
    [(offset, box)] = ShardView.whole(tensor).parts
    assert offset == (0, 0) and box is tensor
    assert ShardView.whole(torch.tensor(3)).parts[0][0] == ()
