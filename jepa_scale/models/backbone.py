"""One backbone for every objective: the native decoder, or any causal language model of transformers, run packed."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jepa_scale import attention
from jepa_scale.config import Section
from jepa_scale.distributed import rank
from jepa_scale.errors import InputError
from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderForCausalLM
from jepa_scale.models.lora import LoraOptions, add_lora
from jepa_scale.packing import PackedStream
from jepa_scale.say import say


class ModelOptions(Section):
    """The keys of ``model:``. ``family`` says which of them apply."""

    family: Literal["native", "huggingface"] = Field(
        "native", description="native = our own decoder; huggingface = a causal language model of transformers."
    )
    vocab_size: int | None = Field(
        None, ge=1, description="Rows of the embedding; null = as many as the data needs (or the checkpoint has)."
    )
    hidden_size: int = Field(256, ge=2, description="native: width of the residual stream.")
    intermediate_size: int | None = Field(
        None, ge=1, description="native: inner width of the SwiGLU; null = 4 * hidden_size."
    )
    num_hidden_layers: int = Field(6, ge=1, description="native: blocks.")
    num_attention_heads: int = Field(4, ge=1, description="native: query heads; divides hidden_size evenly.")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="native: key and value heads; null = num_attention_heads."
    )
    max_position_embeddings: int = Field(
        2048, ge=1, description="native: longest segment the model is meant for; recorded for export."
    )
    rope_theta: float = Field(10_000.0, gt=0, description="native: base of the rotary embedding.")
    rms_norm_eps: float = Field(1e-6, gt=0, description="native: epsilon of the norms.")
    tie_word_embeddings: bool = Field(
        False, description="native: share embedding and LM head; adds the learnable logit_scale, 1/sqrt(d) at first."
    )
    output_bias: bool = Field(False, description="native: bias in the LM head.")
    initializer_range: float = Field(0.02, gt=0, description="native: std of the initial weight matrices.")
    embedding_init_std: float | None = Field(
        None, gt=0, description="native: std of the initial embeddings; null = initializer_range."
    )
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="native: dropout after each attention and MLP branch.")
    bridge_after: int | None = Field(
        None,
        description="native: a gated bridge joins the stream after this block (negative = from the end); null = none.",
    )
    bridge_intermediate_size: int | None = Field(
        None, ge=1, description="native: inner width of the bridge; null = hidden_size."
    )
    bridge_dropout: float = Field(0.0, ge=0, lt=1, description="native: dropout inside the bridge.")
    bridge_gate_init: float = Field(-2.0, description="native: the bridge's gate before the sigmoid, at the start.")
    bridge_grad_barrier: bool = Field(
        False,
        description="native: no gradient passes the bridge; the blocks below learn from the objective's tap alone.",
    )
    config: dict[str, Any] | None = Field(
        None, description="huggingface: model_type and that family's config keys; weights start random."
    )
    pretrained: str | None = Field(None, description="huggingface: hub name or local folder to load weights from.")
    random_init: bool = Field(
        False,
        description="huggingface: of `pretrained` the architecture and the vocabulary alone; weights start random.",
    )
    cache_dir: str | None = Field(
        None, description="huggingface: folder for what `pretrained` downloads; null = that of huggingface_hub."
    )
    trust_remote_code: bool = Field(False, description="huggingface: run the model code that comes with `pretrained`.")
    lora: LoraOptions | None = Field(
        None, description="Freeze the weights and train adapters of low rank beside them; null = train everything."
    )

    def resolved(self) -> dict[str, Any]:
        """The keys of this family."""
        values = super().resolved()
        foreign = (_HUGGINGFACE_KEYS if self.family == "native" else values.keys() - _HUGGINGFACE_KEYS) - _SHARED_KEYS
        return {key: value for key, value in values.items() if key not in foreign}


class Backbone(nn.Module):
    """A decoder that runs packed streams.

    Attributes:
        decoder: the ``…ForCausalLM`` of transformers, its attention set to the packed one.
        block_class: class of a block, for sharding and activation checkpointing.
        blocks_at: dotted name of the list of blocks within the decoder.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self.blocks_at, self._norm_at = _locate(decoder)
        self.block_class = type(self.layers[0])
        decoder.set_attn_implementation(attention.NAME)

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding of the vocabulary included."""
        return self.decoder.config.vocab_size

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        blocks = self.decoder.get_submodule(self.blocks_at)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def head_name(self) -> str:
        """Dotted name of the LM head within this module."""
        head = self.decoder.get_output_embeddings()
        return next(name for name, module in self.named_modules() if module is head)

    @property
    def head_size(self) -> int:
        """Width of the states that the LM head reads; not :attr:`hidden_size` in every family."""
        return int(self.decoder.get_output_embeddings().weight.shape[1])

    def parameters_above(self, tap: int) -> Iterator[nn.Parameter]:
        """Everything after block ``tap``: a bridge that follows it or a later one, the blocks above, the final norm, and the
        head if it is not tied."""
        parts: list[nn.Module | None] = [*self.layers[tap:], self.decoder.get_submodule(self._norm_at)]
        parts += [self._bridge_above(tap), self.decoder.get_output_embeddings()]
        shared = set(self.decoder.get_input_embeddings().parameters())
        for part in parts:
            if part is not None:
                yield from (parameter for parameter in part.parameters() if parameter not in shared)

    def _bridge_above(self, tap: int) -> nn.Module | None:
        """The native decoder's bridge, if the states after block ``tap`` are made without it."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return bridge if bridge is not None and self.decoder.config.bridge_after >= tap else None

    @property
    def barrier(self) -> int:
        """Number of the last block that no gradient reaches from above; 0 if there is no such barrier."""
        config = self.decoder.config
        return config.bridge_after or 0 if getattr(config, "bridge_grad_barrier", False) else 0

    @property
    def gate(self) -> Tensor | None:
        """0-d, how far the native decoder's bridge was open in the last forward, in (0, 1); None if it has none."""
        bridge = getattr(self.decoder.base_model, "bridge", None)
        return None if bridge is None else bridge.opening

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) int64 ids → (T, d) embeddings, as :meth:`hidden` takes them."""
        return self.decoder.get_input_embeddings()(ids)

    def hidden(self, stream: PackedStream, inputs_embeds: Tensor | None = None, until: int | None = None) -> Tensor:
        """States of a packed stream.

        Args:
            stream: T tokens in segments.
            inputs_embeds: (T, d) instead of the embeddings of ``stream.input_ids``.
            until: ``None`` = all blocks and the final norm; k in 1 … L = only the first k blocks, and no final norm.

        Returns:
            (T, d).

        Raises:
            ValueError: ``until`` is outside 1 … L.
        """
        x = self.embed(stream.input_ids) if inputs_embeds is None else inputs_embeds
        return self._run(x, stream, until)

    def hidden_and_tap(
        self, stream: PackedStream, tap: int, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`hidden` (T, d), and on the way the states after block ``tap`` (T, d), before a bridge that may follow."""
        tapped: list[Tensor] = []

        def look(block: nn.Module, args: Any, output: Any) -> None:
            tapped.append(output[0] if isinstance(output, tuple) else output)

        handle = self.layers[tap - 1].register_forward_hook(look)
        try:
            hidden = self.hidden(stream, inputs_embeds)
        finally:
            handle.remove()
        return hidden, tapped[0][0]

    def forward(self, stream: PackedStream) -> Tensor:
        """As :meth:`hidden`; for whoever has no more than a module to call."""
        return self.hidden(stream)

    def lower(self, until: int | None) -> Backbone:
        """A copy of its own of the first ``until`` blocks with the embedding; its :meth:`hidden` are the states after them.

        It has no final norm and no LM head, and a bridge only where one comes before its last block; whatever is left has
        the name that it has here. ``None`` = all but the LM head.
        """
        head = self.decoder.get_output_embeddings()
        bridge = self._bridge_above(until) if until is not None else None
        with self._cut(until):
            self.decoder.set_output_embeddings(nn.Identity())
            if bridge is not None:
                self.decoder.base_model.bridge = None  # type: ignore[assignment]
            try:
                return copy.deepcopy(self)
            finally:
                self.decoder.set_output_embeddings(head)
                if bridge is not None:
                    self.decoder.base_model.bridge = bridge

    def last_hidden(self, stream: PackedStream, until: int | None = None) -> Tensor:
        """As :meth:`hidden`, (S, d): only at the last token of each segment. The native decoder then spares its last
        block the other places."""
        if not isinstance(self.decoder, JepaDecoderForCausalLM):
            return self.hidden(stream, until=until)[stream.last]
        return self._run(self.embed(stream.input_ids), stream, until, readout=stream.last)

    def _run(self, x: Tensor, stream: PackedStream, until: int | None, **extras: Any) -> Tensor:
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and (longest := max(stream.key_lengths)) > limit:
            raise ValueError(f"a segment of {longest} tokens: the model is made for {limit} (max_position_embeddings)")
        if stream.keys is not None:
            extras["packed_keys"] = stream.keys
        with self._cut(until):
            out = self.decoder.base_model(
                inputs_embeds=x[None],
                position_ids=stream.position_ids[None],
                use_cache=False,
                return_dict=True,
                packed=stream.table,
                **extras,
            )
        return out.last_hidden_state[0]

    def logits(self, rows: Tensor, frozen: bool = False) -> Tensor:
        """(n, d) states after the final norm → (n, V). n may be 0; the head's parameters take part nonetheless.

        With ``frozen`` the gradient reaches ``rows`` and not the head's own parameters.
        """
        head = self.decoder.get_output_embeddings()
        with _frozen(head) if frozen else nullcontext():
            logits = head(rows)
        config = self.decoder.config
        if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    @contextmanager
    def unpacked(self) -> Iterator[PreTrainedModel]:
        """The decoder with ordinary (batch, sequence) attention, for ``generate`` and a key-value cache."""
        self.decoder.set_attn_implementation("sdpa")
        try:
            yield self.decoder
        finally:
            self.decoder.set_attn_implementation(attention.NAME)

    @contextmanager
    def _cut(self, until: int | None) -> Iterator[None]:
        """For the duration of one call the decoder ends after block ``until``, without final norm.

        The same block modules run in the same order, so the hooks of ZeRO-3 and FSDP2 fire as ever; leaving early by
        an exception would skip some of them.
        """
        if until is None:
            yield
            return
        blocks = self.layers
        if not 1 <= until <= len(blocks):
            raise ValueError(f"until={until}: the decoder has blocks 1 … {len(blocks)}")
        norm = self.decoder.get_submodule(self._norm_at)
        self._swap(blocks[:until], nn.Identity())
        try:
            yield
        finally:
            self._swap(blocks, norm)

    def _swap(self, blocks: nn.Module, norm: nn.Module) -> None:
        for path, module in ((self.blocks_at, blocks), (self._norm_at, norm)):
            owner, _, name = path.rpartition(".")
            setattr(self.decoder.get_submodule(owner), name, module)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` see its parameters detached, those of the modules in it as well."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(_frozen_alone(part))
        yield


@contextmanager
def _frozen_alone(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` see its own parameters detached. It happens within the call, by the last hook before the forward and
    the first after it, when ZeRO-3 and FSDP2 have gathered them; what autograd saves is the gathered memory."""
    kept: dict[str, Any] = {}

    def detach(module: nn.Module, args: Any) -> None:
        kept.update(module._parameters)
        for name, parameter in kept.items():
            module._parameters[name] = None if parameter is None else parameter.detach()  # type: ignore[assignment]

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(kept)
        kept.clear()

    handles = [module.register_forward_pre_hook(detach), module.register_forward_hook(restore, prepend=True)]
    try:
        yield
    finally:
        module._parameters.update(kept)  # of a call that raised; after others, an engine may have sharded them again
        for handle in handles:
            handle.remove()


def _locate(decoder: PreTrainedModel) -> tuple[str, str]:
    """Paths of the list of blocks and of the final norm within the decoder."""
    depth = getattr(decoder.config, "num_hidden_layers", None)  # a model of several modalities has none of its own
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            owner, _, name = path.rpartition(".")
            children = dict(decoder.get_submodule(owner).named_children())
            after = list(children)[list(children).index(name) + 1 :]
            norms = [child for child in after if "norm" in type(children[child]).__name__.lower()]
            if len(norms) == 1:
                return path, f"{owner}.{norms[0]}" if owner else norms[0]
    raise InputError(
        f"model: {type(decoder).__name__} is not one stack of blocks and a final norm; choose another family"
    )


def build_backbone(options: ModelOptions, vocab_size: int, pad_vocab_to: int = 1) -> Backbone:
    """The backbone that ``options`` describe; random weights come from torch's global seed, in fp32.

    Args:
        vocab_size: ids that the data uses.
        pad_vocab_to: the embedding's rows are rounded up to a multiple of this.

    Raises:
        InputError: keys that don't fit together, a vocabulary too small, a model that is missing or can't run packed.
    """
    _check(options)
    if options.vocab_size is not None and options.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size: {options.vocab_size} is smaller than the data's {vocab_size}; raise it or leave it out"
        )
    rows = -(-(options.vocab_size or vocab_size) // pad_vocab_to) * pad_vocab_to
    known = rows  # of the embedding, that came with the weights
    if options.pretrained is not None:
        decoder, known = _load(options, vocab_size, pad_vocab_to)
    elif options.config is not None:
        decoder = _random(options.config, rows)
    else:
        decoder = _native(options, rows)
    _check_packable(decoder)
    backbone = Backbone(decoder)
    if options.lora is not None:
        add_lora(decoder, backbone.blocks_at, options.lora, known)
        if (options.pretrained is None or options.random_init) and rank() == 0:
            say("model.lora: what the adapters are added to is random, and stays so unless a checkpoint replaces it")
    return backbone


def _check_packable(decoder: PreTrainedModel) -> None:
    """Refuse what would let segments see each other, or change the scores, without an error."""
    name, config = type(decoder).__name__, decoder.config
    if not decoder._supports_attention_backend:
        raise InputError(f"model: {name} does not let its attention be replaced; it can't run packed")
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise InputError(f"model: {name} has layers of kind {sorted(other)[0]!r}, which can't run packed")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise InputError(f"model: {name} caps its attention scores (attn_logit_softcapping), which can't run packed")


_SHARED_KEYS = {"family", "vocab_size", "lora"}
_HUGGINGFACE_KEYS = {"config", "pretrained", "random_init", "cache_dir", "trust_remote_code"}


def _check(options: ModelOptions) -> None:
    """Every key that says something must be one of the family's own."""
    fields = type(options).model_fields
    given = {key for key in fields if getattr(options, key) != fields[key].default} - _SHARED_KEYS
    if options.family == "native":
        if wrong := sorted(given & _HUGGINGFACE_KEYS):
            raise InputError(f"model.{wrong[0]}: needs model.family: huggingface")
        return
    if wrong := sorted(given - _HUGGINGFACE_KEYS):
        raise InputError(f"model.{wrong[0]}: belongs to model.family: native; put it under model.config instead")
    if (options.config is None) == (options.pretrained is None):
        raise InputError("model.family: huggingface needs either model.config or model.pretrained")
    if options.trust_remote_code and options.pretrained is None:
        raise InputError("model.trust_remote_code: needs model.pretrained; the families of model.config are built in")
    if options.random_init and options.pretrained is None:
        raise InputError("model.random_init: needs model.pretrained; the weights of model.config are random as it is")
    if options.cache_dir is not None and options.pretrained is None:
        raise InputError("model.cache_dir: needs model.pretrained; nothing is downloaded for model.config")


