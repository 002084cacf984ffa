"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382), called DropPath when it is drawn for each sample.

Block i of L, from 0, drops each of its two branches with probability p = r·i/(L − 1); a kept branch is scaled by 1/(1 − p).
In a packed sequence each segment is a sample. Whether a branch is dropped depends only on the segment's seed, the block and
the branch. So a repeated pass is the same on another rank, among other segments, or after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_scale.packing import SegmentTable

_BITS = 53  # of a uniform number; integer arithmetic gives the same result on every device


class DropPath(nn.Module):
    """Drop a branch in training where ``kept`` is false, and scale it by 1/(1 − ``rate``) elsewhere."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, kept: Tensor | None) -> Tensor:
        """Apply DropPath: branch (B, T, d), kept (B, T) or (B, 1) bool → (B, T, d); ``None`` = kept and unscaled."""
        if kept is None or self.rate == 0:
            return branch
        return torch.where(kept[..., None], branch * (1 / (1 - self.rate)), 0)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def drop_rate(rate: float, block: int, blocks: int) -> float:
    """Return the drop probability of block 0 … ``blocks`` − 1: linear from 0 to ``rate``."""
    return rate * block / max(1, blocks - 1)


def segments_kept(seeds: Tensor, table: SegmentTable, rate: float, blocks: int, stack: int = 0) -> Tensor:
    """Draw the branches that are kept for each token of a packed sequence.

    Args:
        seeds: (S,) int64, the segments' seeds.
        rate: drop probability of the last block.
        stack: number of the stack of blocks; stacks draw independently.

    Returns:
        (blocks, 2, 1, T) bool.
    """
    branch = torch.arange(2 * blocks, device=seeds.device)
    counter = (1 + branch + (stack << 32)) * _signed(0x9E3779B97F4A7C15)
    drawn = _shifted(_mixed(_mixed(seeds) + counter[:, None]), 64 - _BITS)  # (2·blocks, S)
    dropped = drawn < (_step(rate, blocks) * (branch // 2))[:, None]
    owner = torch.repeat_interleave(
        torch.arange(len(seeds), device=seeds.device), table.cu_seqlens.diff(), output_size=sum(table.lengths)
    )
    return ~dropped.index_select(1, owner).unflatten(0, (blocks, 2)).unsqueeze(2)


def rows_kept(rows: int, rate: float, blocks: int, device: torch.device) -> Tensor:
    """Draw the branches that are kept for each row of an ordinary batch, with torch's generator.

    Returns:
        (blocks, 2, rows, 1) bool.
    """
    drawn = torch.randint(1 << _BITS, (blocks, 2, rows, 1), device=device)
    return drawn >= (_step(rate, blocks) * torch.arange(blocks, device=device))[:, None, None, None]


def _step(rate: float, blocks: int) -> int:
    """Return the increase of the drop probability from block to block, in units of 2^−53."""
    return int(rate * (1 << _BITS)) // max(1, blocks - 1)


def _mixed(x: Tensor) -> Tensor:
    """Apply the output function of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with
    the constants of Stafford's variant 13) to int64 that wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shift to the right by ``n`` bits without sign extension."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(n: int) -> int:
    return n - (1 << 64) if n >= 1 << 63 else n
