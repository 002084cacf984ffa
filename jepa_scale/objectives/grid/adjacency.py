"""Attention between adjacent objects of a grid, for many small grids.

A batch has hundreds of grids of a few objects each, at most S. A GPU computes all grids in one call, padded to S slots, because their sizes
are not known on the host. A CPU computes the grids of one size in one call, without a slot that is empty: of 16 slots three are filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Adjacency:
    """Which of n objects see each other.

    Attributes:
        index: (n,) int64, grid · S + slot of each object. seen: (G, S, S) bool, the slots that a slot sees, itself included.
    """

    index: Tensor
    seen: Tensor

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        """Mix the values of the objects that each object sees: (n, 3 · d) queries, keys and values → (n, d)."""
        grids, slots, dim = self.seen.shape[0], self.seen.shape[1], qkv.shape[1] // 3
        padded = qkv.new_zeros(grids * slots, 3 * dim).index_copy(0, self.index, qkv)
        q, k, v = padded.view(grids, slots, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)  # (G, H, S, d / H)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen[:, None])
        return mixed.transpose(1, 2).reshape(grids * slots, dim)[self.index]


@dataclass(frozen=True, slots=True)
class AdjacencyBySize:
    """The same for objects that are ordered by the size of their grid.

    Attributes:
        masks: for each size m, (g, m, m) fp32, 0 where one of the m objects of a grid sees another, else −∞.
    """

    masks: tuple[Tensor, ...]

    @torch.compiler.disable  # the sizes in a batch would make each batch a new program
    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        """As :meth:`Adjacency.attend`."""
        dim = qkv.shape[1] // 3
        parts = []
        for mask, rows in zip(self.masks, qkv.split([m.shape[0] * m.shape[1] for m in self.masks]), strict=True):
            q, k, v = rows.view(*mask.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None].to(qkv.dtype))
            parts.append(mixed.transpose(1, 2).reshape(len(rows), dim))
        return torch.cat(parts)


def by_size(index: Tensor, seen: Tensor) -> tuple[Tensor, AdjacencyBySize]:
    """Return the order of the objects by the size of their grid, (n,), n ≥ 1, and their adjacency in this order.

    Args:
        index, seen: those of :class:`Adjacency`; ``index`` ascends from grid to grid.
    """
    slots = seen.shape[1]
    grid, slot = index // slots, index % slots
    sizes = torch.bincount(grid, minlength=len(seen))[grid]
    sizes, order = sizes.sort(stable=True)  # the objects of a grid stay together
    grid, slot, masks, at = grid[order], slot[order], [], 0
    for size, count in zip(*(x.tolist() for x in torch.unique_consecutive(sizes, return_counts=True)), strict=True):
        here = slice(at, at + count)
        of_grid, of_slot = grid[here].view(-1, size), slot[here].view(-1, size)
        visible = seen[of_grid[:, :1, None], of_slot[:, :, None], of_slot[:, None, :]]
        masks.append(torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf))
        at += count
    return order, AdjacencyBySize(tuple(masks))
