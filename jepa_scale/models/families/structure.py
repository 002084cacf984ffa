"""Where a decoder of transformers has its blocks and its final norm, and how many tokens a segment of it may have."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from jepa_scale.utils.errors import InputError


def locate(decoder: PreTrainedModel) -> tuple[str, str]:
    """Find the paths of the list of blocks and of the final norm within the decoder.

    The norm is the only one that is made after the blocks, or the one of them that is called ``norm``. OPT makes it before them.

    Raises:
        InputError: the decoder is not one stack of blocks with one norm after it.
    """
    depth = getattr(decoder.config, "num_hidden_layers", None)  # the config of a multi-modal model has no such key
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            owner, _, name = path.rpartition(".")
            children = dict(decoder.get_submodule(owner).named_children())
            norms = [child for child in children if "norm" in type(children[child]).__name__.lower()]
            order = list(children)
            after = [child for child in norms if order.index(child) > order.index(name)]
            if len(after) > 1:
                after = [child for child in after if child == "norm"]
            found = after or [child for child in norms if child.startswith("final")]
            if len(found) == 1:
                return path, f"{owner}.{found[0]}" if owner else found[0]
    raise InputError(
        f"model: {type(decoder).__name__} is not a single stack of blocks with a final norm; choose another family"
    )


def position_limit(config: Any) -> int | None:
    """Return :attr:`Backbone.position_limit` of a decoder with this config."""
    return min((limit for limit in position_limits(config).values() if limit is not None), default=None)


def position_limits(config: Any) -> dict[str, int | None]:
    """Return what limits the tokens of a segment, by what sets it; None = no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = {"max_position_embeddings": positions}
    rope: Any = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            own = getattr(config, "original_max_position_embeddings", None)
            limits[f"where the frequencies of {part['rope_type']} change"] = (
                part.get("original_max_position_embeddings") or own or positions
            )
    return limits
