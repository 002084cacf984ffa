"""The gate of SwiGLU, silu(g) ⊙ u (Shazeer 2020, arXiv 2002.05202), with fewer tensors than its plain operations make.

On a CPU the inner width of a perceptron is where most of a block's memory lies, and new memory costs as much as the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) ⊙ up, the same to the bit as the plain operations, forward and backward.

    Args:
        gate, up: tensors of one shape and dtype.
    """
    plain = gate.device.type != "cpu" or gate.dtype != up.dtype or type(gate) is not Tensor or type(up) is not Tensor
    if plain or torch.compiler.is_compiling():  # a compiler fuses the operations; a GPU's time is not in these
        return F.silu(gate) * up
    return _Gated.apply(gate, up)


class _Gated(torch.autograd.Function):
    """Keeps its two inputs alone, and computes silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_up
        of_gate = grad * up
        return torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate), of_up
