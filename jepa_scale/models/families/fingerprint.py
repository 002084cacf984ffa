"""Everything besides the weights that decides what a backbone computes, as plain values.

Two backbones may have parameters of the same shapes and yet be different functions of them, for example with another
number of heads or another rotary base. A checkpoint keeps these values, and a run that goes on from it compares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.options import ModelOptions

IGNORED = {
    "_name_or_path",
    "architectures",
    "bridge_gate_init",
    "dtype",
    "embedding_init_std",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a decoder's config that say where it comes from, what its initial weights are, or what a call returns."""


def model_fingerprint(backbone: Backbone, options: ModelOptions) -> dict[str, Any]:
    """Return config key → value, for the keys that decide what the backbone computes.

    The keys are those of the native decoder (``model.num_attention_heads``), or of the family's own config
    (``model.config.rope_theta``), with the defaults that the family fills in. Values are those that JSON knows.
    """
    values = dict(_flat(backbone.decoder.config.to_dict()))
    if options.family == "native":  # there the base of the rotary embedding is a key of its own
        values = {f"model.{key.removeprefix('rope_parameters.')}": value for key, value in values.items()}
    else:
        values = {f"model.config.{key}": value for key, value in values.items()}
    lora = options.lora
    values["model.lora"] = None if lora is None else {"scale": lora.scale, "dropout": lora.dropout}
    if options.family == "huggingface":
        values["model.load_in_4bit"] = options.load_in_4bit
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a config and of the configs in it, without those that make no difference."""
    for key, value in config.items():
        if key in IGNORED:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
