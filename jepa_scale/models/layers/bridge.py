"""The gated bridge, which feeds a predicted latent back into the decoder (LitJEPA's bridge at the tap)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa_scale.models.layers.norm import RMSNorm


class Bridge(nn.Module):
    """Gated branch σ(g)·B(z) with B = RMSNorm → Linear → GELU → Dropout → Linear; the caller adds it to the hidden state.

    With ``gate_init`` −2 the gate starts at 0.12, so that an untrained latent hardly disturbs the decoder.
    """

    def __init__(
        self, latent: int, hidden: int, inner: int | None = None, dropout: float = 0.0, gate_init: float = -2.0
    ):
        super().__init__()
        inner = inner or hidden
        self.norm = RMSNorm(latent)
        self.up = nn.Linear(latent, inner)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(inner, hidden)
        self.gate = nn.Parameter(torch.full((1,), float(gate_init)))  # 1-d: FSDP2 shards no scalars
        self.opening: Tensor | None = None  # 0-d, σ(g) of the last forward; outside a forward the gate may be a shard

    def forward(self, latent: Tensor) -> Tensor:
        """Compute the gated branch, (n, latent) → (n, hidden)."""
        x = self.norm(latent.to(self.up.weight.dtype))
        gate = torch.sigmoid(self.gate)
        self.opening = gate.detach()[0]
        return gate * self.down(self.drop(self.act(self.up(x))))
