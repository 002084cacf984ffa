"""Layers that read neighbouring tokens, by a convolution or a recurrence, on packed segments.

Their kernels keep segments apart if they get the segments' boundaries: those of causal-conv1d and mamba-ssm as ``seq_idx``, those of
flash-linear-attention as ``cu_seqlens``. transformers passes both on where a family's code takes them; its own plain operations know
neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jepa_scale.packing import SegmentTable


def reads_neighbours(decoder: nn.Module) -> bool:
    """Return whether a decoder of transformers has such layers. Each of them begins with a short convolution."""
    return any(isinstance(module, nn.Conv1d) for module in decoder.modules())


def boundaries(table: SegmentTable) -> dict[str, Any]:
    """Return the boundaries of T tokens in S segments as the keywords that transformers has for them.

    Returns:
        ``cu_seq_lens_q``, (S+1,) int32, and ``seq_idx``, (1, T) int32: the number of each token's segment.
    """
    numbers = torch.arange(len(table.lengths), dtype=torch.int32, device=table.cu_seqlens.device)
    of_tokens = numbers.repeat_interleave(table.cu_seqlens.diff(), output_size=sum(table.lengths))
    return {"cu_seq_lens_q": table.cu_seqlens, "seq_idx": of_tokens[None]}
