"""SIGReg: a loss that pulls rows to a standard Gaussian (LeJEPA, Balestriero & LeCun, arXiv 2511.08544).

The rows are projected on random directions. For each direction the Epps–Pulley statistic (Biometrika 70, 1983) compares the
characteristic function of the projections with that of N(0, 1), e^(−t²/2). The loss is a function of sums over the global
batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jepa_scale.losses.precision import without_autocast
from jepa_scale.losses.statistics import at_least_one, global_sums, zero_if_none

ELEMENTS = 1 << 24
"""Elements in the largest tensor of angles: 64 MiB. If all slices do not fit, they are computed in parts."""


def sigreg(
    rows: Tensor,
    total: Tensor,
    seed: int,
    step: int,
    slices: int = 256,
    knots: int = 17,
    limit: float = 5.0,
    half: bool = False,
) -> Tensor:
    """Distance of the rows from N(0, I), in fp32. Collective.

    For each slice (direction), ``T = n · ∫ |φ̂(t) − e^(−t²/2)|² e^(−t²/2) dt`` by the trapezoid rule. φ̂ is the empirical
    characteristic function of the projections of the n rows of the global batch. The loss is the mean of T over the slices.
    For rows drawn from N(0, I) its expectation is √(2π) (1 − 1/√3) ≈ 1.06 for any n; for others it grows with n.

    Args:
        rows: (m, d), the rows of all micro-batches of this rank in the step
            (:func:`jepa_scale.losses.statistics.rows_of_step`), m ≥ 0. They get the gradient. Or (m, V, d), V views of each
            of m samples. Views of one sample are not independent, so the statistic is computed for each view and the loss
            is the mean.
        total: 0-d, n, number of rows (or samples) in the global batch.
        seed, step: determine the directions (:func:`directions`).
        slices: number of directions.
        knots: number of knots of the integral, evenly spaced on [−limit, limit], both ends included; at least 3.
        half: put the knots on [0, limit] and double the integral. The integrand is even, so the same number of knots is
            closer together (as in the authors' published code, with a limit of 3).

    Returns:
        0-d, equal on every rank; make it a contribution with
        :func:`jepa_scale.losses.statistics.as_contribution`. 0 without rows.
    """
    with without_autocast(rows):
        rows, n = rows.float(), at_least_one(total)
        on_knots, weights, gauss = (x.to(rows.device, non_blocking=True) for x in _quadrature(knots, limit, half))
        toward = directions(rows.shape[-1], seed, step, slices).to(rows.device, non_blocking=True)
        views = rows.unbind(dim=1) if rows.ndim == 3 else [rows]
        sums = [_CharacteristicSums.apply(view, toward, on_knots) for view in views]
        cos, sin = global_sums(*(torch.cat(parts) for parts in zip(*sums, strict=True)))
        distance = (cos / n - gauss).square() + (sin / n).square()  # (views · slices, knots)
        return zero_if_none(n * (distance @ weights).mean(), total)


def directions(dim: int, seed: int, step: int, slices: int) -> Tensor:
    """Unit vectors, uniform on the sphere: (slices, dim) fp32 on the CPU.

    They depend on the arguments only and are drawn on the CPU, so that they are equal on every rank and every device.
    ``seed`` and ``step`` must not be negative.
    """
    drawn = np.random.default_rng([seed, step]).standard_normal((slices, dim), dtype=np.float32).astype(np.float64)
    return torch.from_numpy((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32))


def _quadrature(knots: int, limit: float, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positive knots t, their weights and e^(−t²/2), (k,) fp32 each.

    The integrand is even, so each positive knot also has the weight of its negative one. The integrand is 0 at t = 0,
    where both characteristic functions are 1.
    """
    assert knots >= 3 and limit > 0, (knots, limit)
    t, spacing = np.linspace(0.0 if half else -limit, limit, knots, retstep=True)
    trapezoid = np.full(knots, spacing)
    trapezoid[[0, -1]] /= 2
    positive = t > limit * 1e-9  # the knot in the middle is 0 up to rounding
    t, gauss = t[positive], np.exp(-(t[positive] ** 2) / 2)
    weights = 2 * trapezoid[positive] * gauss
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (t, weights, gauss))  # type: ignore[return-value]


class _CharacteristicSums(torch.autograd.Function):
    """Sums of cos(t·x) and sin(t·x) over the projections x of this rank's rows.

    (m, d) rows, (slices, d) directions, (k,) knots t → (slices, k) each. The backward pass computes the angles again,
    because they would take too much memory.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, toward: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, toward, knots)
        cos, sin = [], []
        for part in _parts(rows, toward, knots):
            angles = _angles(rows, part, knots)
            cos.append(angles.cos().sum(dim=0))
            sin.append(angles.sin_().sum(dim=0))
        return torch.cat(cos), torch.cat(sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, toward, knots = ctx.saved_tensors
        with without_autocast(rows):
            of_cos, of_sin = (grad * knots for grad in grads)
            grad, at = torch.zeros_like(rows), 0
            for part in _parts(rows, toward, knots):
                here = slice(at, at + len(part))
                angles = _angles(rows, part, knots)
                slope = torch.einsum("mkt,kt->mk", angles.cos(), of_sin[here])
                slope -= torch.einsum("mkt,kt->mk", angles.sin_(), of_cos[here])
                grad.addmm_(slope, part)
                at = here.stop
        return grad, None, None


def _parts(rows: Tensor, toward: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
    """Split the directions into parts whose angles have at most ``ELEMENTS`` elements."""
    return toward.split(max(1, ELEMENTS // max(1, len(rows) * len(knots))))


def _angles(rows: Tensor, toward: Tensor, knots: Tensor) -> Tensor:
    """Angles t·x, (m, slices, k)."""
    return (rows @ toward.T)[..., None] * knots
