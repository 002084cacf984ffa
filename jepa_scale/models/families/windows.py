"""The sliding window of each block, taken from the mask that the family makes for it.

A window stands in many places: a keyword of the attention call, an attribute of the layer, or the config alone, where some families
ignore it. What counts in transformers is the mask. Packed attention makes no mask, so this module lets a decoder make its masks once,
with placeholders for its blocks, and reads the windows from them. No block runs, so it works on the ``meta`` device too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

RECORDER = "jepa_mask_recorder"
"""Name in transformers of the attention that records masks instead of making them."""
TOKENS = 2
WINDOW = "mask_window"
"""Attribute of a block's modules: the window of the block's mask, None for full attention; missing if it is not known."""


class _Done(Exception):
    """All blocks have been reached."""


class _Placeholder(nn.Module):
    """Stands for a block: calls ``reached`` with its arguments. Attributes are the block's."""

    def __init__(self, block: nn.Module, reached: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_reached"] = block, reached

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._reached(args, kwargs)  # type: ignore[no-any-return]


def record_windows(decoder: PreTrainedModel, blocks_at: str) -> None:
    """Set the attribute :data:`WINDOW` of each block's modules, in place. The attention implementation is not restored.

    Without a mask that is causal, whole or with a window, a block's modules do not get the attribute.

    Args:
        blocks_at: dotted name of the list of blocks.
    """
    masks: list[tuple[Tensor, int | None, bool]] = []  # kept, so that each id stays its own
    found: list[tuple[int | None, bool]] = []
    blocks = cast(nn.ModuleList, decoder.get_submodule(blocks_at))
    weight = cast(Tensor, decoder.get_input_embeddings().weight)
    device = weight.device
    states = torch.zeros(1, TOKENS, weight.shape[1], device=device)

    def make_mask(*args: Any, **kwargs: Any) -> Tensor:
        mask = torch.zeros(1, 1, TOKENS, TOKENS, device=device)
        size = kwargs.get("local_size")
        masks.append((mask, size, _is_causal(kwargs.get("mask_function"), size)))
        return mask

    def reached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = [(size, usable) for mask, size, usable in masks if any(mask is x for x in (*args, *kwargs.values()))]
        found.append(given[0] if len(given) == 1 else (None, False))
        if len(found) == len(blocks):
            raise _Done
        return states  # whether the decoder takes it whole or its [0], the next placeholder does not read it

    originals = list(blocks)
    AttentionMaskInterface.register(RECORDER, make_mask)  # type: ignore[arg-type]
    AttentionInterface.register(RECORDER, make_mask)
    decoder.set_attn_implementation(RECORDER)
    for number, block in enumerate(originals):
        blocks[number] = _Placeholder(block, reached)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):  # dropout of the embedding must not draw
            # with a 2-d mask transformers does not search the positions for segments, which the meta device cannot
            decoder.base_model(
                inputs_embeds=states, attention_mask=torch.ones(1, TOKENS, device=device), use_cache=False
            )
    except _Done:
        pass
    except Exception:  # a family's code may not reach its blocks so; the windows stay unknown, and the probe decides
        found.clear()
    finally:
        for number, block in enumerate(originals):
            blocks[number] = block
        for module in decoder.modules():  # what it hooked to record outputs were the placeholders
            vars(module).pop("_output_capturing_hooks_installed", None)
    for block, (window, usable) in zip(originals, found, strict=False):
        if usable:
            for module in block.modules():
                setattr(module, WINDOW, window)


def _is_causal(function: Any, window: int | None) -> bool:
    """Return whether a mask function of transformers is causal with this window, by its value at the window's edges."""
    if function is None:
        return False
    try:

        def seen(query: int, key: int) -> bool:
            return bool(function(0, 0, *(torch.tensor(n, device="cpu") for n in (query, key))))

        plain = seen(1, 0) and seen(1, 1) and not seen(0, 1)
        if window is None or window < 2:
            return plain and window is None
        return plain and seen(window, window - 1) and seen(window, 1) and not seen(window, 0)
    except Exception:  # a function of more than the two positions
        return False
