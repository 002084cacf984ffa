"""``torch.compile`` of a decoder's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

LIMIT = 32
"""Most graphs of one function in a process; PyTorch's default is 8."""


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Make each block compile its forward when it first runs, in place; names and parameters stay.

    The ``forward`` that the class itself defines is compiled once for all of its blocks, with dynamic sizes. Hooks (FSDP2's,
    DeepSpeed's), transformers' wrapper around each forward, and recomputation (:mod:`jepa_scale.models.recompute`, applied
    after this) stay outside. Compiled too, each of them would be one function shared by many classes; it would soon reach
    PyTorch's limit of recompilations, beyond which code runs uncompiled.

    That limit is raised here, because these need graphs of their own: with and without gradients, student and teacher, the
    first block's input (a view) and the other blocks', and a packed sequence of one token.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    for block in blocks:
        block.__class__ = _compiled(type(block), backend)  # type: ignore[arg-type]


@cache
def _compiled(cls: type, backend: str) -> type:
    run = torch.compile(inspect.unwrap(cls.forward), dynamic=True, backend=backend)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": forward})
