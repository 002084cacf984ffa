"""A family's SwiGLU, computed by ours where it is the same function: fewer tensors of the perceptron's inner width."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel

from jepa_scale.models.decoder import JepaMLP

_LAYERS = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
"""Names of the three layers → widths in the trial."""


def adopt_gates(decoder: PreTrainedModel) -> int:
    """Turn each perceptron of a decoder that is SwiGLU into :class:`JepaMLP`, in place; return how many.

    A module is one if it has layers of these names and computes the same with small random ones. Its layers, names, weights and
    exports stay as they are.
    """
    known: dict[type, bool] = {}
    adopted = 0
    for module in list(decoder.modules()):
        if isinstance(module, JepaMLP) or not _may_be(module):
            continue
        kind = type(module)
        if kind not in known:
            known[kind] = _agrees(module)
        if known[kind]:
            module.__class__ = JepaMLP
            adopted += 1
    return adopted


def _may_be(module: nn.Module) -> bool:
    """Return whether a module has the three layers, and nothing else with weights."""
    with_weights = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return with_weights == _LAYERS.keys() and not own


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    trial = copy.copy(module)
    trial._modules = dict(module._modules)  # the copy's own, so that the module keeps its layers
    generator = torch.Generator().manual_seed(0)
    for name, (size_in, size_out) in _LAYERS.items():
        layer = skip_init(nn.Linear, size_in, size_out, bias=False, device="cpu")
        layer.weight.copy_(torch.randn(size_out, size_in, generator=generator, device="cpu"))
        setattr(trial, name, layer)
    x = torch.randn(5, 8, generator=generator, device="cpu")
    try:
        theirs = trial(x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    trial.__class__ = JepaMLP
    return isinstance(theirs, torch.Tensor) and torch.allclose(theirs, trial(x), rtol=1e-5, atol=1e-5)
