"""The predictor of masked spans: a stack that fills in, in representation space, the tokens that a view was encoded without
(SpanJEPA; the predictor of I-JEPA, Assran et al. 2023, arXiv 2301.08243, on text).

Its blocks are the native decoder's, but that every token sees its whole segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jepa_scale.models import attention
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import JepaAttention, JepaDecoderConfig, JepaDecoderLayer, initialize, position_table
from jepa_scale.models.flops import Cost, attention_pairs, linear_cost
from jepa_scale.models.layers.drop_path import segments_kept
from jepa_scale.packing import PackedStream
from jepa_scale.utils.errors import InputError

_STACK = 1  # DropPath's choices here are others than the decoder's


class SpanPredictor(nn.Module):
    """Non-causal blocks over a view's states, in which a learned embedding of the position stands for each masked token.

    Attributes:
        layers: the blocks, for sharding and activation checkpointing.
        norm: the final norm. :meth:`forward` leaves it to the caller, who averages spans first.
    """

    def __init__(self, config: JepaDecoderConfig, max_positions: int) -> None:
        """``config``: shape and initial weights of the blocks; keys of the embedding, the head and the bridge mean nothing."""
        super().__init__()
        self.config = config
        config._attn_implementation = attention.NAME
        self.mask_embedding = nn.Embedding(max_positions, config.hidden_size)
        self.layers = nn.ModuleList(JepaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, JepaAttention):
                module.is_causal = False
            initialize(module, config)

    @classmethod
    def of(cls, backbone: Backbone, layers: int, max_positions: int) -> SpanPredictor:
        """With blocks as those of the backbone, and as wide. Of a decoder of transformers the shape, the norm's epsilon, the
        initial deviation and the base of its rotary embedding are taken over, not the dropout; the position embedding is RoPE.

        Raises:
            InputError: the native blocks can't have this shape.
        """
        theirs: Any = backbone.decoder.config
        if isinstance(theirs, JepaDecoderConfig):
            names = (
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "rms_norm_eps",
                "initializer_range",
                "embedding_init_std",
                "position_embedding",
                "hidden_dropout",
                "drop_path",
            )
            keys = {name: getattr(theirs, name) for name in names}
            keys["rope_theta"] = theirs.rope_parameters["rope_theta"]
        else:
            rope = getattr(theirs, "rope_parameters", None) or {}
            eps = next((e for n in ("rms_norm_eps", "layer_norm_epsilon") if (e := getattr(theirs, n, None))), 1e-6)
            keys = {
                "hidden_size": backbone.hidden_size,
                "intermediate_size": getattr(theirs, "intermediate_size", None),
                "num_attention_heads": theirs.num_attention_heads,
                "num_key_value_heads": getattr(theirs, "num_key_value_heads", None),
                "rms_norm_eps": eps,
                "initializer_range": getattr(theirs, "initializer_range", 0.02),
                "rope_theta": rope.get("rope_theta", 10_000.0),
            }
        try:
            config = JepaDecoderConfig(vocab_size=1, num_hidden_layers=layers, **keys)
        except ValueError as error:  # its messages start with the key
            raise InputError(f"objective: a predictor can't be shaped like the model's blocks: {error}") from None
        return cls(config, max_positions)

    def forward(self, states: Tensor, kept: Tensor, masked: Tensor, stream: PackedStream) -> Tensor:
        """What stands at the masked places.

        Args:
            states: (N, d), of the tokens that were seen. kept: (N,) their places in ``stream``.
            masked: (M,) places in ``stream`` of the masked tokens. What is in neither, the filler of an empty stream, is zero.
            stream: the views at full length. Of it, only positions, segments and, with DropPath, seeds are looked at;
                positions are below ``max_positions``.

        Returns:
            (M, d), before the final norm, in the order of ``masked``. N and M may be 0; every parameter takes part nonetheless.
        """
        config, places = self.config, stream.position_ids
        guess = self.mask_embedding(places[masked])  # (M, d)
        x = guess.new_zeros(stream.num_tokens, config.hidden_size)
        x = x.index_copy(0, kept, states.to(x.dtype)).index_copy(0, masked, guess)[None]
        rotary = position_table(config, places[None], x.dtype)
        branches = None
        if self.training and config.drop_path:
            assert stream.seeds is not None, "DropPath in a packed stream needs its segments' seeds"
            branches = segments_kept(stream.seeds, stream.table, config.drop_path, len(self.layers), _STACK)
        for number, layer in enumerate(self.layers, 1):
            x = layer(
                x,
                rows=masked if number == len(self.layers) else None,  # no more is asked for
                kept=None if branches is None else branches[number - 1],
                rotary=rotary,
                packed=stream.table,
            )
        return x[0]

    def flops(self) -> SpanFlops:
        """Read off the modules, once, while the weights are whole."""
        costs = [linear_cost(layer) for layer in self.layers]
        last: Any = self.layers[-1]
        trimmed = linear_cost(nn.ModuleList([last.self_attn.o_proj, last.mlp]))
        everywhere = [sum(cost[way] for cost in costs) - trimmed[way] for way in (0, 1)]
        heads, widths = self.config.num_attention_heads, last.self_attn.qk_head_dim + last.self_attn.head_dim
        pair = 2 * heads * widths * len(costs)
        return SpanFlops(Cost(*everywhere), trimmed, Cost(pair, 2 * pair))


@dataclass(frozen=True, slots=True)
class SpanFlops:
    """What a :class:`SpanPredictor` costs, counted as in :mod:`jepa_scale.models.flops`.

    Attributes:
        per_token: all matrices but the last block's after its attention. per_mask: those, of a masked token.
        per_pair: of a query and a key.
    """

    per_token: Cost
    per_mask: Cost
    per_pair: Cost

    def forward(self, stream: PackedStream, masked: int, square: bool = False) -> int:
        """FLOPs of a pass without gradient over a stream, ``masked`` of whose tokens are. Every pair is seen, so ``square``
        makes no difference."""
        return self._total(0, stream, masked)

    def training(self, stream: PackedStream, masked: int, square: bool = False) -> int:
        """As :meth:`forward`, with the backward. The gradient of the states is included."""
        return self._total(0, stream, masked) + self._total(1, stream, masked)

    def _total(self, way: int, stream: PackedStream, masked: int) -> int:
        pairs = attention_pairs(stream.table.lengths, causal=False)
        return self.per_token[way] * stream.num_tokens + self.per_mask[way] * masked + self.per_pair[way] * pairs
