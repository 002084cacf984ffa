"""A LoRA adapter of peft → the adapters of a run, on top of the model that ``model.pretrained`` names."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from jepa_scale.convert.adapter import CONFIG_FILE, OF_PEFT, TOKEN_ROWS, WEIGHTS_FILE
from jepa_scale.models.lora import ADAPTER, NEW_OF
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import read_json

logger = logging.getLogger(__name__)

_OTHER_COMPUTATION = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "target_parameters",
)
_INIT_OF_ADAPTERS = ("gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is; others, such as pissa, change its weights."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter alone, as ``PeftModel.save_pretrained`` writes it."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


@torch.no_grad()
def load_adapter(decoder: PreTrainedModel, folder: Path, options: ModelOptions) -> int:
    """Give a decoder with adapters those of a folder, in place, and return the number of tensors.

    Args:
        decoder: the run's decoder, whose other weights are those of ``options.pretrained``.

    Raises:
        InputError: the adapter is of another kind than the run's, or a tensor's name or shape differs; the message names the key
            or the tensor.
    """
    _check(folder, read_json(folder / CONFIG_FILE), options)
    wanted = _tensors(decoder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise InputError(f"{folder}: has no {WEIGHTS_FILE}; save the adapter with peft's save_pretrained")
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            if missing := wanted.keys() - names:
                raise InputError(
                    f"{file}: has no {min(missing)}, which the run's model.lora adapts; {_targets_of(folder)}"
                )
            if unknown := names - wanted.keys():
                raise InputError(
                    f"{file}: has {min(unknown)}, which the run's model.lora does not adapt; {_targets_of(folder)}"
                )
            for name, tensor in wanted.items():
                theirs = tensors.get_tensor(name)
                if theirs.shape != tensor.shape:
                    raise InputError(
                        f"{file}: {name} has shape {tuple(theirs.shape)}, the run's model has {tuple(tensor.shape)}; give the base "
                        "that the adapter was trained on as model.pretrained, and its tokenizer"
                    )
                tensor.copy_(theirs)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return len(wanted)


def _tensors(decoder: PreTrainedModel) -> dict[str, Tensor]:
    """Return a decoder's adapters and new rows by their names in peft's files."""
    found = {}
    for name, parameter in decoder.named_parameters():
        owner, new, _ = name.partition(NEW_OF)
        if new and name.endswith(".weight"):
            found[f"{OF_PEFT}{owner}{TOKEN_ROWS}"] = parameter.detach()
        elif f".{ADAPTER}." in name:
            found[OF_PEFT + name.replace(f".{ADAPTER}.", ".")] = parameter.detach()
    return found


def _check(folder: Path, config: dict[str, Any], options: ModelOptions) -> None:
    file, lora = folder / CONFIG_FILE, options.lora
    if lora is None or options.pretrained is None or options.random_init:
        raise InputError(
            f"{folder}: is an adapter; the run's config needs the base as model.pretrained, without random_init, and model.lora"
        )
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {config.get('peft_type')!r}; LORA alone can be read")
    for key in _OTHER_COMPUTATION:
        if config.get(key):
            raise InputError(
                f"{file}: {key}: {str(config[key])[:60]}: model.lora has no such adapters; merge the adapter into its base with peft's "
                "merge_and_unload, and convert the model"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{file}: bias: {config['bias']!r}: model.lora trains no biases; merge the adapter into its base"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _INIT_OF_ADAPTERS:
        raise InputError(
            f"{file}: init_lora_weights: {init!r}: it changes the base's weights, which are not in the file; convert the adapter with "
            "peft's path_initial_model_for_weight_conversion, or merge it into its base"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise InputError(f"{file}: r: {rank!r}, lora_alpha: {alpha!r}: must be numbers")
    if rank != lora.rank:
        raise InputError(f"{file}: r: {rank} is not the run's model.lora.rank, {lora.rank}; set model.lora.rank={rank}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isclose(scale, lora.scale, rel_tol=1e-9):
        raise InputError(
            f"{file}: lora_alpha: {alpha}: updates are scaled by {scale:g}, the run's model.lora by {lora.scale:g}; set "
            f"model.lora.alpha={scale * rank:g}"
        )
    base = config.get("base_model_name_or_path")
    if base and base != options.pretrained and Path(base).resolve() != Path(options.pretrained).resolve():
        logger.warning(
            f"{file}: was trained on {base}, and model.pretrained is {options.pretrained}; they must be the same weights"
        )


def _targets_of(folder: Path) -> str:
    """Return the remedy where other layers are adapted than by the run."""
    targets = read_json(folder / CONFIG_FILE).get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        return f"set model.lora.targets=[{', '.join(sorted(targets))}]"
    return f"set model.lora.targets to the layers that it adapts (target_modules: {targets!r})"
