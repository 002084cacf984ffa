"""The heads of ``mtp`` (Gloeckle et al., arXiv 2404.19737, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache

from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderLayer, initialize, position_table
from jepa_scale.models.layers.norm import RMSNorm
from jepa_scale.packing import PackedSequence


class MtpHead(nn.Module):
    """One block and a norm on the trunk's states. Their result goes to the decoder's LM head.

    Attributes:
        block: a causal block of the native decoder.
        norm: the norm before the LM head.
    """

    def __init__(self, config: JepaDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.block = JepaDecoderLayer(config, 0)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for module in self.modules():
            initialize(module, config)

    def forward(self, states: Tensor, packed: PackedSequence) -> Tensor:
        """Return the states for the LM head: (T, d) states of the trunk → (T, d)."""
        rotary = position_table(self.config, packed.position_ids[None], states.dtype)
        return self.norm(self.block(states[None], rotary=rotary, packed=packed.table).squeeze(0))

    def continued(self, states: Tensor, seen: int, cache: Cache) -> Tensor:
        """Run on the next m states of a text, (m, d) → (m, d), given the cache of the ``seen`` ones before.

        The head's attention is not the packed one.
        """
        positions = torch.arange(seen, seen + len(states), device=states.device)
        future = torch.arange(seen + len(states), device=states.device) > positions[:, None]
        mask = torch.zeros_like(future, dtype=states.dtype).masked_fill(future, -torch.inf)[None, None]
        rotary = position_table(self.config, positions[None], states.dtype)
        return self.norm(self.block(states[None], rotary=rotary, attention_mask=mask, past_key_values=cache).squeeze(0))