def _native(options: ModelOptions, rows: int) -> PreTrainedModel:
    keys = options.model_dump(exclude=_SHARED_KEYS | _HUGGINGFACE_KEYS)
    try:
        config = JepaDecoderConfig(vocab_size=rows, **keys)
    except ValueError as error:  # its messages start with the key
        raise InputError(f"model.{error}") from None
    return JepaDecoderForCausalLM(config)


def _random(keys: dict[str, Any], rows: int) -> PreTrainedModel:
    keys = dict(keys)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise InputError("model.config.model_type: required key is missing (gpt2, llama, qwen3, …)")
    if "vocab_size" in keys:
        raise InputError("model.config.vocab_size: set model.vocab_size instead")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"model.config.model_type: transformers has no {model_type!r}{hint}")
    _check_keys(CONFIG_MAPPING[model_type], keys)
    # the family's default special tokens mean nothing in our vocabulary; a padding id would even freeze its embedding
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        config = AutoConfig.for_model(model_type, **{**tokens, **keys}, vocab_size=rows)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model.config: {_one_line(error)}") from None


def _check_keys(cls: type[PreTrainedConfig], keys: dict[str, Any]) -> None:
    """transformers takes any key silently; a misspelt one must be an error."""
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map, "rope_theta", "rope_scaling"}
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see the family's config class in transformers"
            raise InputError(f"model.config.{key}: unknown key of {cls.__name__}; {hint}")


