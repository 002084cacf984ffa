"""Rotary position embedding (RoPE, Su et al. 2021, arXiv 2104.09864), with the halves of a head paired as in Llama."""

from __future__ import annotations

import torch
from torch import Tensor


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
    cos, sin = (t.unsqueeze(2) for t in table)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
