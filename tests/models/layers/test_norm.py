import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.layers.norm import RMSNorm

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=2).flatmap(lambda s: st.integers(1, 9).map(lambda d: (*s, d)))


def both(shape, dtype, eps=1e-6, scale=1.0, trained=(True, True)):
    """Outputs and gradients (or None) of ours and of PyTorch's own, on the same rows."""
    generator = torch.Generator().manual_seed(0)
    rows, weight, up = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[-1:], shape))
    found = []
    for norm in (RMSNorm, None):
        x, w = (t.clone().requires_grad_(on) for t, on in zip((rows * scale, weight), trained, strict=True))
        if norm:
            module = norm(shape[-1], eps=eps, dtype=dtype)
            module.weight = torch.nn.Parameter(w.detach(), requires_grad=trained[1])
            y, w = module(x), module.weight
        else:
            y = F.rms_norm(x, shape[-1:], w, eps)
        y.backward(up)
        found.append((y.detach(), x.grad, w.grad))
    return found


@settings(deadline=None)
@given(SHAPES, st.sampled_from([1e-6, 0.1, None]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_values_and_gradients_are_those_of_pytorch(shape, eps, scale):
    for ours, theirs in zip(*both(shape, torch.float32, eps, scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, 1 / scale))


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_what_is_frozen_gets_no_gradient(trained):
    ours, theirs = both((5, 8), torch.float32, trained=trained)
    assert [g is None for g in ours[1:]] == [not on for on in trained]
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_pytorchs_own(dtype):
    for ours, theirs in zip(*both((5, 8), dtype), strict=True):
        assert torch.equal(ours, theirs)


def test_it_keeps_its_input_and_a_number_a_row():
    """What a block keeps for the backward is memory: no copy of the sequence besides the input."""
    x, norm, kept = torch.randn(50, 8, requires_grad=True), RMSNorm(8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert sorted(t.numel() for t in kept) == [8, 50, 400] and any(t.data_ptr() == x.data_ptr() for t in kept)


def test_rows_are_the_same_to_the_bit_with_and_without_gradient():
    """A state without gradient is compared with one that has it, and is stored and read again."""
    x, norm = torch.randn(50, 8), RMSNorm(8)
    with torch.no_grad():
        without = norm(x)
    assert torch.equal(norm(x.requires_grad_()), without)
