"""Communication for Muon: assign each matrix to one rank, and exchange its elements before and after.

Under every engine a rank holds ranges of flattened matrices. Each matrix has one owner, which orthogonalises it. All other
ranks send their ranges to the owner, and the owner sends each of them its range of the result. This takes two all-to-alls,
in which a rank sends and receives about 1/N of the elements, and the matrix products are computed once. All ranks derive
the same plan from the same table, so planning needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_object, dp_group, dp_rank, dp_size
from jepa_scale.optim.matrices import Matrix

BATCH_ELEMENTS = 1 << 24
"""Maximum elements of the matrices in one batch; larger batches would take more memory and not be faster."""


class Part(NamedTuple):
    """Range of a flattened matrix within a flattened tensor: ``length`` elements from ``start`` are at ``at`` of the tensor."""

    matrix: str
    start: int
    at: int
    length: int


class Piece(NamedTuple):
    """A :class:`Part` on a given rank, in the tensor with index ``tensor``."""

    rank: int
    tensor: int
    start: int
    at: int
    length: int


class Route(NamedTuple):
    """Layout of a communication buffer.

    Attributes:
        slots: piece, its matrix, and its offset in the buffer; sorted by the rank that it goes to or comes from.
        splits: number of elements for each of these ranks.
    """

    slots: list[tuple[Piece, str, int]]
    splits: list[int]

    @property
    def size(self) -> int:
        return sum(self.splits)


class ExchangePlan(NamedTuple):
    """Communication and work of one rank in an optimizer step of certain tensors.

    Attributes:
        send: buffer of this rank's pieces, for the owners. arrive: buffer of the pieces of matrices that this rank owns.
        answer: buffer of the results of these matrices, for the ranks that hold them. receive: buffer of the results for
            this rank.
        batches: matrices that this rank owns, each batch of one shape.
    """

    send: Route
    arrive: Route
    answer: Route
    receive: Route
    batches: list[list[Matrix]]


class Layout:
    """Distribution of the elements of all matrices over the ranks. Creating it is collective.

    Args:
        matrices: all matrices, by name.
        tensors: for each tensor that this rank updates, the parts of matrices in it. All ranks have the same number of
            tensors in the same order; some may be empty. A matrix is in the same tensor on every rank.
        replicated: whether every rank holds all elements; otherwise each element is on exactly one rank.
    """

    def __init__(self, matrices: Mapping[str, Matrix], tensors: Sequence[Sequence[Part]], replicated: bool) -> None:
        self.matrices, self.replicated = matrices, replicated
        self.pieces: dict[str, list[Piece]] = {name: [] for name in matrices}
        """Pieces of each matrix, ordered by rank."""
        self._tensor_of: dict[str, int] = {}
        for number, of_rank in enumerate(all_gather_object([list(map(tuple, parts)) for parts in tensors])):
            assert len(of_rank) == len(tensors), "the ranks update different numbers of tensors"
            for tensor, parts in enumerate(of_rank):
                for name, *place in parts:
                    self.pieces[name].append(Piece(number, tensor, *place))
                    assert self._tensor_of.setdefault(name, tensor) == tensor, f"{name} is in two tensors"
        for name, pieces in self.pieces.items():
            self._check(matrices[name], pieces)

    def _check(self, matrix: Matrix, pieces: list[Piece]) -> None:
        ranks = [piece.rank for piece in pieces]
        assert len(set(ranks)) == len(ranks), f"{matrix.name}: a rank holds two parts of this matrix"
        if self.replicated:
            whole = all((p.start, p.length) == (0, matrix.numel) for p in pieces) and len(pieces) == dp_size()
        else:
            whole, end = True, 0
            for piece in sorted(pieces, key=lambda piece: piece.start):
                whole, end = whole and piece.start == end, end + piece.length
            whole = whole and end == matrix.numel
        assert whole, f"{matrix.name}: the parts of all ranks do not make up the matrix"

    def plan(self, tensors: Iterable[int]) -> ExchangePlan:
        """Plan a step of the tensors with these indices, which must be the same on all ranks."""
        wanted = set(tensors)
        names = [name for name in self.matrices if self._tensor_of[name] in wanted]
        held = {name: {p.rank: p.length for p in self.pieces[name]} for name in names}
        if self.replicated:
            held = {name: {} for name in names}  # the location does not matter
        owners = assign_owners([self.matrices[name] for name in names], held, dp_size())
        me = dp_rank()
        sent = {n: [p for p in self.pieces[n] if not self.replicated or p.rank == owners[n]] for n in names}
        mine = [(owners[name], p, name) for name in names for p in self.pieces[name] if p.rank == me]
        owned = [name for name in names if owners[name] == me]
        return ExchangePlan(
            send=_route(item for item in mine if item[1] in sent[item[2]]),
            arrive=_route((p.rank, p, name) for name in owned for p in sent[name]),
            answer=_route((p.rank, p, name) for name in owned for p in self.pieces[name]),
            receive=_route(mine),
            batches=_batches([self.matrices[name] for name in owned]),
        )


def _route(items: Iterable[tuple[int, Piece, str]]) -> Route:
    """Lay out a buffer from (rank at the other end, piece, matrix). Pieces of one rank keep their order, as on that rank."""
    slots, splits = [], [0] * dp_size()
    for other, piece, name in sorted(items, key=lambda item: item[0]):
        slots.append((piece, name, sum(splits)))
        splits[other] += piece.length
    return Route(slots, splits)


def _batches(matrices: Iterable[Matrix]) -> list[list[Matrix]]:
    batches: list[list[Matrix]] = []
    for matrix in sorted(matrices, key=lambda matrix: (matrix.rows, matrix.cols)):
        last = batches[-1] if batches else []
        alike = last and (last[0].rows, last[0].cols) == (matrix.rows, matrix.cols)
        if alike and (len(last) + 1) * matrix.numel <= BATCH_ELEMENTS:
            last.append(matrix)
        else:
            batches.append([matrix])
    return batches


def assign_owners(matrices: Sequence[Matrix], held: Mapping[str, Mapping[int, int]], ranks: int) -> dict[str, int]:
    """Choose the rank that orthogonalises each matrix: balanced in FLOPs, and close to the data where that is possible.

    Matrices are assigned in order of decreasing cost. Each goes to the rank that holds most of it, among the ranks whose
    load would stay within an equal share; if there is none, to the rank with the smallest load (list scheduling, Graham
    1969). The load of a rank exceeds an equal share by at most one matrix.

    Args:
        held: name → rank → number of elements that the rank holds.
    """
    share = sum(matrix.flops for matrix in matrices) / ranks
    loads = [0] * ranks
    owners = {}
    for matrix in sorted(matrices, key=lambda matrix: -matrix.flops):
        least = min(loads)
        fit = [r for r in range(ranks) if loads[r] == least or loads[r] + matrix.flops <= share]
        owner = max(fit, key=lambda r: (held[matrix.name].get(r, 0), -loads[r], -r))
        owners[matrix.name] = owner
        loads[owner] += matrix.flops
    return owners


def exchange(out: Tensor, send: Route, receive: Route) -> Tensor:
    """Send the buffer ``out`` and return the received buffer. Collective."""
    if dp_size() == 1:
        return out
    came = out.new_empty(receive.size)
    dist.all_to_all_single(came, out, receive.splits, send.splits, group=dp_group())
    return came


def copy_pieces(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
