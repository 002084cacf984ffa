"""Export of a run's adapters without its model. ``PeftModel.from_pretrained`` loads them on top of the model that training
began with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jepa_scale.convert.merge import Shapes, Source
from jepa_scale.convert.plan import MODEL, ConversionPlan, Unit, heads_of
from jepa_scale.convert.skeleton import PREFIX
from jepa_scale.convert.tensor_file import Entry
from jepa_scale.models.head import LMHead
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OF_PEFT = "base_model.model."
"""Prefix of names in peft's wrapper."""
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""Ending of the name of new rows of an embedding or an LM head."""


def check_adapter(options: ModelOptions) -> None:
    """Check that the run's adapters can be exported without its model.

    Raises:
        InputError: the run has no adapters, or the weights under them are random.
    """
    if options.lora is None:
        raise InputError("--adapter: the run has no adapters (no model.lora); leave it out")
    if options.random_init:
        raise InputError("--adapter: the weights under the adapters are random (model.random_init); leave it out")


def adapter_plan(
    model: PreTrainedModel, sources: Mapping[str, Source], shapes: Shapes, dtype: torch.dtype, heads: bool
) -> ConversionPlan:
    """Plan one file with A and B of each adapted layer, and the new rows of the embedding.

    Args:
        model: the model without adapters, on the meta device. sources: source of each of its tensors, by name.
        shapes: shape and dtype of each tensor of the checkpoint.
    """
    units = []
    for name in model.state_dict():
        source = sources.get(MODEL + PREFIX + name)
        if source is not None:
            owner = name.rpartition(".")[0]
            theirs = dict(_names(owner, source))
            units += [_unit(made, f"{OF_PEFT}{theirs[made]}", shapes, dtype) for made in theirs]
    return ConversionPlan({WEIGHTS_FILE: units}, heads_of(shapes) if heads else [])


def _names(owner: str, source: Source) -> Iterator[tuple[str, str]]:
    """Yield the names of a source's adapter tensors in the checkpoint, and in a model that peft has wrapped."""
    for name, key in zip(source.adapter, ("lora_A", "lora_B"), strict=False):
        yield name, f"{owner}.{key}.weight"
    if source.new:
        yield source.new, f"{owner}{TOKEN_ROWS}"


def _unit(name: str, theirs: str, shapes: Shapes, dtype: torch.dtype) -> Unit:
    size, saved = shapes[name]
    return Unit(name, size.numel() * saved.itemsize, (Entry(theirs, tuple(size), dtype),), foreign=True)


def adapter_config(model: PreTrainedModel, options: ModelOptions, sources: Mapping[str, Source], shapes: Shapes) -> str:
    """Return the text of ``adapter_config.json``. ``options`` is the run's section ``model:``; the other arguments
    are those of :func:`adapter_plan`.

    Raises:
        InputError: peft cannot represent new rows of this LM head.
    """
    import peft

    assert options.lora is not None
    modules = {name: name.removeprefix(MODEL + PREFIX).rpartition(".")[0] for name in sources}
    adapted = [modules[name] for name, source in sources.items() if source.adapter]
    rows = {
        modules[name]: list(range(shapes[source.base][0][0], source.shape[0]))
        for name, source in sources.items()
        if source.new
    }
    head = model.get_output_embeddings()
    if rows and (type(head) not in (nn.Linear, LMHead) or head.bias is not None):
        raise InputError(
            "--adapter: peft has no format for new rows of an LM head with a bias or a scale; leave --adapter out"
        )
    config = peft.LoraConfig(
        r=options.lora.rank,
        lora_alpha=options.lora.scale * options.lora.rank,  # type: ignore[arg-type]  # an int is not needed
        lora_dropout=options.lora.dropout,
        target_modules=_endings(model, adapted),
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in adapted),
        trainable_token_indices=rows or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=options.pretrained,
        inference_mode=True,
    )
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _endings(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return the last parts of the names, if no other module's name ends with one of them; else the names themselves."""
    endings = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if meant == set(names) else names)
