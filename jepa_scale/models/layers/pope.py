"""Polar coordinate position embedding (PoPE, Gopalakrishnan et al. 2025, arXiv 2509.10534).

RoPE rotates a pair of channels by its position, and what the pair holds turns it further: an angle says what and where at
once. Here each channel has an angle that is position alone and a length that is content alone, so that query t gives key s

    a_ts = Σ_c softplus(q_tc) · softplus(k_sc) · cos((s − t) θ_c + δ_c) / √d,   θ_c = base^(−c/d),   c = 0 … d − 1

with a phase δ that is learned, per channel and key head. It is an ordinary product of queries and keys twice as wide.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def within_a_turn(delta: Tensor) -> Tensor:
    """Clamp phases to [−2π, 0], with the gradient of the identity.

    A clamp's own gradient is zero outside of the range: a phase that an update has carried there could never come back, and
    every phase starts at the edge. So the parameter itself is free, what it stands for is its projection: the lazy projection
    of Zinkevich (ICML 2003). To cut off only the gradient that pushes outwards would depend on how a batch is split: its
    parts' gradients would be cut before they are added up.
    """
    return delta + (delta.clamp(-2 * math.pi, 0) - delta).detach()


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
                :func:`jepa_scale.models.layers.rotary.rotary_table` of width 2·D.

        Returns:
            (B, T_q, H, 2·D) and (B, T, H_kv, 2·D).
        """
        cos, sin = (t.unsqueeze(2) for t in at_k)
        delta = within_a_turn(self.delta.float()).view(-1, self.width)  # (H_kv, D)
        cos_d, sin_d = delta.cos().to(cos.dtype), delta.sin().to(cos.dtype)
        turned = cos * cos_d - sin * sin_d, sin * cos_d + cos * sin_d  # (B, T, H_kv, D), of the angle with its phase
        return _polar(q, tuple(t.unsqueeze(2) for t in at_q)), _polar(k, turned)


def _polar(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    length = F.softplus(x)
    return torch.cat([length * part for part in angles], dim=-1)
