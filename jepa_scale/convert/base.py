"""The frozen weights that a LoRA run's checkpoint leaves out, read again from ``model.pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_scale.convert.merge import Shapes
from jepa_scale.convert.plan import MODEL
from jepa_scale.convert.skeleton import PREFIX
from jepa_scale.models.frozen.base import STATE, base_of, confirmed, readable
from jepa_scale.models.loading import build_backbone, pretrained_vocab_size
from jepa_scale.models.lora import NEW_OF
from jepa_scale.models.options import ModelOptions


def left_out(
    options: ModelOptions, shapes: Shapes, state: Mapping[str, Any], checkpoint: Path, values: bool
) -> dict[str, Tensor]:
    """Return the tensors of a run's model that its checkpoint leaves out, by their names in a checkpoint, in fp32.

    Args:
        options: the run's section ``model:``. shapes: of the checkpoint's tensors.
        state: of its manifest.
        values: whether to read the weights; otherwise the tensors are on ``meta``.

    Raises:
        InputError: the base cannot be read, or has other weights than those that the adapters were trained on.
    """
    if STATE not in state or options.lora is None:
        return {}
    if options.pretrained is None or options.random_init:
        confirmed(None, state, checkpoint)  # it raises
    with torch.random.fork_rng(devices=[]), nullcontext() if values else torch.device("meta"):
        decoder = build_backbone(options, _rows(options, shapes)).decoder
    names = readable(decoder, options)
    if values:
        confirmed(base_of(decoder, options), state, checkpoint)
    return {f"{MODEL}{PREFIX}{name}": p.detach() for name, p in decoder.named_parameters() if name in names}


def _rows(options: ModelOptions, shapes: Shapes) -> int:
    """Return the number of embedding rows of the run's model: those that are frozen, and the trained ones of the checkpoint."""
    new = [size for name, (size, _) in shapes.items() if name.startswith(MODEL) and name.endswith(f"{NEW_OF}weight")]
    assert options.lora is not None
    known = pretrained_vocab_size(options)
    return (options.lora.new_ids_from or known) + new[0][0] if new else known
