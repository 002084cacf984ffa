"""From a sequence of grids' states to one state: by learned weights of the places, or by the mean (GridJEPA, G4)."""

from __future__ import annotations

from torch import Tensor, nn


class TemporalAttention(nn.Module):
    """In each channel, weights of the L places that are softmax(W x + b) of the channel's own values x at the L places; the
    result is their weighted sum. A place has weights of its own, so the order counts.

    Sequences that are shorter are at the end of the L places: the newest grid is always the last one.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.score = nn.Linear(length, length)

    def forward(self, states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(n, L, d) states, (n, L) bool, which of them there are, at least one → (n, d), and (n, L) fp32, the weight of each place
        on average over the channels, without gradient."""
        present = present[:, None]
        channels = states.transpose(1, 2).masked_fill(~present, 0.0)  # (n, d, L)
        weights = self.score(channels).float().masked_fill(~present, float("-inf")).softmax(dim=-1)
        return (channels * weights.to(channels.dtype)).sum(dim=-1), weights.detach().mean(dim=1)


class TemporalMean(nn.Module):
    """The mean of the places that there are; for comparison."""

    def forward(self, states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`TemporalAttention`."""
        weights = present.float() / present.sum(dim=1, keepdim=True)
        return (states * weights.to(states.dtype)[..., None]).sum(dim=1), weights


def temporal(kind: str, length: int) -> nn.Module:
    """``attention`` or ``mean``."""
    return TemporalAttention(length) if kind == "attention" else TemporalMean()
