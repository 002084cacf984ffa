"""Ranks that share the work of each layer on the same samples: what they send each other, with gradients.

Between the blocks of a decoder a rank of a team has some of the stream's tokens; inside attention and MLP it has all tokens and
some of the heads or inner channels (Korthikanti et al., arXiv 2205.05198, section 4.2.2: tensor with sequence parallelism). What
comes after the decoder every rank of a team computes alike, and so has the whole gradient of it.

Each function is linear, and its gradient is its transpose given who computes what behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Split(NamedTuple):
    """A rank has ``[start, …)`` of dimension ``dim`` of a tensor, which has ``size`` there."""

    dim: int
    start: int
    size: int


class Team:
    """A team of ``size`` ranks, of which this is number ``rank``.

    Attributes:
        splits_tokens: whether each rank has its own tokens between the blocks. In generation, a token at a time, all have all,
            and so they do of what an objective puts through a module of the decoder.
        splits_vocabulary: whether the LM head gives this rank's part of the vocabulary alone.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.splits_tokens = True
        self.splits_vocabulary = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Team:
        return self

    @contextmanager
    def whole_tokens(self) -> Iterator[None]:
        self.splits_tokens = False
        try:
            yield
        finally:
            self.splits_tokens = True

    @contextmanager
    def split_vocabulary(self) -> Iterator[None]:
        self.splits_vocabulary = True
        try:
            yield
        finally:
            self.splits_vocabulary = False

    def part(self, count: int) -> slice:
        """This rank's of ``count`` things; the last rank may have fewer than the others."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    # -- between what all compute alike and what each computes a part of ----------------------------------------------

    def enter(self, x: Tensor) -> Tensor:
        """The same tensor, into what each rank computes a part of: the gradients add up."""
        return _Region.apply(x, _same, self._sum) if torch.is_grad_enabled() and x.requires_grad else x

    def leave(self, x: Tensor) -> Tensor:
        """The sum of the ranks' parts, into what all compute alike."""
        return _Region.apply(x, self._sum, _same)

    # -- tokens, (1, T, d) --------------------------------------------------------------------------------------------

    def split_tokens(self, x: Tensor) -> Tensor:
        """(1, T, d) that all have → this rank's (1, ⌈T / size⌉, d), filled up with zeros."""
        tokens = x.shape[1]
        return _Region.apply(x, self._own_rows, lambda grad: self._all_rows(grad)[:, :tokens])

    def join_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """The inverse of :meth:`split_tokens`, into what all compute alike: (1, L, d) → (1, T, d)."""
        return _Region.apply(x, lambda x: self._all_rows(x)[:, :tokens], self._own_rows)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """As :meth:`join_tokens`, into what each rank computes a part of."""
        return _Region.apply(x, lambda x: self._all_rows(x)[:, :tokens], self._sum_own_rows)

    def scatter_tokens(self, x: Tensor) -> Tensor:
        """(1, T, d), each rank's part of a sum → (1, L, d), the sum at this rank's tokens."""
        tokens = x.shape[1]
        return _Region.apply(x, self._sum_own_rows, lambda grad: self._all_rows(grad)[:, :tokens])

    # -- channels, (…, c) ---------------------------------------------------------------------------------------------

    def split_channels(self, x: Tensor) -> Tensor:
        """(…, c) that all have and compute alike → this rank's part of the last dimension."""
        channels = x.shape[-1]
        return _Region.apply(x, self._own_channels, lambda grad: self._all_channels(grad, channels))

    def join_channels(self, x: Tensor, channels: int) -> Tensor:
        """The inverse of :meth:`split_channels`, into what all compute alike."""
        return _Region.apply(x, lambda x: self._all_channels(x, channels), self._own_channels)

    # -- without gradient ---------------------------------------------------------------------------------------------

    def _sum(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        self._all_reduce(x)
        return x

    def _all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        dist.all_reduce(x, op, group=self.group)

    def _reduce_scatter(self, own: Tensor, every: Tensor) -> None:
        dist.reduce_scatter_tensor(own, every, group=self.group)

    def _all_gather(self, every: Tensor, own: Tensor) -> None:
        dist.all_gather_into_tensor(every, own, group=self.group)

    def _own_rows(self, x: Tensor) -> Tensor:
        return self._filled(x).chunk(self.size, dim=1)[self.rank].contiguous()

    def _sum_own_rows(self, x: Tensor) -> Tensor:
        rows = self._filled(x)[0].contiguous()
        own = rows.new_empty(len(rows) // self.size, *rows.shape[1:])
        self._reduce_scatter(own, rows)
        return own[None]

    def _all_rows(self, x: Tensor) -> Tensor:
        rows = x[0].contiguous()
        every = rows.new_empty(len(rows) * self.size, *rows.shape[1:])
        self._all_gather(every, rows)
        return every[None]

    def _filled(self, x: Tensor) -> Tensor:
        """(1, T, d) → (1, size · ⌈T / size⌉, d)."""
        missing = -x.shape[1] % self.size
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def _own_channels(self, x: Tensor) -> Tensor:
        return x[..., self.part(x.shape[-1])].contiguous()

    def _all_channels(self, x: Tensor, channels: int) -> Tensor:
        each = -(-channels // self.size)
        x = F.pad(x, (0, each - x.shape[-1])) if x.shape[-1] < each else x
        parts = x.new_empty(self.size * x.numel())
        self._all_gather(parts, x.flatten())
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)[..., :channels]

    # -- loss ---------------------------------------------------------------------------------------------------------

    def label_losses(self, normalizers: Tensor, chosen: Tensor) -> Tensor:
        """Negative log-probabilities of labels, of logits that no rank has all of: each sends three numbers a row.

        Args:
            normalizers: (n,) fp32, log Σ e^z over this rank's part of the vocabulary.
            chosen: (n,) fp32, the label's logit, 0 where another rank has it.

        Returns:
            (n,) fp32, the same on every rank.
        """
        return _LabelLosses.apply(normalizers, chosen, self._all_reduce)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0]), None, None


class _LabelLosses(torch.autograd.Function):
    """log Σ e^z − z_label, with the sum and the label's logit added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, normalizers: Tensor, chosen: Tensor, all_reduce: Callable[..., None]) -> Tensor:
        highest = normalizers.clone()
        all_reduce(highest, dist.ReduceOp.MAX)
        own = (normalizers - highest).exp()
        sums = torch.stack([own, chosen])
        all_reduce(sums)
        ctx.save_for_backward(own / sums[0])
        return sums[0].log() + highest - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (share,) = ctx.saved_tensors
        return grads[0] * share, -grads[0], None
