"""Combination of a sequence of grids' states into one (GridJEPA): by learned weights of the time steps, or by the mean."""

from __future__ import annotations

from torch import Tensor, nn


class TemporalAttention(nn.Module):
    """Weighted sum over L time steps, in each channel. The weights are softmax(W x + b) of the channel's values x at the L time
    steps. W and b have a row for each time step, so the result depends on the order.

    A shorter sequence fills the last of the L time steps: the newest grid is always the last one.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.score = nn.Linear(length, length)

    def forward(self, states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Combine (n, L, d) states.

        Args:
            present: (n, L) bool, time steps that have a grid, at least one in each sequence.

        Returns:
            (n, d), and (n, L) fp32, the mean weight of each time step over the channels, without gradient.
        """
        present = present[:, None]
        channels = states.transpose(1, 2).masked_fill(~present, 0.0)  # (n, d, L)
        weights = self.score(channels).float().masked_fill(~present, float("-inf")).softmax(dim=-1)
        return (channels * weights.to(channels.dtype)).sum(dim=-1), weights.detach().mean(dim=1)


class TemporalMean(nn.Module):
    """Mean over the time steps that have a grid, for comparison."""

    def forward(self, states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """As :class:`TemporalAttention`."""
        weights = present.float() / present.sum(dim=1, keepdim=True)
        return (states * weights.to(states.dtype)[..., None]).sum(dim=1), weights


def temporal(kind: str, length: int) -> nn.Module:
    """Return the module of a kind, ``attention`` or ``mean``."""
    return TemporalAttention(length) if kind == "attention" else TemporalMean()
