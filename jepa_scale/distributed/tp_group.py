"""Differentiable collectives within a tensor-parallel group, whose ranks share the work of each layer on the same samples.

Between the blocks of a decoder each rank holds a part of the tokens of the packed sequence. Inside attention and MLP it
holds all tokens and a part of the heads or inner channels (tensor parallelism with sequence parallelism: Korthikanti et
al., arXiv 2205.05198, section 4.2.2). After the decoder all ranks of the group compute the same values, so each has the
whole gradient of them.

Each function is linear; its backward pass is its transpose. The transpose depends on what follows in the forward pass: in a
*replicated* region all ranks compute the same values, and each has the whole gradient; in a *partial* region each rank
computes a part, and the gradients of the ranks must be summed.
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
    """Position of a rank's part in a tensor: from ``start`` in dimension ``dim``, whose whole size is ``size``."""

    dim: int
    start: int
    size: int


class TensorParallelGroup:
    """A tensor-parallel group of ``size`` ranks; this process is rank ``rank`` in it.

    Attributes:
        splits_tokens: whether the tokens are split over the ranks between the blocks. They are not in generation, which
            computes one token at a time, nor for states that an objective passes through a module of the decoder.
        splits_vocabulary: whether the LM head computes only this rank's part of the vocabulary.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.splits_tokens = True
        self.splits_vocabulary = False

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallelGroup:
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
        """Slice of this rank when ``count`` elements are split over the ranks; the last ranks may get fewer elements."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    # -- between replicated and partial regions -----------------------------------------------------------------------

    def copy_to_tp_region(self, x: Tensor) -> Tensor:
        """Pass a tensor from a replicated to a partial region; the backward pass sums the gradients of the ranks."""
        return _Region.apply(x, _same, self._sum) if torch.is_grad_enabled() and x.requires_grad else x

    def reduce_from_tp_region(self, x: Tensor) -> Tensor:
        """Sum the ranks' parts, from a partial to a replicated region."""
        return _Region.apply(x, self._sum, _same)

    # -- tokens, (1, T, d) --------------------------------------------------------------------------------------------

    def split_tokens(self, x: Tensor) -> Tensor:
        """Split replicated tokens (1, T, d) over the ranks: (1, ⌈T / size⌉, d) on each, padded with zeros."""
        tokens = x.shape[1]
        return _Region.apply(x, self._own_rows, lambda grad: self._all_rows(grad)[:, :tokens])

    def join_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Gather split tokens for a replicated region, the inverse of :meth:`split_tokens`: (1, L, d) → (1, T, d)."""
        return _Region.apply(x, lambda x: self._all_rows(x)[:, :tokens], self._own_rows)

    def gather_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Gather split tokens as :meth:`join_tokens`, but for a partial region."""
        return _Region.apply(x, lambda x: self._all_rows(x)[:, :tokens], self._sum_own_rows)

    def scatter_tokens(self, x: Tensor) -> Tensor:
        """Sum the ranks' parts (1, T, d) and split the tokens of the sum over the ranks: (1, L, d) on each."""
        tokens = x.shape[1]
        return _Region.apply(x, self._sum_own_rows, lambda grad: self._all_rows(grad)[:, :tokens])

    # -- channels, (…, c) ---------------------------------------------------------------------------------------------

    def split_channels(self, x: Tensor) -> Tensor:
        """Split the channels of a replicated tensor (…, c) over the ranks; return this rank's part of the last dimension."""
        channels = x.shape[-1]
        return _Region.apply(x, self._own_channels, lambda grad: self._all_channels(grad, channels))

    def join_channels(self, x: Tensor, channels: int) -> Tensor:
        """Gather split channels for a replicated region, the inverse of :meth:`split_channels`."""
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
        """Pad the tokens with zeros to a multiple of the group's size: (1, T, d) → (1, size · ⌈T / size⌉, d)."""
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
        """Negative log-probabilities of labels from logits that are split over the ranks. A rank sends three numbers a row.

        Args:
            normalizers: (n,) fp32, log Σ e^z over this rank's part of the vocabulary.
            chosen: (n,) fp32, the label's logit, or 0 where another rank has it.

        Returns:
            (n,) fp32, equal on every rank.
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
    """log Σ e^z − z_label, with the sum and the label's logit summed over the ranks."""

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
