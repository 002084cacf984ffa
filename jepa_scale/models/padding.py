"""The segments of a packed sequence as the rows of an ordinary batch, padded on the right to the longest.

A layer that reads from one token to the next (a recurrence, a convolution) cannot run on segments that lie end to end. In rows it
sees each segment alone. Nothing that follows a token affects it in a causal decoder, so the padding needs no mask: it changes no
state of a token, and gets no gradient. It repeats a row's last token and is not zero, because some layers divide by a norm. A branch
gets its prefix before it, in a row of its own: its tokens see the same as packed, and only their states are taken.
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
class PaddedRows:
    """The rows of a packed sequence's S segments, each of L cells.

    Attributes:
        tokens: (S, L) int64, the token in each cell; the tokens of a prefix stand in several rows.
        own: (T,) int64, the cell of each token in the row of its own segment, counted through all rows.
    """

    tokens: Tensor
    own: Tensor

    @classmethod
    def of(cls, packed: PackedSequence) -> PaddedRows:
        """Return the rows of a packed sequence, on its device and without waiting for it."""
        table = packed.table if packed.keys is None else packed.keys.table
        starts, lengths = table.cu_seqlens[:-1], table.cu_seqlens.diff()
        longest = max(packed.key_lengths)
        offsets = torch.arange(longest, device=lengths.device)
        tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        if packed.keys is not None:
            tokens = packed.keys.index[tokens]
        # a segment's own tokens are the last ones of its row
        ends = torch.arange(len(lengths), device=lengths.device) * longest + lengths
        shift = ends - packed.table.cu_seqlens[1:]
        total = packed.num_tokens
        shift = shift.repeat_interleave(packed.table.cu_seqlens.diff(), output_size=total)
        return cls(tokens, torch.arange(total, device=lengths.device) + shift)

    def spread(self, x: Tensor) -> Tensor:
        """Lay out the rows of tokens: (T, …) → (S, L, …)."""
        return x.index_select(0, self.tokens.flatten()).view(*self.tokens.shape, *x.shape[1:])

    def pack(self, states: Tensor) -> Tensor:
        """Take the states of the tokens: (S, L, d) or (S·L, d) → (T, d)."""
        return states.reshape(self.tokens.numel(), states.shape[-1]).index_select(0, self.own)


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
    """Return the number of cells S·L of a packed sequence's rows."""
    lengths = packed.key_lengths
    return len(lengths) * max(lengths)
