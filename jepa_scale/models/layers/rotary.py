"""Rotary position embedding (RoPE, Su et al. 2021, arXiv 2104.09864), with the halves of a head paired as in Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_table(position_ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position · theta^(−2i/width) for i = 0 … width/2 − 1.

    They are computed in each forward and in fp32. Frequencies in a buffer would be rounded when the module is cast to bf16,
    and at position 2,000 the angles would be off by radians.

    Args:
        position_ids: (B, T) integers.
        width: width of a head, even.
        theta: base of the frequencies.

    Returns:
        Two (B, T, width/2) fp32 tensors.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    angles = position_ids[..., None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by the angle of its position.

    Args:
        x: (B, T, H, D).
        table: cosine and sine, (B, T, D/2), in the dtype of ``x``.
    """
    cos, sin = (t[:, :, None, None] for t in table)
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos.squeeze(2), sin.squeeze(2)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """The rotation in three passes over the memory instead of seven: (a, b) → (a · cos − b · sin, b · cos + a · sin).

    Args:
        x: (…, D), the halves a and b.
        cos, sin: without gradient, and of a shape that broadcasts to (…, 2, D/2): one row for both halves, or one for each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin.flip(-2)), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.unflatten(-1, (2, -1))
    out = halves * cos
    (a, b), (rotated_a, rotated_b) = halves.unbind(-2), out.unbind(-2)
    sin_a, sin_b = sin.expand(*sin.shape[:-2], 2, -1).unbind(-2)
    rotated_a.addcmul_(b, sin_a, value=-1)
    rotated_b.addcmul_(a, sin_b)
    return out.flatten(-2)
