"""Attention of a packed sequence on a CPU by PyTorch's fused kernel, one call for each run of equal segments.

Called through ``scaled_dot_product_attention``, the kernel does not take values of another width than the keys, as PoPE has them: PyTorch
then keeps all scores for the backward and computes those that a causal mask hides. Here the values are padded with zeros. And each
call is a dozen nodes of the autograd graph; here all calls are one node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fuses(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Return whether :func:`fused_attention` can run these tensors, and the user allows PyTorch's fused kernels."""
    alike = q.shape[1] == k.shape[1] and v.shape[-1] <= q.shape[-1]
    fp32 = q.dtype == k.dtype == v.dtype == torch.float32
    return q.device.type == "cpu" and fp32 and alike and not dropout and torch.backends.cuda.flash_sdp_enabled()


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[tuple[int, int, int]], causal: bool, scale: float
) -> Tensor:
    """Compute softmax(q·kᵀ·scale)·v within each segment.

    Args:
        q: (T_q, H, D) fp32. k: (T_k, H, D). v: (T_k, H, D_v), D_v ≤ D.
        runs: number of segments, queries of each and keys of each, of all runs in their order.
        causal: whether a query sees only keys up to its own position. A run then has as many queries as keys, or one query.

    Returns:
        (T_q, H, D_v).
    """
    return _Fused.apply(q, k, v, runs, causal, scale)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, runs: Any, causal: bool, scale: float) -> Tensor:
        width = v.shape[-1]
        v = _widened(v, q.shape[-1])
        parts, sums = [], []
        for hides, (at_q, at_k, count) in _slices(runs, causal):
            rows = (_batched(x[at], count) for x, at in ((q, at_q), (k, at_k), (v, at_k)))
            y, log_sum = _forward(*rows, 0.0, hides, scale=scale)
            parts.append(_flat(y))
            sums.append(log_sum)
        out = _joined(parts)
        ctx.options = runs, causal, scale
        ctx.save_for_backward(q, k, v, out, *sums)
        return out if width == out.shape[-1] else out[..., :width].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *sums = ctx.saved_tensors
        runs, causal, scale = ctx.options
        grad = _widened(grads[0], out.shape[-1])
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for (hides, (at_q, at_k, count)), log_sum in zip(_slices(runs, causal), sums, strict=True):
            rows = [_batched(x[at], count) for x, at in ((grad, at_q), (q, at_q), (k, at_k), (v, at_k), (out, at_q))]
            found = _backward(*rows, log_sum, 0.0, hides, scale=scale)
            for part, x in zip(parts, found, strict=True):
                part.append(_flat(x))
        of_q, of_k, of_v = map(_joined, parts)
        return of_q, of_k, of_v[..., : grads[0].shape[-1]], None, None, None


def _slices(runs: Sequence[tuple[int, int, int]], causal: bool) -> Iterator[tuple[bool, tuple[slice, slice, int]]]:
    """Yield for each run whether its mask hides keys, and its queries, its keys and its number of segments."""
    q = k = 0
    for count, queries, keys in runs:
        ends = q + count * queries, k + count * keys
        yield causal and queries > 1, (slice(q, ends[0]), slice(k, ends[1]), count)
        q, k = ends


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _batched(x: Tensor, count: int) -> Tensor:
    """View (count·l, H, D) as (count, H, l, D)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """View (count, H, l, D) as (count·l, H, D): the kernel's results lie in memory like that."""
    return x.transpose(1, 2).flatten(0, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
