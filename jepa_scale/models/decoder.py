"""The native decoder: pre-norm RMSNorm, SwiGLU, and RoPE or PoPE.

Options are tied weights, a normalised embedding, DropPath, and a gated bridge after one of its blocks.

It is a complete transformers model (Auto classes, ``generate`` with a cache, ``save_pretrained``) with Llama's parameter
names, so code that addresses Llama's parameters by name works on it. It calls attention through transformers' registry: the
same code runs on packed sequences and on ordinary batches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from jepa_scale.models.head import LMHead
from jepa_scale.models.layers.bridge import Bridge
from jepa_scale.models.layers.drop_path import DropPath, drop_rate, rows_kept, segments_kept
from jepa_scale.models.layers.norm import RMSNorm
from jepa_scale.models.layers.pope import PolarEmbedding
from jepa_scale.models.layers.rotary import rotary_table, rotate
from jepa_scale.models.layers.swiglu import gated
from jepa_scale.packing import SegmentTable


class JepaDecoderConfig(PreTrainedConfig):
    """Configuration of the native decoder.

    Llama's keys have their usual meaning; ``rope_theta`` may be given on its own (default 10,000). The decoder's own keys, and
    those with another default:

    Attributes:
        intermediate_size: inner width of the SwiGLU; ``None`` = 4 · hidden_size.
        output_bias: whether the LM head has a bias.
        embedding_init_std: standard deviation of the initial embeddings; ``None`` = initializer_range.
        position_embedding: ``"rope"``, or ``"pope"`` (:mod:`jepa_scale.models.layers.pope`), whose base is ``rope_theta``.
        embedding_norm: whether an RMSNorm is applied to the input of the first block (embeddings of ids or
            ``inputs_embeds``). Its gain starts at embedding_init_std, so that the embeddings have their usual scale.
        hidden_dropout: dropout on the output of each attention and MLP branch.
        drop_path: probability with which the last block drops a branch (:mod:`jepa_scale.models.layers.drop_path`).
        bridge_after: the block (from 1; negative: from the end) whose output x becomes x + σ(g)·B(x), see
            :class:`jepa_scale.models.layers.bridge.Bridge`; ``None`` = no bridge.
        bridge_intermediate_size: inner width of B; ``None`` = hidden_size.
        bridge_dropout: dropout within B.
        bridge_gate_init: initial value of g.
        bridge_grad_barrier: whether the bridge's stop-gradient layer keeps gradients of the upper blocks from the lower ones.
    """

    model_type = "jepa_decoder"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = None  # type: ignore[assignment]  # resolved below
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    output_bias: bool = False
    initializer_range: float = 0.02
    embedding_init_std: float = None  # type: ignore[assignment]
    position_embedding: str = "rope"
    embedding_norm: bool = False
    hidden_dropout: float = 0.0
    drop_path: float = 0.0
    bridge_after: int | None = None
    bridge_intermediate_size: int = None  # type: ignore[assignment]
    bridge_dropout: float = 0.0
    bridge_gate_init: float = -2.0
    bridge_grad_barrier: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.embedding_init_std is None:
            self.embedding_init_std = self.initializer_range
        if self.bridge_intermediate_size is None:
            self.bridge_intermediate_size = self.hidden_size
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: {self.hidden_size} must be an even multiple of "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} must divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_type: {self.rope_parameters['rope_type']!r} is not offered; use 'default'")
        if self.position_embedding not in ("rope", "pope"):
            raise ValueError(f"position_embedding: {self.position_embedding!r} is not offered; use 'rope' or 'pope'")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path} must be a probability below 1")
        if self.bridge_after is not None:
            block = self.bridge_after if self.bridge_after > 0 else self.num_hidden_layers + 1 + self.bridge_after
            if not 1 <= block < self.num_hidden_layers:
                raise ValueError(
                    f"bridge_after: {self.bridge_after} leaves no block before or after the bridge; the decoder has "
                    f"{self.num_hidden_layers}"
                )
            self.bridge_after = block

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def position_table(config: JepaDecoderConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of positions (B, T), as :class:`JepaAttention` takes them."""
    width = config.head_dim * (2 if config.position_embedding == "pope" else 1)
    cos, sin = rotary_table(position_ids, width, config.rope_parameters["rope_theta"])
    return cos.to(dtype), sin.to(dtype)


