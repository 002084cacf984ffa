"""Attention without data: shapes, gradients' shapes, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jepa_scale.models.attention.meta import attention_pairs
from jepa_scale.models.attention.packed import attention
from jepa_scale.packing import SegmentTable


def tensors(tokens: int, heads: int, width: int, device: str = "meta"):
    return torch.empty(tokens, heads, width, device=device, requires_grad=True)


def test_shapes_are_those_of_the_real_one():
    table = SegmentTable.from_lengths([5, 5, 7])
    for device in ("cpu", "meta"):
        q, k, v = tensors(17, 4, 8, device), tensors(17, 2, 8, device), tensors(17, 2, 8, device)
        out = attention(q, k, v, table)
        assert out.shape == (17, 4, 8)
        out.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 1), (True, 3), (True, 6), (True, 100)]
)
def test_flops_are_counted_by_pairs(causal, window):
    lengths, keys = [4, 4, 6], [4, 9, 8]
    table, seen = SegmentTable.from_lengths(lengths), SegmentTable.from_lengths(keys)
    q, k, v = tensors(14, 3, 8), tensors(21, 3, 8), tensors(21, 3, 8)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, table, seen, causal=causal, window=window).sum().backward()
    pairs = attention_pairs(lengths, window, causal, key_lengths=keys)
    assert counter.get_total_flops() == (2 + 5) * 2 * pairs * 3 * 8
