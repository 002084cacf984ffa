"""Pieces of parameters in the tensors that DeepSpeed steps."""

import torch
from torch import nn

from jepa_scale.engines.deepspeed.state import Piece


def test_a_flat_partition_that_has_the_shape_of_a_parameter_by_chance():
    """A partition of eight elements, of which the last four are the first four of a parameter of eight."""
    piece = Piece(nn.Parameter(torch.zeros(8)), 0, torch.arange(8.0), 4, 4)
    [(offset, box)] = piece.shard_view(piece.master).parts
    assert offset == (0,) and torch.equal(box, torch.arange(4.0, 8))


def test_a_piece_is_a_view_into_what_is_stepped():
    piece = Piece(nn.Parameter(torch.zeros(3, 4)), 5, torch.arange(20.0, requires_grad=True), 10, 6)
    view = piece.shard_view(piece.master)
    assert [(offset, box.shape) for offset, box in view.parts] == [((1, 1), (1, 3)), ((2, 0), (1, 3))]
    for _, box in view.parts:
        box.fill_(-1)
    assert (piece.master < 0).nonzero().flatten().tolist() == list(range(10, 16))


def test_a_whole_tensor_need_not_be_contiguous():
    whole = torch.arange(12.0).view(3, 4).t()
    [(offset, box)] = Piece(nn.Parameter(torch.zeros(4, 3)), 0, whole, 0, 12).shard_view(whole).parts
    assert offset == (0, 0) and torch.equal(box, whole) and box.data_ptr() == whole.data_ptr()
