"""The base of a LoRA run: the frozen weights that ``model.pretrained`` holds, which a checkpoint names and does not keep.

A checkpoint without them has their hash. It is a hash of the values as they are loaded, so that it depends neither on the
names of the files nor on how the tensors are distributed over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jepa_scale.models.lora import BASE_OF
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

STATE = "base"
"""Key of a base in the state of a checkpoint's manifest."""


@dataclass(frozen=True, slots=True)
class Base:
    """Frozen weights that can be read again.

    Attributes:
        name: ``model.pretrained``. sha256: of the weights.
        tensors: their names in the decoder, a tied one under each of its names.
    """

    name: str
    sha256: str
    tensors: frozenset[str]

    def state(self) -> dict[str, dict[str, str]]:
        """Return what a manifest keeps, as a part of its state."""
        return {STATE: {"name": self.name, "sha256": self.sha256}}


def base_of(decoder: PreTrainedModel, options: ModelOptions) -> Base | None:
    """Return the base of a decoder as it was built, in host memory; None if its frozen weights cannot be read again.

    That is so without LoRA, and where the weights under the adapters are random.
    """
    names = readable(decoder, options)
    if not names:
        return None
    assert options.pretrained is not None
    tensors = {name: tensor for name, tensor in decoder.named_parameters() if name in names}
    return Base(options.pretrained, _sha256(tensors), names)


def readable(decoder: PreTrainedModel, options: ModelOptions) -> frozenset[str]:
    """Return the names of the frozen parameters that are in the files of ``model.pretrained``; the decoder may be on ``meta``."""
    if options.lora is None or options.pretrained is None or options.random_init:
        return frozenset()
    drawn = tuple(options.allow_missing)  # prefixes of what the files may lack
    every = decoder.named_parameters(remove_duplicate=False)
    return frozenset(n for n, p in every if not p.requires_grad and not n.replace(BASE_OF, ".").startswith(drawn))


def confirmed(base: Base | None, state: Mapping[str, Any], checkpoint: Path) -> Base | None:
    """Compare the base that was read with that of a checkpoint; return it, or None if the checkpoint holds the weights itself.

    Args:
        state: of the checkpoint's manifest.

    Raises:
        InputError: the checkpoint needs its base, and there is none, or it has other weights.
    """
    saved = state.get(STATE)
    if saved is None:
        return None
    if base is None:
        raise InputError(
            f"{checkpoint}: holds adapters, without the frozen weights of {saved['name']!r}; set model.pretrained to it, and model.lora "
            "as in the run"
        )
    if base.sha256 != saved["sha256"]:
        raise InputError(
            f"model.pretrained: the weights of {base.name!r} are not those of {saved['name']!r} that the adapters of {checkpoint} were "
            f"trained on (sha256 {base.sha256[:12]}…, then {saved['sha256'][:12]}…); give a copy of the model as it was"
        )
    return base


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, shapes and values; each tensor is hashed by itself, up to four at a time."""

    def one(name: str) -> str:
        tensor = tensors[name].detach()
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{name.replace(BASE_OF, '.')} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}\n"

    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(one, tensors))
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
