"""Polar coordinate position embedding (PoPE, Gopalakrishnan et al. 2025, arXiv 2509.10534).

RoPE rotates a pair of channels by its position, and what the pair holds turns it further: an angle says what and where at
once. Here each channel has an angle that is position alone and a length that is content alone, so that query t gives key s

    a_ts = Σ_c softplus(q_tc) · softplus(k_sc) · cos((s − t) θ_c + δ_c) / √d,   θ_c = base^(−c/d),   c = 0 … d − 1

with a phase δ that is learned, per channel and key head. It is an ordinary product of queries and keys twice as wide.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _WithinATurn(torch.autograd.Function):
    """Clamp to [−2π, 0]. Of the gradient, only what would push further out is zero.

    A plain clamp gives nothing to a phase that an update has carried out of the range, so that it could never come back, and
    every phase starts at the edge.
    """

    @staticmethod
    def forward(ctx: Any, delta: Tensor) -> Tensor:
        ctx.save_for_backward(delta)
        return delta.clamp(-2 * math.pi, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (delta,) = ctx.saved_tensors
        outwards = (delta >= 0) & (grad < 0) | (delta <= -2 * math.pi) & (grad > 0)  # a step goes against the gradient
        return grad.masked_fill(outwards, 0)


class PolarEmbedding(nn.Module):
    """Queries and keys of one attention layer in polar coordinates, with the layer's phases.

    ``delta`` (heads · width,) starts at 0. It has one dimension because it is no matrix: no weight decay.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.delta = nn.Parameter(torch.zeros(heads * width))

    def forward(
        self, q: Tensor, k: Tensor, at_q: tuple[Tensor, Tensor], at_k: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Twice as wide, in the dtype of the angles or a wider one.

        Args:
            q: (B, T_q, H, D). k: (B, T, H_kv, D).
            at_q, at_k: cosine and sine of their angles, (B, T_q, D) and (B, T, D), from
                :func:`jepa_scale.models.rotary.rotary_table` of width 2·D.

        Returns:
            (B, T_q, H, 2·D) and (B, T, H_kv, 2·D).
        """
        cos, sin = (t.unsqueeze(2) for t in at_k)
        delta = _WithinATurn.apply(self.delta.float()).view(-1, self.width)  # (H_kv, D)
        cos_d, sin_d = delta.cos().to(cos.dtype), delta.sin().to(cos.dtype)
        turned = cos * cos_d - sin * sin_d, sin * cos_d + cos * sin_d  # (B, T, H_kv, D), of the angle with its phase
        return _polar(q, tuple(t.unsqueeze(2) for t in at_q)), _polar(k, turned)


def _polar(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    length = F.softplus(x)
    return torch.cat([length * part for part in angles], dim=-1)
