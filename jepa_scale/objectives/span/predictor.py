"""The predictor of masked spans: a stack of blocks that predicts the representations of a view's masked tokens (SpanJEPA; the
predictor of I-JEPA, Assran et al. 2023, arXiv 2301.08243, on text).

Its blocks are those of the native decoder, except that every token attends to its whole segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jepa_scale.models.attention.meta import attention_pairs
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.decoder import JepaAttention, JepaDecoderConfig, JepaDecoderLayer, initialize, position_table
from jepa_scale.models.flops import Cost, linear_cost
from jepa_scale.models.layers.drop_path import segments_kept
from jepa_scale.models.layers.norm import RMSNorm
from jepa_scale.models.native_blocks import config_of_blocks
from jepa_scale.packing import PackedSequence

_STACK = 1  # so that DropPath's draws differ from the decoder's


class SpanPredictor(nn.Module):
    """Non-causal blocks over a view's states. A learned embedding of the position is the input for each masked token.

    Attributes:
        layers: the blocks, for sharding and activation checkpointing.
        norm: the final norm. :meth:`forward` does not apply it: the caller averages spans first.
    """

    def __init__(self, config: JepaDecoderConfig, max_positions: int) -> None:
        """``config`` gives shape and initial weights of the blocks; keys of embedding, head and bridge are not used."""
        super().__init__()
        self.config = config
        self.mask_embedding = nn.Embedding(max_positions, config.hidden_size)
        self.layers = nn.ModuleList(JepaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, JepaAttention):
                module.is_causal = False
            initialize(module, config)

    @classmethod
    def of(cls, backbone: Backbone, layers: int, max_positions: int) -> SpanPredictor:
        """Return a predictor whose blocks have the shape of the backbone's; see
        :func:`jepa_scale.models.native_blocks.config_of_blocks`."""
        return cls(config_of_blocks(backbone, layers, drop_path=True), max_positions)

    def forward(self, states: Tensor, kept: Tensor, masked: Tensor, packed: PackedSequence) -> Tensor:
        """Predict the representations of the masked tokens.

        Args:
            states: (N, d) states of the tokens that were not masked. kept: (N,) their indices in ``packed``.
            masked: (M,) indices of the masked tokens in ``packed``, in any order, at least one of each view; for an empty sequence
                that of its filler.
            packed: the views at full length, with the number of masked tokens of each as its queries. Besides, positions, segments
                and, with DropPath, seeds are used. Positions are below ``max_positions``.

        Returns:
            (M, d), before the final norm, in the order of ``masked``. N may be 0. Every parameter is used even then.
        """
        config, positions = self.config, packed.position_ids
        guess = self.mask_embedding(positions[masked])  # (M, d)
        x = guess.new_zeros(packed.num_tokens, config.hidden_size)
        x = x.index_copy(0, kept, states.to(x.dtype)).index_copy(0, masked, guess)[None]
        rotary = position_table(config, positions[None], x.dtype)
        branches = None
        if self.training and config.drop_path:
            assert packed.seeds is not None, "DropPath in a packed sequence needs its segments' seeds"
            branches = segments_kept(packed.seeds, packed.table, config.drop_path, len(self.layers), _STACK)
        readout, order = masked.sort()
        last = {"readout": readout, "packed_queries": packed.queries or packed.table}
        for number, layer in enumerate(self.layers, 1):
            x = layer(
                x,
                **(last if number == len(self.layers) else {}),  # nobody reads the other tokens
                kept=None if branches is None else branches[number - 1],
                rotary=rotary,
                packed=packed.table,
            )
        return x.squeeze(0).index_select(0, order.argsort())

    def flops(self) -> SpanFlops:
        """Return the FLOPs that follow from the modules. Call it once, while the weights are not yet sharded."""
        costs = [linear_cost(layer) for layer in self.layers]
        last: Any = self.layers[-1]
        trimmed = linear_cost(nn.ModuleList([last.self_attn.q_proj, last.self_attn.o_proj, last.mlp]))
        everywhere = [sum(cost[way] for cost in costs) - trimmed[way] for way in (0, 1)]
        heads, widths = self.config.num_attention_heads, last.self_attn.qk_head_dim + last.self_attn.head_dim
        pair = 2 * heads * widths
        return SpanFlops(Cost(*everywhere), trimmed, Cost(pair, 2 * pair), len(costs))


@dataclass(frozen=True, slots=True)
class SpanFlops:
    """FLOPs of a :class:`SpanPredictor`, counted as in :mod:`jepa_scale.models.flops`.

    Attributes:
        per_token: of a token, in all matrices except those of ``per_mask``.
        per_mask: of a masked token, in the last block's matrices of the queries and after the attention.
        per_pair: of a query and a key, in one block.
        layers: number of blocks.
    """

    per_token: Cost
    per_mask: Cost
    per_pair: Cost
    layers: int

    def count(self, packed: PackedSequence, masked: int, training: bool) -> int:
        """Return the FLOPs of a pass over a sequence with ``masked`` masked tokens. With ``training`` it has a backward, the
        gradient of the states included."""
        lengths, queries = packed.table.lengths, (packed.queries or packed.table).lengths
        pairs = (self.layers - 1) * attention_pairs(lengths, causal=False)
        pairs, total = pairs + attention_pairs(queries, causal=False, key_lengths=lengths), 0
        for way in (0, 1) if training else (0,):
            total += self.per_token[way] * packed.num_tokens + self.per_mask[way] * masked + self.per_pair[way] * pairs
        return total
