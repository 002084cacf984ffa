"""The multi-layer perceptron of projectors and predictors (LitJEPA)."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """Perceptron Linear(in, m · out) → GELU → Dropout → Linear(m · out, out), with m = ``multiple``; m · out is rounded."""

    def __init__(self, size_in: int, size_out: int, multiple: float = 2, dropout: float = 0.0):
        super().__init__()
        inner = max(1, round(multiple * size_out))
        self.up = nn.Linear(size_in, inner)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(inner, size_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) → (…, out)."""
        return self.down(self.drop(self.act(self.up(x))))
