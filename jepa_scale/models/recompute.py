"""Activation checkpointing (Chen et al., arXiv 1604.06174): blocks keep little more than their input and compute the rest again
in the backward pass.

``full`` keeps a block's input. ``selective`` also keeps the results of matrix products and attention, which are most of the
work, and repeats only the element-wise operations. The values are those of the first pass: dropout draws the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "jepa_scale::attention_meta",
}
"""Operators whose results ``selective`` keeps."""
SELECTIVE = "recomputes_selectively"
"""Attribute of a block that recomputes selectively; such a block intercepts every operator, in the forward and again in the
backward pass."""


def recompute(blocks: Sequence[nn.Module], how: str) -> None:
    """Make each block recompute, in place; names and parameters stay. ``how``: ``"none"``, ``"selective"`` or ``"full"``."""
    if how != "none":
        for block in blocks:
            block.__class__ = _recomputing(type(block), how == "selective")  # type: ignore[arg-type]


@cache
def _recomputing(cls: type, selective: bool) -> type:
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        run = partial(cls.forward, self)  # type: ignore[attr-defined]
        return checkpoint(run, *args, use_reentrant=False, **contexts, **kwargs)

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": forward, SELECTIVE: selective})


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(operator, "_schema", None) is not None and operator._schema.name in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
