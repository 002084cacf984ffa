"""SIGReg: rows that look like a standard Gaussian from every side (LeJEPA, Balestriero & LeCun, arXiv 2511.08544).

The rows are projected on random directions, and on each the Epps–Pulley statistic (Biometrika 70, 1983) compares the
characteristic function of the projections with that of N(0, 1), e^(−t²/2). It is a function of sums over the global batch.
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
"""Numbers in the largest tensor of angles, 64 MiB. More slices than fit go one part after the other."""


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
    """How far the rows are from N(0, I), in fp32. Collective.

    On each slice, with the empirical characteristic function φ̂ of the global batch's n rows there,
    ``T = n · ∫ |φ̂(t) − e^(−t²/2)|² e^(−t²/2) dt`` by the trapezoid rule; the loss is the mean of T over the slices. For rows
    that are N(0, I) its expectation is √(2π) (1 − 1/√3) ≈ 1.06 whatever n; for others it grows with n.

    Args:
        rows: (m, d) of this rank and all its micro-batches in the step
            (:func:`jepa_scale.losses.statistics.rows_of_step`), m ≥ 0. They get the gradient. Or (m, V, d), V views of each
            of m samples: views of one sample are no independent draws, so each view's rows have a statistic of their own,
            and the loss is their mean.
        total: 0-d, n, rows (or samples) in the global batch.
        seed, step: the directions are a function of them alone (:func:`directions`).
        slices: directions to project on.
        knots: of the integral, evenly spaced on [−limit, limit], both ends included; at least 3.
        half: the knots are on [0, limit] instead, and the integral is doubled: the integrand is even, so that the same
            number of knots are closer together (the authors' published code, with a limit of 3).

    Returns:
        0-d, the same on every rank; make it a contribution with
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
    """(slices, dim) fp32 on the CPU: unit vectors, uniform on the sphere.

    A function of its arguments alone and drawn on the CPU, so that they are the same on every rank and every device.
    ``seed`` and ``step`` are not negative.
    """
    drawn = np.random.default_rng([seed, step]).standard_normal((slices, dim), dtype=np.float32).astype(np.float64)
    return torch.from_numpy((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32))


def _quadrature(knots: int, limit: float, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positive knots t, their weights and e^(−t²/2), (k,) fp32 each.

    The integrand is even, so negative knots count with their mirror images; and it vanishes at 0, where both functions
    are 1.
    """
    assert knots >= 3 and limit > 0, (knots, limit)
    t, spacing = np.linspace(0.0 if half else -limit, limit, knots, retstep=True)
    trapezoid = np.full(knots, spacing)
    trapezoid[[0, -1]] /= 2
    positive = t > limit * 1e-9  # the one in the middle is 0 but for rounding
    t, gauss = t[positive], np.exp(-(t[positive] ** 2) / 2)
    weights = 2 * trapezoid[positive] * gauss
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (t, weights, gauss))  # type: ignore[return-value]


class _CharacteristicSums(torch.autograd.Function):
    """(m, d) rows, (slices, d) directions, (k,) knots t → (slices, k) Σ cos(t·x) and Σ sin(t·x) over this rank's rows,
    x being their projections. The backward pass computes the angles again: they are far too many to keep."""

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
    """The directions in parts that are small enough."""
    return toward.split(max(1, ELEMENTS // max(1, len(rows) * len(knots))))


def _angles(rows: Tensor, toward: Tensor, knots: Tensor) -> Tensor:
    """(m, slices, k)."""
    return (rows @ toward.T)[..., None] * knots
