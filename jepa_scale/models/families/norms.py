"""A family's RMSNorm, computed by ours where it is the same function: few passes over the memory on a CPU, one kernel on a GPU.

The families of transformers write RMSNorm as a handful of elementwise operations, each of which reads and writes all rows and
keeps some of them for the backward pass.
"""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from jepa_scale.models.layers.norm import RMSNorm

_SCALES = (1e-3, 1.0, 30.0)
"""Sizes of the rows that are tried: at the first epsilon matters."""


def adopt_norms(decoder: PreTrainedModel) -> int:
    """Turn each module of a decoder that is RMSNorm with a gain into :class:`RMSNorm`, in place; return how many.

    A module is one if it computes the same on a few random rows. Names, weights and exports stay as they are.
    """
    known: dict[tuple[type, int, float], bool] = {}
    adopted = 0
    for norm in list(decoder.modules()):
        eps = _epsilon(norm)
        if eps is None:
            continue
        assert isinstance(norm.weight, nn.Parameter)
        key = type(norm), len(norm.weight), eps
        if key not in known:
            known[key] = _agrees(norm, eps)
        if known[key]:
            norm.__class__ = RMSNorm
            norm.normalized_shape, norm.eps, norm.elementwise_affine = (len(norm.weight),), eps, True  # type: ignore[assignment]
            adopted += 1
    return adopted


def _epsilon(module: nn.Module) -> float | None:
    """Return the epsilon of what may be an RMSNorm of transformers: one vector ``weight``, and rows as the only argument."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    plain = parameters.keys() == {"weight"} and parameters["weight"].dim() == 1 and not list(module.buffers())
    if isinstance(module, nn.RMSNorm) or not plain or not isinstance(eps, float):
        return None
    taken = inspect.signature(module.forward).parameters.values()
    return eps if "rmsnorm" in type(module).__name__.lower() and len(taken) == 1 else None


@torch.no_grad()
def _agrees(norm: nn.Module, eps: float) -> bool:
    theirs = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.device("cpu"):  # a model is often made on the device meta
        generator = torch.Generator().manual_seed(0)
        width = len(theirs.weight)  # type: ignore[arg-type]
        weight, rows = torch.randn(width, generator=generator), torch.randn(4, width, generator=generator)
        ours = RMSNorm(width, eps=eps, dtype=torch.float32)
        for made in (theirs, ours):
            made.weight.copy_(weight)  # type: ignore[operator]
        return all(torch.allclose(theirs(x), ours(x), rtol=1e-4, atol=1e-5) for x in (rows * s for s in _SCALES))
