"""Polar coordinate position embedding (PoPE, Gopalakrishnan et al. 2025, arXiv 2509.10534).

In RoPE the angle of a pair of channels depends on both position and content. Here the angle of each channel depends on the
position only and its length on the content only. The score of query t and key s is

    a_ts = Σ_c softplus(q_tc) · softplus(k_sc) · cos((s − t) θ_c + δ_c) / √d,   θ_c = base^(−c/d),   c = 0 … d − 1

with a learned phase δ for each channel and key head. It is an ordinary product of queries and keys of twice the width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def within_a_turn(delta: Tensor) -> Tensor:
    """Clamp phases to [−2π, 0], with the gradient of the identity.

    A clamp's own gradient is zero outside of the range: a phase that an update has moved there could never return, and every
    phase starts at the edge. So the parameter itself is unbounded and only its projection is used: the lazy projection of
    Zinkevich (ICML 2003). Removing only the gradient that points outwards would depend on how a batch is split, because the
    gradients of its parts would be cut before they are summed.
    """
    return delta + (delta.clamp(-2 * math.pi, 0) - delta).detach()


class PolarEmbedding(nn.Module):
    """Polar coordinates of the queries and keys of one attention layer, with the layer's phases.

    ``delta`` (heads · width,) starts at 0. It has one dimension, so that it gets no weight decay, which is for matrices.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.delta = nn.Parameter(torch.zeros(heads * width))

    def forward(
        self, q: Tensor, k: Tensor, at_q: tuple[Tensor, Tensor], at_k: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys of twice the width, in the dtype of the angles or a wider one.

        Args:
            q: (B, T_q, H, D).
            k: (B, T, H_kv, D).
            at_q, at_k: cosine and sine of their angles, (B, T_q, D) and (B, T, D), from
                :func:`jepa_scale.models.layers.rotary.rotary_table` of width 2·D.

        Returns:
            (B, T_q, H, 2·D) and (B, T, H_kv, 2·D).
        """
        cos, sin = (t.unsqueeze(2) for t in at_k)
        delta = within_a_turn(self.delta.float()).view(-1, self.width)  # (H_kv, D)
        cos_d, sin_d = delta.cos().to(cos.dtype), delta.sin().to(cos.dtype)
        turned = cos * cos_d - sin * sin_d, sin * cos_d + cos * sin_d  # (B, T, H_kv, D), angle plus phase
        return _polar(q, tuple(t.unsqueeze(2) for t in at_q)), _polar(k, turned)


def _polar(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    length = F.softplus(x)
    return torch.cat([length * part for part in angles], dim=-1)
