"""Blocks of the native decoder for an objective's own stack, in the shape of the decoder's blocks."""

from __future__ import annotations

from typing import Any

from jepa_scale.models.attention.packed import NAME as PACKED
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import JepaDecoderConfig
from jepa_scale.utils.errors import InputError


def config_of_blocks(backbone: Backbone, layers: int, drop_path: bool, packed: bool = True) -> JepaDecoderConfig:
    """Return the config of ``layers`` native blocks that have the shape of the backbone's.

    From a decoder of transformers it takes the shape, the norm's epsilon, the initial deviation and the base of the rotary
    embedding, but not the dropout; the position embedding is RoPE.

    Args:
        drop_path: whether the blocks have the DropPath of a native decoder.
        packed: whether their attention is the packed one; if not, it takes a mask and a key-value cache.

    Raises:
        InputError: the native blocks can't have this shape.
    """
    theirs: Any = backbone.decoder.config
    if isinstance(theirs, JepaDecoderConfig):
        names = (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "initializer_range",
            "embedding_init_std",
            "position_embedding",
            "hidden_dropout",
            "drop_path",
        )
        keys = {name: getattr(theirs, name) for name in names}
        keys["rope_theta"] = theirs.rope_parameters["rope_theta"]
    else:
        if getattr(theirs, "num_attention_heads", None) is None:
            raise InputError(
                f"objective: its own blocks are shaped like the model's blocks, and {type(backbone.decoder).__name__} has no attention "
                "heads; choose another family or objective"
            )
        rope = getattr(theirs, "rope_parameters", None) or {}
        eps = next((e for n in ("rms_norm_eps", "layer_norm_epsilon") if (e := getattr(theirs, n, None))), 1e-6)
        keys = {
            "hidden_size": backbone.hidden_size,
            "intermediate_size": getattr(theirs, "intermediate_size", None),
            "num_attention_heads": theirs.num_attention_heads,
            "num_key_value_heads": getattr(theirs, "num_key_value_heads", None),
            "rms_norm_eps": eps,
            "initializer_range": getattr(theirs, "initializer_range", 0.02),
            "rope_theta": rope.get("rope_theta", 10_000.0),
        }
    keys |= {"attn_implementation": PACKED if packed else "eager"} | ({} if drop_path else {"drop_path": 0.0})
    try:
        return JepaDecoderConfig(vocab_size=1, num_hidden_layers=layers, **keys)
    except ValueError as error:  # the message begins with the key
        raise InputError(f"objective: its own blocks can't be shaped like the model's blocks: {error}") from None
