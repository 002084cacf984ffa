"""Multi-layer perceptrons of projectors and predictors."""

from __future__ import annotations

from torch import Tensor, nn

from jepa_scale.models.layers.swiglu import gated


class Mlp(nn.Module):
    """The perceptron of LitJEPA: Linear(in, m · out) → GELU → Dropout → Linear(m · out, out), with m = ``multiple``; m · out is rounded."""

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


class SwiGlu(nn.Module):
    """W_down(silu(W_gate x) ⊙ W_up x) with an inner width of m · size, m = ``multiple`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, size: int, multiple: float):
        super().__init__()
        inner = max(1, round(multiple * size))
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, size) → (…, size)."""
        return self.down(gated(self.gate(x), self.up(x)))
