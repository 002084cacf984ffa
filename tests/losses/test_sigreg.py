"""SIGReg in one process: closed forms, a plain fp64 reference and its gradient, the directions, memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jepa_scale.losses import sigreg as module
from jepa_scale.losses.sigreg import directions, sigreg

N, D = 2048, 768
FULL = dict(limit=5.0, half=False)
HALF = dict(limit=3.0, half=True)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(n: int) -> torch.Tensor:
    return torch.tensor(float(n))


def plain(rows, toward, knots=17, limit=5.0, half=False):
    """Reference: the definition in complex numbers with all knots, differentiable, in the dtype of the rows."""
    t = torch.linspace(0 if half else -limit, limit, knots, dtype=rows.dtype)
    phi = torch.exp(1j * (rows @ toward.to(rows.dtype).T)[..., None] * t).mean(dim=0)
    gauss = torch.exp(-t.square() / 2)
    integral = torch.trapezoid((phi - gauss).abs().square() * gauss, t, dim=-1)
    return len(rows) * (2 if half else 1) * integral.mean()


# -- closed forms -----------------------------------------------------------------------------------------------------


def samples(name: str) -> torch.Tensor:
    x = randn(N, D, seed=1)
    return {
        "gauss": lambda: x,
        "rms": lambda: x / x.square().mean(dim=1, keepdim=True).sqrt(),
        "unit": lambda: x / x.norm(dim=1, keepdim=True),
        "zero": lambda: torch.zeros(N, D),
        "point": lambda: (x[0] / x[0].norm() * math.sqrt(D)).expand(N, D),
        "rank 8": lambda: math.sqrt(D / 8) * randn(N, 8, seed=2) @ torch.linalg.qr(x[:D, :8])[0].T,
    }[name]()


@pytest.mark.parametrize(
    ("name", "full", "half", "tolerance"),
    [
        ("gauss", 1.17, 1.16, 0.2),  # of one drawing; its expectation is below
        ("rms", 1.17, 1.16, 0.2),
        ("unit", 833, 819, 0.001),
        ("zero", 837, 823, 0.001),
        ("point", 2274, 2260, 0.1),  # as far as 256 slices tell
        ("rank 8", 63, 63, 0.15),
    ],
)
def test_known_values(name, full, half, tolerance):
    rows = samples(name)
    assert float(sigreg(rows, count(N), 0, 0, **FULL)) == pytest.approx(full, rel=tolerance)
    assert float(sigreg(rows, count(N), 0, 0, **HALF)) == pytest.approx(half, rel=tolerance)


@pytest.mark.parametrize("n", [1, 16, 200])
def test_the_expectation_for_gaussian_rows_does_not_depend_on_their_number(n):
    """E|φ̂ − φ|² = (1 − φ²) / n, so E T = ∫ (1 − e^(−t²)) e^(−t²/2) dt = √(2π) (1 − 1/√3)."""
    found = [float(sigreg(randn(n, 64, seed=s), count(n), 0, s, slices=64)) for s in range(60)]
    assert np.mean(found) == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), abs=0.06)


@pytest.mark.parametrize(("options", "tolerance"), [(FULL, 1e-4), (dict(limit=6.0, knots=60), 1e-5)])
def test_collapsed_rows_in_closed_form(options, tolerance):
    """n ∫ (1 − φ)² φ dt = n √(2π) (1 − √2 + 1/√3): φ, φ² and φ³ are Gaussians."""
    expected = 50 * math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert float(sigreg(torch.zeros(50, 3), count(50), 0, 0, **options)) == pytest.approx(expected, rel=tolerance)


# -- against the definition -------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    slices=st.integers(1, 12),
    knots=st.integers(3, 24),
    limit=st.floats(0.5, 6),
    half=st.booleans(),
    step=st.integers(0, 10**6),
)
def test_value_and_gradient_equal_the_definition_in_fp64(n, d, slices, knots, limit, half, step):
    rows = (1.5 * randn(n, d, seed=step) + 0.4).requires_grad_()
    got = sigreg(rows, count(n), 3, step, slices, knots, limit, half)
    got.backward()
    wide = rows.detach().double().requires_grad_()
    expected = plain(wide, directions(d, 3, step, slices), knots, limit, half)
    expected.backward()
    assert got.dtype == torch.float32 and got.shape == ()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.grad.double(), wide.grad, rtol=1e-3, atol=2e-5)


def test_descent_spreads_collapsed_rows_to_unit_variance():
    rows = (0.01 * randn(256, 4)).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        sigreg(rows, count(256), 0, step, slices=32).backward()
        optimizer.step()
    torch.testing.assert_close(torch.cov(rows.detach().T), torch.eye(4), atol=0.25, rtol=0)


# -- directions -------------------------------------------------------------------------------------------------------


def test_directions_are_uniform_on_the_sphere_and_known_from_seed_and_step():
    toward = directions(5, 7, 11, 4000)
    torch.testing.assert_close(toward.norm(dim=1), torch.ones(4000))
    torch.testing.assert_close(toward.mean(dim=0), torch.zeros(5), atol=0.03, rtol=0)
    torch.testing.assert_close(toward.T @ toward / 4000, torch.eye(5) / 5, atol=0.02, rtol=0)
    torch.manual_seed(99)
    np.random.seed(99)  # no global generator has a part in it
    assert torch.equal(toward, directions(5, 7, 11, 4000))
    others = [directions(5, *place, 4000) for place in ((7, 12), (8, 11), (11, 7))]
    assert all((toward * other).sum(dim=1).abs().mean() < 0.5 for other in others)


def test_the_loss_looks_from_the_directions_of_its_step():
    rows = randn(30, 6)
    first, again, other, elsewhere = (
        float(sigreg(rows, count(30), *place)) for place in ((1, 2), (1, 2), (1, 3), (2, 2))
    )
    assert first == again and len({first, other, elsewhere}) == 3


# -- numbers and memory -----------------------------------------------------------------------------------------------


def test_without_rows_it_is_zero_and_has_a_gradient():
    rows = torch.zeros(0, 4, requires_grad=True)
    found = sigreg(rows, count(0), 0, 0)
    found.backward()
    assert found.item() == 0 and rows.grad.shape == (0, 4)


def test_half_precision_is_computed_in_fp32_even_under_autocast():
    rows = (3 * randn(40, 8)).bfloat16()
    wide, narrow = rows.float().requires_grad_(), rows.clone().requires_grad_()
    expected = sigreg(wide, count(40), 0, 0)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = sigreg(narrow, count(40), 0, 0)
        got.backward()  # within autocast too
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert torch.equal(narrow.grad, wide.grad.bfloat16())


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("elements", [64 * 8, 64 * 8 * 5, 1])  # slices: one at a time, five, never none
def test_angles_are_never_there_all_at_once(monkeypatch, elements):
    rows = randn(64, 4).requires_grad_()
    whole = sigreg(rows, count(64), 0, 0, slices=32)
    (expected,) = torch.autograd.grad(whole, rows)
    monkeypatch.setattr(module, "ELEMENTS", elements)
    with Largest() as largest:
        found = sigreg(rows, count(64), 0, 0, slices=32)
        (gradient,) = torch.autograd.grad(found, rows)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradient, expected)
    assert largest.numbers == max(elements, 64 * 8)  # of 64 · 32 · 8 angles


@pytest.mark.gpu
def test_a_gpu_sees_the_same():
    rows = randn(512, 96).requires_grad_()
    there = rows.detach().cuda().requires_grad_()
    here = sigreg(rows, count(512), 4, 5)
    here.backward()
    found = sigreg(there, count(512).cuda(), 4, 5)
    found.backward()
    torch.testing.assert_close(found.cpu(), here, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.grad.cpu(), rows.grad, rtol=1e-4, atol=1e-6)


def test_views_have_a_statistic_each():
    rows = randn(40, 3, 12, seed=5) * torch.tensor([1.0, 0.5, 2.0])[:, None]
    rows.requires_grad_()
    value = sigreg(rows, count(40), 2, 3, slices=32)
    expected = torch.stack([sigreg(rows[:, v], count(40), 2, 3, slices=32) for v in range(3)]).mean()
    torch.testing.assert_close(value, expected)
    got, wanted = (torch.autograd.grad(x, rows, retain_graph=True)[0] for x in (value, expected))
    torch.testing.assert_close(got, wanted)