def _load(options: ModelOptions, vocab_size: int, pad_vocab_to: int) -> tuple[PreTrainedModel, int]:
    """The decoder, and the rows that its embedding had in ``pretrained``."""
    assert options.pretrained is not None
    from_hub: Any = {"trust_remote_code": options.trust_remote_code, "cache_dir": options.cache_dir}
    try:
        if options.random_init:
            config = AutoConfig.from_pretrained(options.pretrained, **from_hub)
        else:
            decoder = AutoModelForCausalLM.from_pretrained(options.pretrained, dtype=torch.float32, **from_hub)
            config = decoder.config
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.pretrained: can't load {options.pretrained!r}: {_one_line(error)}") from None
    has = config.get_text_config().vocab_size
    if options.vocab_size is not None and options.vocab_size < has:
        raise InputError(f"model.vocab_size: {options.vocab_size} is smaller than the checkpoint's {has}; leave it out")
    needed = max(vocab_size, options.vocab_size or 0, has)
    if options.random_init:
        config.get_text_config().vocab_size = -(-needed // pad_vocab_to) * pad_vocab_to
        return _from_config(config, options), has
    if needed > has or has % pad_vocab_to:  # new rows start near the mean of the trained ones
        decoder.resize_token_embeddings(needed, pad_to_multiple_of=pad_vocab_to)
    return decoder, has


def _from_config(config: PreTrainedConfig, options: ModelOptions) -> PreTrainedModel:
    """Of the architecture of ``pretrained``, with random weights."""
    try:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=options.trust_remote_code, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.pretrained: can't build {options.pretrained!r}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
