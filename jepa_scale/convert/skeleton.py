"""The exported model of a run without its weights: class, config and tensor names, on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from jepa_scale.convert.standalone import auto_map, modelling_source
from jepa_scale.engines.base import persistent_buffers
from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM, JepaDecoderPreTrainedModel
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import DECODER
from jepa_scale.utils.errors import InputError, one_line

PREFIX = DECODER
_PLACEHOLDER_ROWS = 1 << 20
"""Placeholder for the number of embedding rows, until it is read from the checkpoint."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Exported model on the meta device.

    Attributes:
        model: the model on the meta device, of the class that the exported files name.
        code: source files that the export needs: name → text.
        prefix: of the model's parameters in the root module of a run.
    """

    model: PreTrainedModel
    code: Mapping[str, str] = field(default_factory=dict)
    prefix: str = PREFIX

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return int(cast(Tensor, self.model.get_input_embeddings().weight).shape[0])

    def config(self, dtype: torch.dtype, special: Mapping[str, int]) -> PreTrainedConfig:
        """Return the config for ``config.json``.

        Args:
            special: ids ``bos``, ``eos``, ``pad`` of the data; for missing ones the model's stay.
        """
        config = copy.deepcopy(self.model.config)
        config.architectures = [self.class_name]
        config.dtype = dtype
        for name in ("bos", "eos", "pad"):
            own = getattr(config, f"{name}_token_id", None)
            if name in special and isinstance(own, list) and special[name] in own:
                continue  # a pretrained model that stops at several tokens
            # not pad = eos: a padding token's embedding gets no gradient, but EOS needs one
            if name in special and not (name == "pad" and special["pad"] == special.get("eos")):
                setattr(config, f"{name}_token_id", special[name])
        if isinstance(self.model, JepaDecoderPreTrainedModel):
            config.auto_map = auto_map()
        return config

    def without_head(self) -> Skeleton:
        """Return the model without its LM head: the class that ``AutoModel`` loads, whose outputs are states.

        Raises:
            InputError: ``AutoModel`` has no class for this family, or another one.
        """
        base = cast(PreTrainedModel, self.model.base_model)
        try:
            with torch.device("meta"):
                loaded = type(AutoModel.from_config(self.model.config, trust_remote_code=bool(self.code)))
        except ValueError:  # no class is registered, or its own code names none
            loaded = None
        if base is self.model or loaded is not type(base):
            raise InputError(
                f"model: AutoModel of transformers has no class for the states of a {self.class_name}; use --to hf"
            )
        name = next(name for name, module in self.model.named_modules() if module is base)
        return replace(self, model=base, prefix=f"{self.prefix}{name}.")

    def generation_config(self, special: Mapping[str, int], options: ModelOptions | None = None) -> GenerationConfig:
        """Return the config for ``generation_config.json``. Generation stops at EOS, for chats at the end of an answer, and where
        the pretrained model's does."""
        try:
            if options is None or options.pretrained is None:
                raise OSError
            config = GenerationConfig.from_pretrained(options.pretrained, cache_dir=options.cache_dir)
        except OSError:  # there is no pretrained model, or it has no generation config
            config = GenerationConfig.from_model_config(self.config(torch.float32, special))
        own = config.eos_token_id
        stops = [special[name] for name in ("eos", "end") if name in special]
        stops += own if isinstance(own, list) else [] if own is None else [own]
        if stops := list(dict.fromkeys(stops)):
            config.eos_token_id = stops if len(stops) > 1 else stops[0]
        for name in ("bos", "pad"):
            if name in special:
                setattr(config, f"{name}_token_id", special[name])
        return config


def make_skeleton(options: ModelOptions, shapes: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """Build the exported model of a run.

    Args:
        options: the run's section ``model:``. shapes: shapes of the checkpoint's tensors, by name in the root module. They
            give the vocabulary size, so the data are not needed.

    Raises:
        InputError: the checkpoint is of another model.
    """
    model, code = _build(options, _PLACEHOLDER_ROWS)
    embedding = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    if PREFIX + name not in shapes:
        raise InputError(f"the checkpoint has no tensor {PREFIX + name}; it is not of the model in config.yaml")
    model, code = _build(options, shapes[PREFIX + name][0])
    _check(model, {n.removeprefix(PREFIX): s for n, s in shapes.items() if n.startswith(PREFIX)})
    if isinstance(model, JepaDecoderForCausalLM):
        assert isinstance(model.config, JepaDecoderConfig)
        config = llama_config(model.config)
        if config is None:
            return Skeleton(model, modelling_source())
        names = {n: tuple(p.shape) for n, p in model.named_parameters()}
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert names == {n: tuple(p.shape) for n, p in model.named_parameters()}
    return Skeleton(model, code)


def _build(options: ModelOptions, rows: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """Build the run's decoder with ``rows`` embedding rows; return it, and the source files of remote code."""
    if options.pretrained is None:
        with torch.device("meta"):
            plain = options.model_copy(update={"vocab_size": rows, "lora": None})
            return build_backbone(plain, rows).decoder, {}
    trust = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(options.pretrained, trust_remote_code=trust, cache_dir=options.cache_dir)
        config.get_text_config().vocab_size = rows
        vars(config).pop("quantization_config", None)  # of weights that a run with random_init has not used
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.pretrained: cannot load the config of {options.pretrained!r}: {one_line(error)}"
        ) from None
    return model, _remote_code(model)


def _remote_code(model: PreTrainedModel) -> dict[str, str]:
    """Return the source files of a model whose code came with ``pretrained``, by name. Its config names them afterwards."""
    if getattr(model, "_auto_class", None) is None:
        return {}
    import tempfile
    from pathlib import Path

    from transformers.dynamic_module_utils import custom_object_save

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(file) for file in custom_object_save(model, folder)]
        return {file.name: file.read_text(encoding="utf-8") for file in files}


def _check(model: PreTrainedModel, there: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the checkpoint has the model's tensors, in their shapes, and no others."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model)}
    for problem, names in (
        ("has no tensor", wanted.keys() - there.keys()),
        ("has a tensor that the model lacks,", there.keys() - wanted.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            raise InputError(
                f"the checkpoint {problem} {PREFIX}{min(names)}{more}; it is not of the model in config.yaml"
            )
    for name, shape in wanted.items():
        if there[name] != shape:
            raise InputError(
                f"the checkpoint's {PREFIX}{name} has shape {there[name]}, the model in config.yaml {shape}; "
                "it is of another model"
            )


def llama_config(config: JepaDecoderConfig) -> LlamaConfig | None:
    """Return the config of a Llama that computes the same as the native decoder, or None if a Llama cannot: with tied weights
    (which have ``logit_scale``), a bias in the head, PoPE, a norm of the embedding, or a bridge. Dropout and DropPath are
    ignored, because they only affect training."""
    own = config.position_embedding != "rope" or config.embedding_norm or config.bridge_after is not None
    if config.tie_word_embeddings or config.output_bias or own:
        return None
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    same: dict[str, Any] = {name: getattr(config, name) for name in names}
    return LlamaConfig(
        **same,
        head_dim=config.head_dim,
        hidden_act="silu",
        rope_parameters=dict(config.rope_parameters),
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )
