"""Gradient clipping by group of parameters: the arithmetic, which is the same on every engine.

The norm of each group is clipped by itself (Pascanu et al., arXiv 1211.5063, section 3.2, once a group), so that a part of
the model with large gradients does not scale down the others. An engine says which pieces of the gradient this rank has;
it measures them all before it scales one of them.
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
    """Which parameter is clipped with which others, and what the last step's norms ask for.

    Args:
        module: the root; all of its parameters that require a gradient are clipped.
        groups: group name → names of parameters, the first ones as in ``module.named_parameters()``; every trainable
            parameter in exactly one of them. Empty: one group of everything, which has no name.
        clip_norm: the limit of each group's norm; 0 = no limit.
        split: names of the parameters of which each of a ``team`` of ranks has a part; of the others they all have the whole.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, Sequence[str]],
        clip_norm: float,
        split: Collection[str] = (),
        team: int = 1,
    ) -> None:
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if groups:
            _check(names, groups)
        self.names = tuple(groups)
        """Of the groups; none if there are none."""
        self.clip_norm = clip_norm
        self._group_of = dict.fromkeys(names, 0)
        for i, group in enumerate(groups.values()):
            self._group_of.update(dict.fromkeys(group, i))
        # in a team, a second row of the same groups: of the parameters that are split
        self.team, self._count = team, max(1, len(self.names))
        for name in split if team > 1 else ():
            if name in self._group_of:
                self._group_of[name] += self._count
        self._coefficients: Tensor | None = None

    def group_of(self, name: str) -> int:
        """Number of the list that a parameter's gradients are in."""
        return self._group_of[name]

    def sort(self, items: Iterable[tuple[int, T]]) -> list[list[T]]:
        """Items by the number that stands beside each."""
        by_group: list[list[T]] = [[] for _ in range(self._count * (1 + (self.team > 1)))]
        for group, item in items:
            by_group[group].append(item)
        return by_group

    def measure(self, gradients: list[list[Tensor]], copies: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Norms of this step's gradients, which :meth:`scale` then goes by. Collective unless every rank has everything.

        Args:
            gradients: as :meth:`sort` gives it, what this rank has, in any pieces and of any dtype.
            copies: how many of the ranks with different samples have the same elements.

        Returns:
            The total norm, 0-d, and each group's, shape (groups,), in fp32. They are infinite if their square overflows.
        """
        squares = torch.stack([_norm(of_group, device) for of_group in gradients]).square()
        if world_size() > copies:  # over all ranks, each counting for as many as have the same
            if self.team > 1:
                squares = squares.view(2, -1)
                squares = squares[0] / self.team + squares[1]
            squares = squares / copies
            dist.all_reduce(squares)
        norms = squares.sqrt()
        self._coefficients = (self.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        return squares.sum().sqrt(), norms

    def scale(self, gradients: list[list[Tensor]]) -> None:
        """Scale pieces of each group in place by min(1, clip_norm / (norm + 1e-6)).

        They become NaN or 0 where a norm is not finite; the caller sees to it that nothing is updated then.
        """
        if self.clip_norm == 0:
            return
        assert self._coefficients is not None, "the norms have not been measured"
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
    """0-d fp32; of bf16 gradients too, without a copy of them."""
    pieces = [piece for piece in pieces if piece.numel() > 0]
    if not pieces:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float32)))


class Range(NamedTuple):
    """Elements ``begin`` … ``end - 1`` of a flat tensor are of parameters of one group."""

    group: int
    begin: int
    end: int


def join(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges of one tensor, and make one of neighbours of the same group."""
    joined: list[Range] = []
    for group, begin, end in sorted(ranges, key=lambda r: r.begin):
        if joined and joined[-1].group == group and joined[-1].end == begin:
            begin = joined.pop().begin
        joined.append(Range(group, begin, end))
    return joined


def cut(fragments: Iterable[Tensor], ranges: Sequence[Range]) -> Iterator[tuple[int, Tensor]]:
    """Group and values of every part of a tensor that is inside a range, to read.

    Args:
        fragments: flattened, one after the other, they are the tensor, or its beginning: the rest is zero.
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
