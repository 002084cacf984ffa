"""Attention of tensors without data: the shapes, and the tensors that a kernel keeps for its backward.

:func:`jepa_scale.models.attention.attention` uses it on the ``meta`` device. As FlashAttention (arXiv 2205.14135, 2307.08691)
does, it keeps q, k, v, its output and one fp32 number for each query and head, but never the scores. Forward and backward are
operators of their own, so that the planner and selective activation checkpointing can identify them by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


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
