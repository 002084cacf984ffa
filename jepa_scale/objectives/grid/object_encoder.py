"""Representations of objects (GridJEPA): a network over their features with attention between adjacent objects, or a read-out
of a decoder's states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.objectives.grouping import group_means


class AdjacentLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). An object attends to itself and to adjacent objects of its grid."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, index: Tensor, seen: Tensor) -> Tensor:
        """Apply the layer: (n, d) objects, (n,) their slots among all G · S, (G, S, S) bool attention mask → (n, d)."""
        grids, slots, dim = seen.shape[0], seen.shape[1], x.shape[1]
        qkv = self.qkv(self.attention_norm(x))
        padded = qkv.new_zeros(grids * slots, 3 * dim).index_copy(0, index, qkv)
        q, k, v = padded.view(grids, slots, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)  # (G, H, S, d / H)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
        x = x + self.out(mixed.transpose(1, 2).reshape(grids * slots, dim).index_select(0, index))
        return x + self.mlp(self.mlp_norm(x))


class ObjectEncoder(nn.Module):
    """Linear → GELU → Linear on each object's features, layers of attention between adjacent objects, LayerNorm.

    Args:
        spread: (f,) typical standard deviation of each feature. Features are divided by it, so that all have the same weight
            at the start.
        dim: d. layers: layers of attention. heads: attention heads of each.
    """

    spread: Tensor

    def __init__(self, spread: Sequence[float], dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("spread", torch.tensor(spread), persistent=False)
        self.up, self.down = nn.Linear(len(spread), dim), nn.Linear(dim, dim)
        self.layers = nn.ModuleList(AdjacentLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, index: Tensor, adjacent: Tensor) -> Tensor:
        """Encode objects: (n, f) features, (n,) int64 grid · S + slot of each object, (G, S, S) bool adjacency of the slots
        of each grid → (n, d)."""
        x = self.down(F.gelu(self.up((features / self.spread).to(self.up.weight.dtype))))
        if len(self.layers):
            # every slot attends to itself: for an object without neighbours, and because an empty slot's row would be NaN
            seen = adjacent | torch.eye(adjacent.shape[1], dtype=torch.bool, device=adjacent.device)
            for layer in self.layers:
                x = layer(x, index, seen)
        return self.norm(x)


class CellReadout(nn.Module):
    """Mean of the decoder's states at an object's cells, followed by a linear layer and LayerNorm."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(hidden, dim), nn.LayerNorm(dim)

    def forward(self, states: Tensor, cells: Tensor, sizes: Tensor) -> Tensor:
        """Read out objects: (T, h) states, (c,) token indices of the cells, object after object, (n,) number of cells of each
        object, ≥ 1 → (n, d)."""
        return self.norm(self.project(group_means(states[cells], sizes).to(states.dtype)))
