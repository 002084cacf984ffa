"""The heads of ``mtp`` (Gloeckle et al., arXiv 2404.19737, section 2)."""

from __future__ import annotations

from torch import Tensor, nn

from jepa_scale.models.decoder import JepaDecoderConfig, JepaDecoderLayer, initialize, position_table
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
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for module in self.modules():
            initialize(module, config)

    def forward(self, states: Tensor, packed: PackedSequence) -> Tensor:
        """Return the states for the LM head: (T, d) states of the trunk → (T, d)."""
        rotary = position_table(self.config, packed.position_ids[None], states.dtype)
        return self.norm(self.block(states[None], rotary=rotary, packed=packed.table)[0])
