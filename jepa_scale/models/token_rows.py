"""Layouts of packed segments for layers that read from one token to the next, as recurrences and convolutions do.

*Padded*, each segment is a row of an ordinary batch, padded on the right to the longest, and such a layer sees it alone. Nothing that
follows a token affects it in a causal decoder, so the padding needs no mask: it changes no state of a token, and gets no gradient. It
repeats a row's last token and is not zero, because some layers divide by a norm. *End to end*, the segments lie in one row, for layers
that get the boundaries.

In both a branch gets its prefix before it, in a copy of its own: its tokens see the same as packed, and only their states are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import masking_utils

from jepa_scale.packing import PackedSequence


@dataclass(frozen=True, slots=True)
class TokenRows:
    """R rows of L cells, laid out from the T tokens of a packed sequence.

    Attributes:
        tokens: (R, L) int64, the token in each cell; the tokens of a prefix stand in several cells.
        own: (T,) int64, the cell of each token in its own segment, counted through all rows.
    """

    tokens: Tensor
    own: Tensor

    @classmethod
    def padded(cls, packed: PackedSequence) -> TokenRows:
        """Lay out each segment as a row, on the sequence's device and without waiting for it."""
        table = packed.table if packed.keys is None else packed.keys.table
        starts, lengths = table.cu_seqlens[:-1], table.cu_seqlens.diff()
        longest = max(packed.key_lengths)
        offsets = torch.arange(longest, device=lengths.device)
        tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        if packed.keys is not None:
            tokens = packed.keys.index[tokens]
        ends = torch.arange(len(lengths), device=lengths.device) * longest + lengths
        return cls(tokens, _own_cells(packed, ends))

    @classmethod
    def end_to_end(cls, packed: PackedSequence) -> TokenRows:
        """Lay out the segments of a sequence with branches in one row, whose boundaries are ``packed.keys.table``."""
        assert packed.keys is not None
        return cls(packed.keys.index[None], _own_cells(packed, packed.keys.table.cu_seqlens[1:]))

    def spread(self, x: Tensor) -> Tensor:
        """Lay out what belongs to the tokens: (T, …) → (R, L, …)."""
        return x.index_select(0, self.tokens.flatten()).view(*self.tokens.shape, *x.shape[1:])

    def pack(self, states: Tensor) -> Tensor:
        """Take the states of the tokens: (R, L, d) or (R·L, d) → (T, d)."""
        return states.reshape(self.tokens.numel(), states.shape[-1]).index_select(0, self.own)


def _own_cells(packed: PackedSequence, ends: Tensor) -> Tensor:
    """Return the cell of each token, (T,), from the cell after each segment's last, (S,): its own tokens come last."""
    total = packed.num_tokens
    shift = (ends - packed.table.cu_seqlens[1:]).repeat_interleave(packed.table.cu_seqlens.diff(), output_size=total)
    return torch.arange(total, device=ends.device) + shift


@contextmanager
def one_segment_a_row() -> Iterator[None]:
    """Make transformers take each row for one segment in the block.

    Without a mask it would search the positions for segments (5.23): that waits for the device, and finds some where an objective gives
    tokens positions of its own.
    """
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


def cells(packed: PackedSequence) -> int:
    """Return the number of cells S·L of a packed sequence's padded rows."""
    lengths = packed.key_lengths
    return len(lengths) * max(lengths)
