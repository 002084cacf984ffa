import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.layers.swiglu import gated

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3)


def both(shape, dtype, trained=(True, True)):
    """Output and gradients (or None) of ours and of the plain operations, on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(shape, generator=generator).mul(4).to(dtype) for _ in range(3))
    found = []
    for function in (gated, lambda g, u: F.silu(g) * u):
        g, u = (t.clone().requires_grad_(on) for t, on in zip((gate, up), trained, strict=True))
        y = function(g, u)
        y.backward(grad)
        found.append((y.detach(), g.grad, u.grad))
    return found


@settings(deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_values_and_gradients_are_those_of_the_plain_operations(shape, dtype):
    for ours, plain in zip(*both(shape, dtype), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_what_is_frozen_gets_no_gradient(trained):
    ours, plain = both((5, 8), torch.float32, trained)
    assert [g is None for g in ours[1:]] == [not on for on in trained]
    assert all(a is None and b is None or torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_strides_do_not_matter():
    whole = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gated(*x.chunk(2, dim=1)), whole)


def test_it_keeps_its_inputs_alone():
    gate, up, kept = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_inputs_stay_so_that_the_graph_can_be_used_twice():
    gate, up = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    y = gated(gate, up).sum()
    once = torch.autograd.grad(y, (gate, up), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, torch.autograd.grad(y, (gate, up)), strict=True))
