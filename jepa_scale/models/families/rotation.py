"""A family's rotary embedding, computed by ours where it is the same function: half as many passes over queries and keys.

Most families of transformers have a function ``apply_rotary_pos_emb`` of this formula in their module. Its plain operations make
two more tensors for every half, and their gradients fill a tensor with zeros for each slice.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jepa_scale.models.layers.rotary import Rotation

_NAME = "apply_rotary_pos_emb"
_MARK = "is_ours"
_ARGUMENTS = ("q", "k", "cos", "sin", "unsqueeze_dim")

Rotate = Callable[..., tuple[Tensor, Tensor]]


def adopt_rotations(decoder: PreTrainedModel) -> None:
    """Replace the rotation in the modules of Python that a decoder's classes are from, for every decoder of the family.

    A function is replaced if it computes the same on random rows and tables. The new one leaves to it what is not this formula
    alone: heads that are rotated in part, tables of another dtype, and what is being compiled, which fuses the plain operations.
    """
    for name in sorted({type(module).__module__ for module in decoder.modules()}):
        theirs = getattr(sys.modules.get(name), _NAME, None)
        if not inspect.isfunction(theirs) or tuple(inspect.signature(theirs).parameters) != _ARGUMENTS:
            continue
        if not hasattr(theirs, _MARK) and _agrees(theirs):
            setattr(sys.modules[name], _NAME, _ours(theirs))


def _ours(theirs: Rotate) -> Rotate:
    @wraps(theirs)
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        plain = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype == sin.dtype
        if not plain or cos.requires_grad or torch.compiler.is_compiling():
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        halves = [t.unsqueeze(unsqueeze_dim).unflatten(-1, (2, -1)) for t in (cos, sin)]
        return Rotation.apply(q, *halves), Rotation.apply(k, *halves)

    setattr(rotate, _MARK, True)
    return rotate


@torch.no_grad()
def _agrees(theirs: Rotate) -> bool:
    with torch.device("cpu"):  # a model is often made on the device meta
        generator = torch.Generator().manual_seed(0)
        made: list[Any] = [
            torch.randn(s, generator=generator) for s in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
        ]
        try:
            found = theirs(*made)
        except (RuntimeError, ValueError, TypeError):
            return False
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, _ours(theirs)(*made), strict=True))
