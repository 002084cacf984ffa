"""The arithmetic of clipping by group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jepa_scale.engines.clip import Clipping, Range, cut, join

CPU = torch.device("cpu")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


GROUPS = {"first": ["0.weight", "0.bias"], "second": ["1.weight", "1.bias"]}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"first": ["0.weight", "0.bias"], "second": ["1.weight"]}, r"no group has the parameters \['1.bias'\]"),
        ({"first": GROUPS["first"], "second": ["0.bias", *GROUPS["second"]]}, r"\['0.bias'\] are in two groups"),
        ({"first": [*GROUPS["first"], "0.bias"], "second": GROUPS["second"]}, r"\['0.bias'\] are in two groups"),
        ({**GROUPS, "third": ["2.weight"]}, r"\['2.weight'\] are no first names of trainable parameters"),
    ],
)
def test_every_trainable_parameter_is_in_one_group(groups, message):
    with pytest.raises(AssertionError, match=message):
        Clipping(two_layers(), groups, 1.0)


def test_frozen_parameters_and_second_names_are_in_no_group():
    module = two_layers()
    module.add_module("tied", module[1])
    module[0].weight.requires_grad_(False)
    Clipping(module, {"first": ["0.bias"], "second": GROUPS["second"], "nothing": []}, 1.0)
    for wrong in ("0.weight", "tied.weight"):
        with pytest.raises(AssertionError, match=wrong):
            Clipping(module, {"first": ["0.bias"], "second": [*GROUPS["second"], wrong]}, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("groups", [GROUPS, {}])
def test_equals_torchs_clip_grad_norm(groups, clip_norm, dtype):
    module = two_layers().to(dtype)
    sizes = (1e-3, 0.2, 30.0, 1.0)
    for parameter, size in zip(module.parameters(), sizes, strict=True):
        parameter.grad = torch.randn(parameter.shape).to(dtype) * size
    clipping = Clipping(module, groups, clip_norm)
    grads = clipping.sort((clipping.group_of(name), p.grad.clone()) for name, p in module.named_parameters())
    total, norms = clipping.measure(grads, copies=1, device=CPU)
    before = [[grad.clone() for grad in of_group] for of_group in grads]
    clipping.scale(grads)
    assert clipping.names == tuple(groups) and len(grads) == len(norms) == max(1, len(groups))
    for i, of_group in enumerate(list(groups.values()) or [list(dict(module.named_parameters()))]):
        plain = [nn.Parameter(torch.zeros_like(grad, dtype=torch.float32)) for grad in before[i]]
        for parameter, grad in zip(plain, before[i], strict=True):
            parameter.grad = grad.float()
        assert len(plain) == len(of_group)
        expected = nn.utils.clip_grad_norm_(plain, clip_norm or float("inf"))
        torch.testing.assert_close(norms[i], expected)
        for parameter, grad in zip(plain, grads[i], strict=True):
            torch.testing.assert_close(
                grad, parameter.grad.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=0
            )
    assert total.dtype == norms.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(total, norms.norm())


def test_a_group_that_has_nothing_here_has_norm_0():
    clipping = Clipping(two_layers(), GROUPS, 1.0)
    grads = [[torch.empty(0, 3)], [torch.tensor([3.0]), torch.tensor([[4.0]])]]
    total, norms = clipping.measure(grads, copies=1, device=CPU)
    clipping.scale(grads)
    assert (total, norms.tolist()) == (5.0, [0.0, 5.0])
    assert grads[1][0] == pytest.approx(0.6)
    clipping.measure([[], []], copies=1, device=CPU)
    clipping.scale([[], []])


@pytest.mark.parametrize(
    ("value", "finite"), [(1e25, False), (float("inf"), False), (float("nan"), False), (1e15, True)]
)
def test_the_total_of_a_bad_group_is_not_finite(value, finite):
    clipping = Clipping(two_layers(), GROUPS, 1.0)
    total, norms = clipping.measure([[torch.ones(2)], [torch.tensor([value])]], copies=1, device=CPU)
    assert bool(total.isfinite()) == finite and bool(norms[1].isfinite()) == finite
    assert norms[0] == pytest.approx(2**0.5)


LENGTHS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=12)


@given(LENGTHS, st.lists(st.integers(0, 7), max_size=12), st.booleans())
def test_every_element_in_a_range_is_cut_out_once(lengths, fragments, two_dimensional):
    """Stretches of groups 0 and 1, and of none (2); fragments that end anywhere, or none at all."""
    ranges, owner = [], []
    for group, length in lengths:
        if group < 2 and length:
            ranges.append(Range(group, len(owner), len(owner) + length))
        owner += [group] * length
    joined = join(reversed(ranges))
    assert [group for group, begin, end in joined for _ in range(begin, end)] == [group for group in owner if group < 2]
    assert not any(a.end == b.begin and a.group == b.group for a, b in zip(joined, joined[1:], strict=False))

    flat = torch.arange(len(owner))
    parts = flat.split([*fragments, len(owner) - sum(fragments)]) if sum(fragments) <= len(owner) else [flat]
    if two_dimensional:  # a gradient of a whole parameter, maybe not contiguous
        parts = [part.view(2, -1).T.contiguous().T if len(part) % 2 == 0 and len(part) else part for part in parts]
    got = sorted((int(x), group) for group, piece in cut(parts, joined) for x in piece.flatten())
    assert got == [(i, group) for i, group in enumerate(owner) if group < 2]


def test_what_a_short_gradient_does_not_reach_is_zero():
    got = list(cut([torch.ones(3)], [Range(0, 1, 2), Range(1, 2, 9), Range(0, 12, 14)]))
    assert [(group, piece.tolist()) for group, piece in got] == [(0, [1.0]), (1, [1.0])]
    assert list(cut([], [Range(0, 0, 4)])) == []
