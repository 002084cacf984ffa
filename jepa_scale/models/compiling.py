"""``torch.compile`` of a decoder's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

LIMIT = 32
"""Graphs of one function, per process; PyTorch's default is 8."""


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Have each block compile its forward when it first runs, in place; names and parameters stay.

    What is compiled is the ``forward`` that the class itself defines, once for all of its blocks, with sizes left open. Hooks
    (FSDP2's, DeepSpeed's), transformers' wrapper around each forward and recomputing (:mod:`jepa_scale.models.recompute`, which
    comes after this) stay outside: compiled with it, each would be a function that many classes share, and the compiler would
    soon have compiled that as often as it is willing to, and go on without. That limit is raised: with and without gradients, student and
    teacher, the first block's input (a view) and those of others, and a stream of one token are graphs of their own.
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
