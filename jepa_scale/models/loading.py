"""From the keys of ``model:`` to a backbone: the native decoder, or any causal language model of transformers."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from jepa_scale.distributed.comm import rank
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM
from jepa_scale.models.families.files import ADAPTER, WEIGHTS, check_folder, check_quantisation
from jepa_scale.models.families.neighbours import reads_neighbours
from jepa_scale.models.families.probe import way_out
from jepa_scale.models.families.router_loss import coefficient_of
from jepa_scale.models.lora import add_lora
from jepa_scale.models.options import HUGGINGFACE_KEYS, SHARED_KEYS, ModelOptions, check_options
from jepa_scale.utils.errors import InputError, one_line, suggestion
from jepa_scale.utils.file_names import shards_of

logger = logging.getLogger(__name__)


def build_backbone(options: ModelOptions, vocab_size: int, pad_vocab_to: int = 1) -> Backbone:
    """Build the backbone of ``options``, in fp32. Random weights come from torch's global seed.

    Args:
        vocab_size: number of ids in the data.
        pad_vocab_to: the number of embedding rows is rounded up to a multiple of this.

    Raises:
        InputError: keys exclude each other, the vocabulary is too small, or the model is missing or cannot run packed.
    """
    check_options(options)
    if options.vocab_size is not None and options.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size: {options.vocab_size} is smaller than the data's {vocab_size}; raise it or leave it out"
        )
    rows = -(-(options.vocab_size or vocab_size) // pad_vocab_to) * pad_vocab_to
    known = rows  # number of embedding rows that came with the weights
    if options.pretrained is not None:
        decoder, known = _load(options, vocab_size, pad_vocab_to)
    elif options.config is not None:
        decoder = _random(options.config, rows)
    else:
        decoder = _native(options, rows)
    config: Any = decoder.config
    per_layer: Any = getattr(config, "vocab_size_per_layer_input", None)  # Gemma 4
    if getattr(config, "hidden_size_per_layer_input", 0) and per_layer < vocab_size:
        raise InputError(
            f"model: {type(decoder).__name__} has embeddings of each layer for {per_layer} token ids "
            f"(vocab_size_per_layer_input), and the data have {vocab_size}; use data of its own tokenizer, or raise the key if the "
            "model is a new one"
        )
    padded = options.packing == "padded"
    if not padded:
        check_packable(decoder)
    backbone = Backbone(decoder, padded)
    coefficient = coefficient_of(decoder)
    if coefficient and backbone.router_loss is None and rank() == 0:
        logger.info(
            f"model: output_router_logits is false in the config, so the routers' balance loss (coefficient {coefficient:g}) is not "
            "trained, as in transformers"
        )
    if options.lora is not None:
        add_lora(decoder, backbone.blocks_at, options.lora, known)
        if (options.pretrained is None or options.random_init) and rank() == 0:
            logger.warning(
                "model.lora: the weights under the adapters are random and frozen; load pretrained weights or a checkpoint"
            )
    return backbone


def check_packable(decoder: PreTrainedModel) -> None:
    """Raise InputError if the decoder's attention would, silently, cross segments or compute other scores.

    Layers that read neighbouring tokens are left to the probe: whether they keep segments apart depends on installed kernels.
    """
    if reads_neighbours(decoder):
        return
    other = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not decoder._supports_attention_backend:
        reason = "does not support another attention, so it cannot run packed"
    elif other:
        reason = f"has layers of kind {sorted(other)[0]!r}, which cannot run packed"
    else:
        return
    raise InputError(f"model: {type(decoder).__name__} {reason}; {way_out(decoder)}")


def _native(options: ModelOptions, rows: int) -> PreTrainedModel:
    keys = options.model_dump(exclude=SHARED_KEYS | HUGGINGFACE_KEYS)
    try:
        config = JepaDecoderConfig(vocab_size=rows, **keys)
    except ValueError as error:  # its messages start with the key
        raise InputError(f"model.{error}") from None
    return JepaDecoderForCausalLM(config)


def _random(keys: dict[str, Any], rows: int) -> PreTrainedModel:
    keys = dict(keys)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise InputError("model.config.model_type: required key is missing; set it (gpt2, llama, qwen3, …)")
    if "vocab_size" in keys:
        raise InputError("model.config.vocab_size: is not allowed here; set model.vocab_size instead")
    if model_type not in CONFIG_MAPPING:
        hint = suggestion(str(model_type), CONFIG_MAPPING.keys(), "use one of its causal language models")
        raise InputError(f"model.config.model_type: transformers has no {model_type!r}; {hint}")
    _check_keys(CONFIG_MAPPING[model_type], keys)
    # the family's default special tokens have no meaning in the data's vocabulary; a padding id would freeze an embedding
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        config = AutoConfig.for_model(model_type, **{**tokens, **keys}, vocab_size=rows)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {one_line(error)}") from None


def _check_keys(cls: type[PreTrainedConfig], keys: dict[str, Any]) -> None:
    """Raise InputError for an unknown key, which transformers would accept silently."""
    known = known_keys(cls)
    for key in keys:
        if key not in known:
            hint = suggestion(key, known, "see the family's config class in transformers")
            raise InputError(f"model.config.{key}: unknown key of {cls.__name__}; {hint}")


def known_keys(cls: type[PreTrainedConfig]) -> frozenset[str]:
    """Return the keys of a family's config: those that its class takes, by present and former names, those that it writes to
    ``config.json``, and those that the model's code reads (some are in no class, as ``head_dim`` of Qwen3-MoE)."""
    written = cls().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    own = inspect.getsource(cls)  # former names, which it takes from its keywords
    former = set(re.findall(r"""kwargs\.(?:pop|get)\(["'](\w+)["']""", own))
    taken = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
    read: set[str] = set()
    with suppress(OSError):  # the code is read and not run
        file = Path(inspect.getfile(cls))
        code = file.with_name(file.name.replace("configuration_", "modeling_")).read_text(encoding="utf-8")
        read = {a or b for a, b in re.findall(r"""\bconfig\.([a-z]\w*)\b(?!\()|\bconfig, ["'](\w+)["']""", code)}
    read -= vars(PreTrainedConfig).keys()  # methods, and settings of a call
    return frozenset({*taken, *former, *cls.attribute_map, *written, *read, "rope_theta", "rope_scaling"})