class JepaAttention(nn.Module):
    """Self-attention; the config's ``_attn_implementation`` selects its kernel."""

    is_causal = True  # a bidirectional stack sets it to False on its own layers

    def __init__(self, config: JepaDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        d, kv = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        polar = config.position_embedding == "pope"
        self.pope = PolarEmbedding(config.num_key_value_heads, self.head_dim) if polar else None
        self.qk_head_dim = self.head_dim * (2 if polar else 1)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        readout: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, (B, T, d) → (B, T, d); the eager implementation also returns the weights (B, H, T, T_k).

        Args:
            readout: (M,) positions of a packed sequence, segment by segment. Queries are computed there only, → (1, M, d), and
                ``packed_queries`` has their number in each segment. If the layer is causal, they are the segments' last tokens.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        asking, angles = x, rotary
        if readout is not None:
            asking, angles = x[:, readout], (rotary[0][:, readout], rotary[1][:, readout])
        q = self.q_proj(asking).view(*asking.shape[:2], -1, self.head_dim)
        k = self.k_proj(x).view(heads)
        q, k = (rotate(q, angles), rotate(k, rotary)) if self.pope is None else self.pope(q, k, angles, rotary)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention from plain operations, with its weights; ``attention_mask`` is added to the scores."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class JepaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): W_down(silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: JepaDecoderConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class JepaDecoderLayer(GradientCheckpointingLayer):
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: JepaDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = JepaAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = JepaMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = DropPath(drop_rate(config.drop_path, layer_idx, config.num_hidden_layers))

    def forward(
        self,
        x: Tensor,
        readout: Tensor | None = None,
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the block, (B, T, d) → (B, T, d); with ``readout`` (M,) only at those positions, see :class:`JepaAttention`.

        ``kept`` (2, B, T) or (2, B, 1) bool: where the two branches are kept, see :mod:`jepa_scale.models.layers.drop_path`.
        """
        branch, _ = self.self_attn(self.input_layernorm(x), readout=readout, **kwargs)
        if readout is not None:
            x, kept = x[:, readout], None if kept is None else kept[..., readout]
        first, second = (None, None) if kept is None else kept.unbind()
        x = x + self.drop_path(self.dropout(branch), first)
        return x + self.drop_path(self.dropout(self.mlp(self.post_attention_layernorm(x))), second)


class EmbeddingNorm(RMSNorm):
    """RMSNorm of the embeddings; a class of its own because its gain starts at the embeddings' scale and not at 1."""


class JepaLMHead(LMHead):
    """The LM head, from hidden states to logits.

    With tied weights the states are first multiplied by the learnable ``logit_scale``. The scale belongs to this module because
    ZeRO-3 gathers a parameter only for the module that owns it. It is a vector of one element because FSDP2 shards no scalars.
    """

    def __init__(self, config: JepaDecoderConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=config.output_bias)
        self.logit_scale = nn.Parameter(torch.empty(1)) if config.tie_word_embeddings else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.logit_scale is None else x * self.logit_scale)


class JepaDecoderPreTrainedModel(PreTrainedModel):
    config_class = JepaDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JepaDecoderLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": JepaDecoderLayer, "attentions": JepaAttention}

    @property
    def _supports_flash_attn(self) -> bool:  # type: ignore[override]
        """Return whether transformers' flash kernels apply.

        They take heads of a single width, and the keys of PoPE are wider than its values.
        """
        return self.config.position_embedding == "rope"

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)  # type: ignore[arg-type]  # transformers declares a base class


