"""Frozen weights as 4-bit codes: NF4 of bitsandbytes with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

The codes are no parameters: an engine would cast, shard and save them, but a code is not a number, and a shard of codes has no
meaning without the scales of its blocks. So every rank has all codes, on every engine alike, and what is left (adapters, norms,
embedding, LM head) is sharded as ever. An EMA teacher uses the student's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from jepa_scale.models.backbone import Backbone
from jepa_scale.utils.errors import InputError, one_line

Linear = nn.Linear | Conv1D
BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale of their own: the defaults of bitsandbytes."""
TABLES = 16 + 256 + 1
"""fp32 values of a layer beside its scales: the levels of NF4 and of the 8-bit scales, and the scales' mean."""


def check_device(device: torch.device) -> None:
    """Quantise a block of zeros on a device.

    Raises:
        InputError: bitsandbytes is not installed, or has no 4-bit kernels for the device.
    """
    try:
        Codes(torch.zeros(1, BLOCK, device=device), torch.float32)
    except ImportError as error:
        raise InputError(
            f"model.load_in_4bit: bitsandbytes cannot be imported ({error}); pip install 'jepa-scale[4bit]', or remove the key"
        ) from None
    except Exception as error:  # of a missing library or kernel, by the version
        raise InputError(
            f"model.load_in_4bit: bitsandbytes cannot quantise on {device.type} ({type(error).__name__}: {one_line(error)}); install a version of it "
            "that can, or remove the key"
        ) from None


class Codes:
    """The codes of a matrix. A deep copy shares them, as they never change.

    Args:
        weight: (outputs, inputs) fp32, so that the codes depend on no precision of a run.
        dtype: of the matrix that is made of them for the backward.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        assert weight.dtype == torch.float32, weight.dtype
        from bitsandbytes.functional import quantize_4bit  # of an extra

        self.packed, self.state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.state.dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        return self


class FourBitLinear(nn.Module):
    """A frozen linear layer whose weight is given by codes.

    Args:
        layer: the layer whose place it takes, and whose bias it keeps.
        weight: its weight, in fp32. dtype: the compute dtype.
    """

    def __init__(self, layer: Linear, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = layer.bias
        self._codes = Codes(weight.t() if isinstance(layer, Conv1D) else weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (…, inputs) → (…, outputs) in the dtype of ``x``."""
        from bitsandbytes import matmul_4bit

        codes = self._codes
        y: Tensor = matmul_4bit(x, codes.packed.t(), bias=self.bias, quant_state=codes.state)
        return y


class PlannedFourBitLinear(nn.Module):
    """The layer on the ``meta`` device: it takes the memory of a :class:`FourBitLinear` while it runs, and keeps none.

    Args:
        layer: the layer whose place it takes.
    """

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        self._shape = tuple(layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self._shape)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """Product with a matrix that is made of its codes for the forward, and again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


def coded_size(numel: int) -> int:
    """Return the bytes of the codes of ``numel`` weights, with their scales."""
    scales = -(-numel // BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // OUTER_BLOCK) + 4 * TABLES


def frozen_layers(backbone: Backbone) -> Iterator[tuple[str, Linear]]:
    """Yield the frozen linear layers of the blocks, by name in the decoder."""
    for name, layer in list(backbone.decoder.named_modules()):
        in_blocks = name.startswith(f"{backbone.blocks_at}.")
        if in_blocks and isinstance(layer, nn.Linear | Conv1D) and not layer.weight.requires_grad:
            yield name, layer


def replace_layers(backbone: Backbone, new: Callable[[str, Linear], nn.Module]) -> None:
    """Replace the frozen linear layers of the blocks, in place.

    Args:
        new: called with name in the decoder and layer, in the same order on all ranks; returns what takes its place.
    """
    for name, layer in frozen_layers(backbone):
        parent, _, own = name.rpartition(".")
        setattr(backbone.decoder.get_submodule(parent), own, new(name, layer))


def quantise(backbone: Backbone, dtype: torch.dtype, weight_of: Callable[[str, Tensor], Tensor]) -> None:
    """Quantise the frozen linear layers of the blocks, in place.

    Args:
        dtype: the compute dtype.
        weight_of: called with name in the decoder and weight of a layer, in the same order on all ranks; returns the weight, in fp32
            and on the device.
    """

    def coded(name: str, layer: Linear) -> nn.Module:
        return FourBitLinear(layer, weight_of(f"{name}.weight", layer.weight), dtype)

    with torch.no_grad():
        replace_layers(backbone, coded)
