"""The keys of the config section ``model:``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jepa_scale.config.schema import Section
from jepa_scale.config.values import LocalPath, PlainMapping
from jepa_scale.utils.errors import InputError

SHARED_KEYS = {"family", "vocab_size", "lora"}
HUGGINGFACE_KEYS = {
    "config",
    "packing",
    "pretrained",
    "random_init",
    "cache_dir",
    "trust_remote_code",
    "load_in_4bit",
    "allow_missing",
    "allow_unexpected",
}


class LoraOptions(Section):
    """The keys of ``model.lora:``."""

    rank: int = Field(16, ge=1, description="Rank r of the update B·A of each matrix.")
    alpha: float | None = Field(
        None, gt=0, description="Numerator of the update's scale alpha / rank; null = 2 * rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability of A's input.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Name endings of the linear layers to adapt, e.g. [q_proj, v_proj]; null = all layers in the blocks.",
    )
    new_ids_from: int | None = Field(
        None,
        ge=1,
        description="First new token id; the rows of the embedding and the LM head from it on are trained. null = the ids "
        "that the checkpoint lacks. Set it if the checkpoint has spare rows that no token has used.",
    )

    @property
    def scale(self) -> float:
        """Factor of the update B·A."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


class ModelOptions(Section):
    """The keys of ``model:``; ``family`` selects the ones that apply."""

    family: Literal["native", "huggingface"] = Field(
        "native", description="native = the native decoder; huggingface = a causal language model of transformers."
    )
    vocab_size: int | None = Field(
        None, ge=1, description="Number of embedding rows; null = as many as the data needs (or the checkpoint has)."
    )
    hidden_size: int = Field(256, ge=2, description="native: width of the residual stream.")
    intermediate_size: int | None = Field(
        None, ge=1, description="native: inner width of the SwiGLU; null = 4 * hidden_size."
    )
    num_hidden_layers: int = Field(6, ge=1, description="native: number of blocks.")
    num_attention_heads: int = Field(
        4, ge=1, description="native: number of query heads; hidden_size must be an even multiple of it."
    )
    num_key_value_heads: int | None = Field(
        None, ge=1, description="native: number of key and value heads; null = num_attention_heads."
    )
    max_position_embeddings: int = Field(
        2048, ge=1, description="native: most tokens of a segment, its prefix included; written to exported models."
    )
    rope_theta: float = Field(10_000.0, gt=0, description="native: base of the rotary embedding.")
    rms_norm_eps: float = Field(1e-6, gt=0, description="native: epsilon of the norms.")
    tie_word_embeddings: bool = Field(
        False, description="native: share embedding and LM head; adds the learnable logit_scale, initially 1/sqrt(d)."
    )
    output_bias: bool = Field(False, description="native: whether the LM head has a bias.")
    initializer_range: float = Field(
        0.02, gt=0, description="native: standard deviation of the initial weight matrices."
    )
    embedding_init_std: float | None = Field(
        None, gt=0, description="native: standard deviation of the initial embeddings; null = initializer_range."
    )
    position_embedding: Literal["rope", "pope"] = Field(
        "rope",
        description="native: rope = rotary; pope = polar (arXiv 2509.10534): angles depend on the position only, lengths "
        "on the content only. With pope, queries and keys are twice as wide in attention; rope_theta is its base too.",
    )
    embedding_norm: bool = Field(
        False, description="native: RMSNorm after the embedding, with an initial gain of embedding_init_std."
    )
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="native: dropout probability after each attention and MLP branch."
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="native: stochastic depth: probability with which a segment skips a branch of the last block; over the "
        "blocks it increases linearly from 0 in the first.",
    )
    bridge_after: int | None = Field(
        None,
        description="native: block after which a gated bridge is added (from 1; negative = from the end); null = none.",
    )
    bridge_intermediate_size: int | None = Field(
        None, ge=1, description="native: inner width of the bridge; null = hidden_size."
    )
    bridge_dropout: float = Field(0.0, ge=0, lt=1, description="native: dropout probability inside the bridge.")
    bridge_gate_init: float = Field(-2.0, description="native: initial value of the bridge's gate, before the sigmoid.")
    bridge_grad_barrier: bool = Field(
        False,
        description="native: stop-gradient layer at the bridge: the blocks below learn from the objective's tap only.",
    )
    config: PlainMapping | None = Field(
        None, description="huggingface: model_type and that family's config keys; the initial weights are random."
    )
    pretrained: LocalPath | None = Field(
        None, description="huggingface: hub name or local folder to load weights from."
    )
    packing: Literal["packed", "padded"] = Field(
        "packed",
        description="huggingface: packed = segments lie end to end; padded = each is a row of an ordinary batch, for families that "
        "cannot run packed, as recurrences and convolutions without kernels for it.",
    )
    random_init: bool = Field(
        False,
        description="huggingface: use only the architecture and vocabulary of `pretrained`, with random initial weights.",
    )
    cache_dir: LocalPath | None = Field(
        None, description="huggingface: folder for the downloads of `pretrained`; null = that of huggingface_hub."
    )
    allow_missing: list[str] = Field(
        [],
        description="huggingface: prefixes of tensors that the files of `pretrained` may lack; they get random initial values. "
        "Any other tensor that is missing is refused.",
    )
    allow_unexpected: list[str] = Field(
        [],
        description="huggingface: prefixes of tensors in the files of `pretrained` that the model does not have; they are not "
        "loaded. Any other such tensor is refused.",
    )
    trust_remote_code: bool = Field(False, description="huggingface: run the model code that comes with `pretrained`.")
    load_in_4bit: bool = Field(
        False,
        description="huggingface: hold the frozen matrices of the blocks in 4 bits (NF4, double quantisation) under the adapters of "
        "`lora`; needs bitsandbytes.",
    )
    lora: LoraOptions | None = Field(
        None, description="Freeze the weights and train low-rank adapters; null = train all weights."
    )

    def resolved(self) -> dict[str, Any]:
        """Return the keys of this family with their values."""
        values = super().resolved()
        foreign = (HUGGINGFACE_KEYS if self.family == "native" else values.keys() - HUGGINGFACE_KEYS) - SHARED_KEYS
        return {key: value for key, value in values.items() if key not in foreign}


