"""The latent dynamics of ``next_latent`` (Teoh et al., arXiv 2511.05963, appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentDynamics(nn.Module):
    """Map a state and the next token's embedding to the next state: h + MLP(LN[e; h]), with three linear layers and GELU.

    At initialization the last layer is zero, so that the prediction is the state itself.
    """

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(2 * size)
        self.mlp = nn.Sequential(
            nn.Linear(2 * size, size), nn.GELU(), nn.Linear(size, size), nn.GELU(), nn.Linear(size, size)
        )
        last = self.mlp[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return the next states: (n, d) embeddings of the next tokens, (n, d) states → (n, d)."""
        return states + self.mlp(self.norm(torch.cat([embeddings, states], dim=-1)))