@torch.no_grad()
def initialize(module: nn.Module, config: JepaDecoderConfig) -> None:
    """Set the initial weights of one module of the decoder, without its sub-modules."""
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.embedding_init_std)
    elif isinstance(module, EmbeddingNorm):
        init.constant_(module.weight, config.embedding_init_std)
    elif isinstance(module, RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, PolarEmbedding):
        init.zeros_(module.delta)
    elif isinstance(module, Bridge):
        init.constant_(module.gate, config.bridge_gate_init)
    if isinstance(module, JepaLMHead) and module.logit_scale is not None:
        init.constant_(module.logit_scale, config.hidden_size**-0.5)


class JepaDecoderModel(JepaDecoderPreTrainedModel):
    """Embedding, blocks and final norm: from ids or embeddings to hidden states."""

    def __init__(self, config: JepaDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = EmbeddingNorm(config.hidden_size, config.rms_norm_eps) if config.embedding_norm else None
        self.layers = nn.ModuleList(JepaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.bridge = None
        if config.bridge_after is not None:
            d, inner = config.hidden_size, config.bridge_intermediate_size
            self.bridge = Bridge(d, d, inner, config.bridge_dropout, config.bridge_gate_init)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        readout: Tensor | None = None,
        segment_seeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder: (B, T) ids or (B, T, d) embeddings → ``last_hidden_state`` (B, T, d), after the final norm.

        Packed attention takes B = 1, ``position_ids`` (1, T), ``packed=SegmentTable`` and, with branches,
        ``packed_keys=KeyRows``. It also admits these:

        Args:
            readout: (S,) positions of the segments' last tokens: only those rows are returned, (1, S, d), and the last block
                skips the others.
            segment_seeds: (S,) int64; in training they determine which branches DropPath drops for a segment.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: both or neither is given; pass one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = position_table(self.config, position_ids, x.dtype)  # type: ignore[arg-type]
        kept = self._kept(x, kwargs.get("packed"), segment_seeds)
        last = {} if readout is None else {"readout": readout, "packed_queries": _one_each(len(readout), x.device)}
        for number, layer in enumerate(self.layers, 1):
            x = layer(
                x,
                **(last if number == len(self.layers) else {}),
                kept=None if kept is None else kept[number - 1],
                rotary=rotary,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if self.bridge is not None and number == self.config.bridge_after < len(
                self.layers
            ):  # a decoder cut after this block has no bridge
                x = x.detach() if self.config.bridge_grad_barrier else x
                x = x + self.bridge(x)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _kept(self, x: Tensor, packed: SegmentTable | None, seeds: Tensor | None) -> Tensor | None:
        """Return which branches DropPath keeps, (L, 2, B, 1 or T) bool; None if it keeps all of them."""
        rate, blocks = self.config.drop_path, self.config.num_hidden_layers  # L, also if the decoder is cut
        if not self.training or rate == 0:
            return None
        if packed is None:
            return rows_kept(len(x), rate, blocks, x.device)
        assert seeds is not None, "DropPath in a packed stream needs its segments' seeds"
        return segments_kept(seeds, packed, rate, blocks)


def _one_each(count: int, device: torch.device) -> SegmentTable:
    """Return a table of ``count`` segments of one token.

    It is built outside of the blocks, which would otherwise be compiled again for each ``count``.
    """
    ends = torch.arange(count + 1, dtype=torch.int32, device=device)  # made on the device: no copy to wait for
    return SegmentTable(ends, (1,) * count)


class JepaDecoderForCausalLM(JepaDecoderPreTrainedModel, GenerationMixin):
    """The decoder with its LM head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JepaDecoderConfig) -> None:
        super().__init__(config)
        self.model = JepaDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = JepaLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run :class:`JepaDecoderModel` and compute ``logits`` (B, T, V).

        Args:
            labels: (B, T) token ids, shifted here as in every transformers model.
            logits_to_keep: logits of the last n positions, or of an index tensor; 0 = all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(JepaDecoderConfig.model_type, JepaDecoderConfig)
AutoModel.register(JepaDecoderConfig, JepaDecoderModel)
AutoModelForCausalLM.register(JepaDecoderConfig, JepaDecoderForCausalLM)
