"""Attention of tensors without data: shapes, what a kernel keeps for its backward, and nothing computed.

On the ``meta`` device :func:`jepa_scale.models.attention.attention` runs this: as FlashAttention (arXiv 2205.14135, 2307.08691) it
keeps q, k, v, its output and one fp32 number a query and head, and never the scores. Both directions are operators of their
own, so that whoever looks at what runs (a planner, selective activation checkpointing) sees them by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("jepa_scale::attention_meta", mutates_args=())
def attention_meta(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """(T_q, H, D), (T_k, H_kv, D), (T_k, H_kv, D_v) → (T_q, H, D_v) and (H, T_q) fp32, both without data.

    Args:
        pairs: of a query and a key that it sees, in one head; FLOPs are counted by them.
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
    """Two products, of scores and of values."""
    return 2 * pairs * q[1] * (q[2] + v[2])


@register_flop_formula(torch.ops.jepa_scale.attention_meta_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, pairs: int, *_: Any, **__: Any) -> int:
    """Five products: the scores once more, and two for each of those of the forward."""
    return 2 * pairs * q[1] * (3 * q[2] + 2 * v[2])
