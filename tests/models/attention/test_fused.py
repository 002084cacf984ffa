"""Attention by PyTorch's fused kernel of CPUs against attention with all scores in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from jepa_scale.models.attention import packed as attention_module
from jepa_scale.models.attention.fused import fuses
from jepa_scale.models.attention.packed import attention
from jepa_scale.packing import SegmentTable


def made(queries, keys, heads=2, width=6, of_values=4):
    generator = torch.Generator().manual_seed(0)
    sizes = (sum(queries), width), (sum(keys), width), (sum(keys), of_values)
    return [torch.randn(n, heads, d, generator=generator).requires_grad_() for n, d in sizes]


def plain(q, k, v, queries, keys, causal, scale):
    """Each segment by itself, with its scores."""
    out = []
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        scores = torch.einsum("ihd,jhd->hij", a, b) * scale
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(b) - len(a))
            scores = scores.masked_fill(hidden, -torch.inf)
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(out)


def with_gradients(out, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


segments = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=40)
@given(segments, st.booleans(), st.sampled_from([2, 4, 6]))
def test_values_and_gradients_are_those_of_all_scores(runs, causal, of_values):
    """Several runs of equal segments, with all queries or one, and values as wide as the keys or narrower."""
    keys = [n for count, n, _ in runs for _ in range(count)]
    queries = [1 if one else n for count, n, one in runs for _ in range(count)]
    inputs = made(queries, keys, of_values=of_values)
    tables = SegmentTable.from_lengths(queries), SegmentTable.from_lengths(keys)
    got = with_gradients(attention(*inputs, *tables, causal=causal, scale=0.3), inputs)
    want = with_gradients(plain(*inputs, queries, keys, causal, 0.3), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_scores_are_kept_for_the_backward():
    """Those of 64 tokens are 64 times as many as there are tokens and heads, and wider than everything else."""
    n, heads = 64, 2
    q, k, v = made([n], [n], heads)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        attention(q, k, v, SegmentTable.from_lengths([n]))
    assert kept and all(shape.numel() < n * n * heads for shape in kept)


@pytest.mark.parametrize("change", ["math", "dtype", "shared heads", "wider values", "dropout"])
def test_what_the_kernel_does_not_take_runs_another_way(change, monkeypatch):
    shared, of_values = (1 if change == "shared heads" else 2), (8 if change == "wider values" else 4)
    q, k, v = made([3, 5], [3, 5], of_values=of_values)
    k, v = k[:, :shared], v[:, :shared]
    if change == "dtype":
        q, k, v = (x.bfloat16() for x in (q, k, v))
    backends = [SDPBackend.MATH] if change == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    called = []
    whole = attention_module.fused_attention
    monkeypatch.setattr(attention_module, "fused_attention", lambda *a: called.append(1) or whole(*a))
    with sdpa_kernel(backends):
        out = attention(q, k, v, SegmentTable.from_lengths([3, 5]), dropout=0.5 if change == "dropout" else 0.0)
        assert not fuses(q, k, v, 0.5 if change == "dropout" else 0.0)
    assert not called and out.shape == (8, 2, of_values)


def test_a_mask_that_is_not_the_kernels_own_runs_another_way(monkeypatch):
    def refused(*args):
        raise AssertionError("the kernel has no such mask")

    monkeypatch.setattr(attention_module, "fused_attention", refused)
    q, k, v = made([3], [5])
    tables = SegmentTable.from_lengths([3]), SegmentTable.from_lengths([5])
    want = plain(q, k, v, [3], [5], True, 0.3)
    torch.testing.assert_close(attention(q, k, v, *tables, scale=0.3), want, atol=1e-5, rtol=1e-5)
    q, k, v = made([5], [5])
    near = attention(q, k, v, tables[1], window=2, scale=0.3)
    torch.testing.assert_close(near[:2], plain(q, k, v, [5], [5], True, 0.3)[:2], atol=1e-5, rtol=1e-5)