def check_options(options: ModelOptions) -> None:
    """Check that every key with another value than its default belongs to the family.

    Raises:
        InputError: a key belongs to the other family, or needs another key.
    """
    fields = type(options).model_fields
    given = {key for key in fields if getattr(options, key) != fields[key].default} - SHARED_KEYS
    if options.family == "native":
        if wrong := sorted(given & HUGGINGFACE_KEYS):
            raise InputError(f"model.{wrong[0]}: needs model.family: huggingface; set that or remove the key")
        return
    if wrong := sorted(given - HUGGINGFACE_KEYS):
        raise InputError(f"model.{wrong[0]}: belongs to model.family: native; put it under model.config instead")
    if (options.config is None) == (options.pretrained is None):
        raise InputError("model.family: huggingface needs either model.config or model.pretrained; set one of them")
    if options.load_in_4bit:
        if options.lora is None:
            raise InputError(
                "model.load_in_4bit: needs model.lora, as codes cannot be trained; set it, or remove the key"
            )
        if options.pretrained is None or options.random_init:
            raise InputError("model.load_in_4bit: needs the weights of model.pretrained; set it, or remove the key")
        if options.allow_missing:
            raise InputError(
                "model.allow_missing: random weights cannot be quantised with model.load_in_4bit, as no checkpoint has them; give complete "
                "weights, or remove one of the keys"
            )
    for key in ("allow_missing", "allow_unexpected"):
        prefixes = getattr(options, key)
        if prefixes and (options.pretrained is None or options.random_init):
            raise InputError(f"model.{key}: needs the weights of model.pretrained; remove it, as none are loaded")
        if "" in prefixes:
            raise InputError(f"model.{key}: has an empty prefix, which every name begins with; name the tensors")
    if options.trust_remote_code and options.pretrained is None:
        raise InputError(
            "model.trust_remote_code: needs model.pretrained; remove it, as model.config runs no such code"
        )
    if options.random_init and options.pretrained is None:
        raise InputError("model.random_init: needs model.pretrained; remove it, as weights of model.config are random")
    if options.cache_dir is not None and options.pretrained is None:
        raise InputError("model.cache_dir: needs model.pretrained; remove it, as model.config downloads nothing")
