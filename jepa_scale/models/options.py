"""The keys of ``model:``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jepa_scale.config.schema import Section
from jepa_scale.utils.errors import InputError

SHARED_KEYS = {"family", "vocab_size", "lora"}
HUGGINGFACE_KEYS = {"config", "pretrained", "random_init", "cache_dir", "trust_remote_code"}


class LoraOptions(Section):
    """The keys of ``model.lora:``."""

    rank: int = Field(16, ge=1, description="Rank r of the update B·A of each matrix.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank; null = 2 * rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of what A is applied to.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Endings of the names of the linear layers to adapt, e.g. [q_proj, v_proj]; null = all in the blocks.",
    )
    new_ids_from: int | None = Field(
        None,
        ge=1,
        description="Ids from this one on are new: their rows of the embedding and the LM head train. null = those that "
        "the checkpoint lacks. Set it where the checkpoint has spare rows that no token has used.",
    )

    @property
    def scale(self) -> float:
        """Of B·A."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


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
    position_embedding: Literal["rope", "pope"] = Field(
        "rope",
        description="native: rope = rotary; pope = polar (arXiv 2509.10534): angles are position alone, lengths content "
        "alone. Its queries and keys are twice as wide in attention, and rope_theta is its base too.",
    )
    embedding_norm: bool = Field(
        False, description="native: RMSNorm right after the embedding; its gain starts at embedding_init_std."
    )
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="native: dropout after each attention and MLP branch.")
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="native: stochastic depth: probability with which a sample skips a branch of the last block; it grows "
        "linearly from 0 in the first.",
    )
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
        foreign = (HUGGINGFACE_KEYS if self.family == "native" else values.keys() - HUGGINGFACE_KEYS) - SHARED_KEYS
        return {key: value for key, value in values.items() if key not in foreign}


def check_options(options: ModelOptions) -> None:
    """Every key that says something must be one of the family's own."""
    fields = type(options).model_fields
    given = {key for key in fields if getattr(options, key) != fields[key].default} - SHARED_KEYS
    if options.family == "native":
        if wrong := sorted(given & HUGGINGFACE_KEYS):
            raise InputError(f"model.{wrong[0]}: needs model.family: huggingface")
        return
    if wrong := sorted(given - HUGGINGFACE_KEYS):
        raise InputError(f"model.{wrong[0]}: belongs to model.family: native; put it under model.config instead")
    if (options.config is None) == (options.pretrained is None):
        raise InputError("model.family: huggingface needs either model.config or model.pretrained")
    if options.trust_remote_code and options.pretrained is None:
        raise InputError("model.trust_remote_code: needs model.pretrained; the families of model.config are built in")
    if options.random_init and options.pretrained is None:
        raise InputError("model.random_init: needs model.pretrained; the weights of model.config are random as it is")
    if options.cache_dir is not None and options.pretrained is None:
        raise InputError("model.cache_dir: needs model.pretrained; nothing is downloaded for model.config")
