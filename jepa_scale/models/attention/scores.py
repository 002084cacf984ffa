"""Attention with all scores in memory, for families that change the scores between the product and the softmax.

No kernel for segments offers both changes, and on a CPU none offers either. It needs memory in proportion to the square of a segment's length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute softmax(c·tanh(q·kᵀ·scale / c))·v, in fp32 from the scores to the weights.

    Args:
        q: (n, H, lq, D).
        k: (n, H_kv, lk, D).
        v: (n, H_kv, lk, D_v). H is a multiple of H_kv.
        mask: (lq, lk) bool, true where a query sees a key; None = it sees all keys.
        softcap: bound c of the scores (Gemma 2, arXiv 2408.00118, section 2); None = the scores are not changed.
        sinks: (H,) score of one more key for each head, whose value is zero (gpt-oss, arXiv 2508.10925, section 2.1);
            None = there is no such key.

    Returns:
        (n, H, lq, D_v), dtype of ``v``.
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        total = torch.logaddexp(scores.logsumexp(dim=-1), sinks.float()[None, :, None])
        weights = (scores - total[..., None]).exp()
    return F.dropout(weights, dropout).to(v.dtype) @ v
