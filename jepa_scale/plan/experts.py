"""The grouped products of a mixture's experts on the ``meta`` device, which has them in bf16 alone, and their FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers.integrations import moe


@contextmanager
def grouped_products() -> Iterator[None]:
    """Let mixtures of transformers run on the ``meta`` device in any dtype, and PyTorch know their FLOPs, in the block.

    In other dtypes than bf16 transformers' own operator stands for the kernel: it has the same inputs and results.
    """
    usable = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda rows, *others: rows.dtype == torch.bfloat16 and usable(rows, *others)
    formulas = {
        torch.ops.aten._grouped_mm: _flops,
        torch.ops.transformers.grouped_mm_fallback: _flops,
        torch.ops.transformers.grouped_mm_fallback_backward: _flops_backward,
    }
    added = {operator: formula for operator, formula in formulas.items() if operator not in flop_registry}
    for operator, formula in added.items():
        register_flop_formula(operator)(formula)
    try:
        yield
    finally:
        moe._can_use_grouped_mm = usable
        for operator in added:
            del flop_registry[operator]


def _flops(a: Sequence[int], b: Sequence[int], *others: Any, **more: Any) -> int:
    """Count (S, K) rows of all experts with (E, K, N) weights, or for the weights' gradients (K, S) with (S, N)."""
    return 2 * a[0] * a[1] * b[-1]


def _flops_backward(rows: Sequence[int], weight: Sequence[int], *others: Any, **more: Any) -> int:
    return 2 * _flops(rows, weight)
