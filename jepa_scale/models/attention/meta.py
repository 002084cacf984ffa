"""Attention of tensors without data: the shapes, and the tensors that a kernel keeps for its backward.

:func:`jepa_scale.models.attention.packed.attention` uses it on the ``meta`` device. As FlashAttention (arXiv 2205.14135, 2307.08691)
does, it keeps q, k, v, its output and one fp32 number for each query and head, but never the scores. Forward and backward are
operators of their own, so that the planner and selective activation checkpointing can identify them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def attention_pairs(
    lengths: Sequence[int],
    window: int | None = None,
    causal: bool = True,
    key_lengths: Sequence[int] | None = None,
) -> int:
    """Count the pairs of a query and a key that it sees, over segments of these lengths; without ``causal`` all pairs.

    Args:
        lengths: number of queries of each segment.
        window: a causal query sees itself and the ``window − 1`` keys before it.
        causal: whether a query sees only its own key and those before it.
        key_lengths: number of keys of each segment, the last of them aligned with the last query; ``None`` = ``lengths``.
    """
    if key_lengths is not None:
        pairs = list(zip(lengths, key_lengths, strict=True))
        if not causal:
            return sum(n * keys for n, keys in pairs)
        # the pairs of all key positions as queries, less those of the prefix
        return attention_pairs(key_lengths, window) - attention_pairs([keys - n for n, keys in pairs], window)
    if not causal:
        return sum(n * n for n in lengths)
    if window is None:
        return sum(n * (n + 1) for n in lengths) // 2
    seen = [(n, min(n, window)) for n in lengths]
    return sum(w * (w + 1) // 2 + (n - w) * w for n, w in seen)


@torch.library.custom_op("jepa_scale::attention_meta", mutates_args=())
def attention_meta(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the output (T_q, H, D_v) and the log-sum-exp (H, T_q) fp32, both without data.

    Args:
        q, k, v: (T_q, H, D), (T_k, H_kv, D), (T_k, H_kv, D_v).
        pairs: number of pairs of a query and a key that it sees, in one head; FLOPs are counted from it.
    """
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("jepa_scale::attention_meta_backward", mutates_args=())
def attention_meta_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention_meta.register_fake(attention_meta._init_fn)
attention_meta_backward.register_fake(attention_meta_backward._init_fn)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.pairs = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_meta_backward(grad, *ctx.saved_tensors, ctx.pairs), None)


attention_meta.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.jepa_scale.attention_meta)
def _forward_flops(q: Any, k: Any, v: Any, pairs: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count the FLOPs of two products, those of scores and values."""
    return 2 * pairs * q[1] * (q[2] + v[2])


@register_flop_formula(torch.ops.jepa_scale.attention_meta_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, pairs: int, *_: Any, **__: Any) -> int:
    """Count the FLOPs of five products: the scores again, and two for each product of the forward."""
    return 2 * pairs * q[1] * (3 * q[2] + 2 * v[2])
