"""Gradient clipping by group of parameters: the arithmetic, which is the same on every engine.

The norm of each group is clipped separately (Pascanu et al., arXiv 1211.5063, section 3.2, for each group), so that a part of
the model with large gradients does not scale down the others. An engine provides the pieces of the gradient on this rank; it
measures all of them before it scales any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_scale.distributed.comm import world_size

T = TypeVar("T")


class Clipping:
    """The groups of parameters to clip, and the coefficients from the last step's norms.

    Args:
        module: the root module; all of its parameters that require a gradient are clipped.
        groups: group name → names of parameters, of tied ones the first name as in ``module.named_parameters()``. Every
            trainable parameter is in exactly one group. Empty: one group of all parameters, without a name.
        clip_norm: the limit of each group's norm; 0 = no limit.
        split: names of the parameters that are split over the tensor-parallel group; all its ranks have the others whole.
        tp_size: number of ranks in the tensor-parallel group.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, Sequence[str]],
        clip_norm: float,
        split: Collection[str] = (),
        tp_size: int = 1,
    ) -> None:
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if groups:
            _check(names, groups)
        self.names = tuple(groups)
        """Names of the groups; empty if ``groups`` is."""
        self.clip_norm = clip_norm
        self._group_of = dict.fromkeys(names, 0)
        for i, group in enumerate(groups.values()):
            self._group_of.update(dict.fromkeys(group, i))
        # with tensor parallelism, a second set of the same groups, for the parameters that are split
        self.tp_size, self._count = tp_size, max(1, len(self.names))
        for name in split if tp_size > 1 else ():
            if name in self._group_of:
                self._group_of[name] += self._count
        self._coefficients: Tensor | None = None

    def group_of(self, name: str) -> int:
        """Return the index, in the lists of :meth:`sort`, of a parameter's group."""
        return self._group_of[name]

    def sort(self, items: Iterable[tuple[int, T]]) -> list[list[T]]:
        """Sort (group index, item) pairs into one list of items for each group."""
        by_group: list[list[T]] = [[] for _ in range(self._count * (1 + (self.tp_size > 1)))]
        for group, item in items:
            by_group[group].append(item)
        return by_group

    def measure(
        self, gradients: list[list[Tensor]], copies: int, device: torch.device, loss_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure the norms of this step's gradients, for :meth:`scale`. Collective unless every rank has all gradients.

        Args:
            gradients: this rank's gradients, sorted by :meth:`sort`, in any pieces and of any dtype.
            copies: number of data-parallel ranks that have the same elements.
            loss_scale: 0-d factor of the loss, and so of the gradients; :meth:`scale` divides by it, too.

        Returns:
            The total norm, 0-d, and each group's, shape (groups,), in fp32 and without ``loss_scale``. They are infinite if their square overflows.
        """
        squares = torch.stack([_norm(of_group, device) for of_group in gradients]).square()
        if world_size() > copies:  # sum over all ranks, divided by the number of ranks with the same elements
            if self.tp_size > 1:
                squares = squares.view(2, -1)
                squares = squares[0] / self.tp_size + squares[1]
            squares = squares / copies
            dist.all_reduce(squares)
        norms, total = squares.sqrt(), squares.sum().sqrt()
        if loss_scale is not None:
            norms, total = norms / loss_scale, total / loss_scale
        self._coefficients = (self.clip_norm / (norms + 1e-6)).clamp(max=1.0) if self.clip_norm else None
        if loss_scale is not None:
            clipped = torch.ones_like(norms) if self._coefficients is None else self._coefficients
            self._coefficients = clipped / loss_scale
        return total, norms

    def scale(self, gradients: list[list[Tensor]]) -> None:
        """Scale pieces of each group in place by min(1, clip_norm / (norm + 1e-6)) / loss_scale.

        They become NaN or 0 if a norm is not finite; the caller must then skip the update.
        """
        if self._coefficients is None:  # neither clipped nor scaled
            assert self.clip_norm == 0, "the norms have not been measured"
            return
        rows = len(gradients) // self._count
        for pieces, coefficient in zip(gradients, self._coefficients.repeat(rows).unbind(), strict=True):
            if pieces:
                torch._foreach_mul_(pieces, coefficient)


def _check(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    counts = Counter(name for group in groups.values() for name in group)
    missing = [name for name in names if name not in counts]
    assert not missing, f"clip_groups: no group has the parameters {missing}"
    twice = [name for name, count in counts.items() if count > 1]
    assert not twice, f"clip_groups: the parameters {twice} are in two groups"
    unknown = sorted(counts.keys() - set(names))
    assert not unknown, f"clip_groups: {unknown} are no first names of trainable parameters"


def _norm(pieces: list[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all pieces together, 0-d fp32, without an fp32 copy of bf16 gradients."""
    pieces = [piece for piece in pieces if piece.numel() > 0]
    if not pieces:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)))


class Range(NamedTuple):
    """Elements ``begin`` … ``end - 1`` of a flat tensor, which belong to parameters of one group."""

    group: int
    begin: int
    end: int


def join(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges of one tensor, and merge adjacent ones of the same group."""
    joined: list[Range] = []
    for group, begin, end in sorted(ranges, key=lambda r: r.begin):
        if joined and joined[-1].group == group and joined[-1].end == begin:
            begin = joined.pop().begin
        joined.append(Range(group, begin, end))
    return joined


def cut(fragments: Iterable[Tensor], ranges: Sequence[Range]) -> Iterator[tuple[int, Tensor]]:
    """Yield group and values of every part of a tensor that is inside a range; the values are to be read only.

    Args:
        fragments: flattened and concatenated, they are the tensor, or its beginning if the rest is zero.
        ranges: sorted, as :func:`join` returns them.
    """
    at, i = 0, 0
    for fragment in fragments:
        end = at + fragment.numel()
        while i < len(ranges) and ranges[i].begin < end:
            group, left, right = ranges[i].group, max(ranges[i].begin, at), min(ranges[i].end, end)
            if right - left == fragment.numel():
                yield group, fragment
            elif left < right:
                yield group, fragment.reshape(-1)[left - at : right - at]
            if ranges[i].end > end:
                break
            i += 1
        at = end