def check_pretrained(options: ModelOptions, weights: bool = True) -> None:
    """Check the files of ``pretrained`` if it is a local folder, without loading them.

    Args:
        weights: whether its weights are needed, too, unless ``random_init`` says that they are not.

    Raises:
        InputError: they are not those of a whole model that can be trained.
    """
    if options.pretrained is not None and Path(options.pretrained).is_dir():
        try:
            check_folder(Path(options.pretrained), weights=weights and not options.random_init)
        except InputError as error:
            raise InputError(f"model.pretrained: {error}") from None


def pretrained_vocab_size(options: ModelOptions) -> int:
    """Return the number of embedding rows in the ``config.json`` of ``pretrained``.

    Raises:
        InputError: it cannot be read.
    """
    assert options.pretrained is not None
    with _refused(options.pretrained):
        config = AutoConfig.from_pretrained(
            options.pretrained, trust_remote_code=options.trust_remote_code, cache_dir=options.cache_dir
        )
    return int(config.get_text_config().vocab_size)


def _load(options: ModelOptions, vocab_size: int, pad_vocab_to: int) -> tuple[PreTrainedModel, int]:
    """Load the decoder, and return it with the number of embedding rows in ``pretrained``. On the ``meta`` device only its
    config and generation config are read."""
    assert options.pretrained is not None
    random = options.random_init or torch.get_default_device().type == "meta"
    from_hub: Any = {"trust_remote_code": options.trust_remote_code, "cache_dir": options.cache_dir}
    check_pretrained(options, weights=not random)
    if not Path(options.pretrained).is_dir():
        try:
            _check_named(options)
        except InputError as error:
            raise InputError(f"model.pretrained: {error}") from None
    with _refused(options.pretrained):
        config = AutoConfig.from_pretrained(options.pretrained, **from_hub)
        if not options.random_init:
            check_quantisation(config.to_dict(), f"model.pretrained: {options.pretrained!r}")
    if random:
        vars(config).pop("quantization_config", None)  # of the weights that are not used; an export must not name it
    else:
        decoder = _load_weights(options, from_hub)
        config = decoder.config
    has = config.get_text_config().vocab_size
    if options.vocab_size is not None and options.vocab_size < has:
        raise InputError(f"model.vocab_size: {options.vocab_size} is smaller than the checkpoint's {has}; leave it out")
    needed = max(vocab_size, options.vocab_size or 0, has)
    if random:
        config.get_text_config().vocab_size = -(-needed // pad_vocab_to) * pad_vocab_to
        made = _from_config(config, options)
        if not options.random_init:
            with suppress(OSError):  # a model may have none
                made.generation_config = GenerationConfig.from_pretrained(
                    options.pretrained, cache_dir=options.cache_dir
                )
        return made, has
    if needed > has or has % pad_vocab_to:  # new rows start near the mean of the trained ones
        decoder.resize_token_embeddings(needed, pad_to_multiple_of=pad_vocab_to)
    return decoder, has


def _check_named(options: ModelOptions) -> None:
    """Check the small files of a model on the hub that name others, before its weights are downloaded."""
    model = options.pretrained
    assert model is not None

    def file(name: str) -> str | None:
        with suppress(OSError):
            return cached_file(model, name, cache_dir=options.cache_dir, _raise_exceptions_for_missing_entries=False)
        return None

    if (adapter := file(ADAPTER)) is not None:
        check_folder(Path(adapter).parent)
    for name in WEIGHTS:
        if name.endswith(".index.json") and not options.random_init and (index := file(name)) is not None:
            shards_of(Path(index))


def _load_weights(options: ModelOptions, from_hub: Any) -> PreTrainedModel:
    """Load a decoder whose weights are all in the files, and the files' tensors all in the decoder.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; the message names it.
    """
    assert options.pretrained is not None
    with _refused(options.pretrained):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.pretrained,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **from_hub,
        )
    decoder: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        raise InputError(
            f"model.pretrained: {options.pretrained!r}: {name} has shape {tuple(theirs)}, {type(decoder).__name__} needs "
            f"{tuple(ours)}; correct config.json, or give the weights that belong to it"
        )
    for what, names, allowed, key in (
        ("lacks", info["missing_keys"], options.allow_missing, "allow_missing"),
        ("has, unknown to the model,", info["unexpected_keys"], options.allow_unexpected, "allow_unexpected"),
    ):
        accepted = {name for name in names if name.startswith(tuple(allowed))}
        if refused := set(names) - accepted:
            raise InputError(
                f"model.pretrained: {options.pretrained!r} {what} {listed(refused)} of {type(decoder).__name__}; give complete "
                f"weights of this architecture, or allow it by prefixes in model.{key}"
            )
        if accepted:
            fate = "drawn at random" if key == "allow_missing" else "not loaded"
            logger.warning(f"model.{key}: {listed(accepted)}: {fate}")
    return decoder


def listed(names: Iterable[str]) -> str:
    """Return the first three names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn whatever transformers raises for unusable files of ``model.pretrained`` into an InputError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # OSError, ValueError, KeyError, ImportError, SafetensorError, UnpicklingError …
        raise InputError(f"model.pretrained: can't load {name!r}: {one_line(error)}") from error


def _from_config(config: PreTrainedConfig, options: ModelOptions) -> PreTrainedModel:
    """Build a decoder with the architecture of ``pretrained`` and random weights."""
    assert options.pretrained is not None
    with _refused(options.pretrained):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=options.trust_remote_code, dtype=torch.float32
        )
