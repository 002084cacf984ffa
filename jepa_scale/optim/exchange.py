"""Who orthogonalises which matrix, and what the ranks send each other for it.

Every engine gives a rank ranges of flattened matrices. Each matrix has an owner, which all other ranks send their ranges
to, and which sends each of them its range of the result: two all-to-alls, in which a rank sends and gets about 1/N of the
elements, and products that are done once. All ranks make the same plan from the same table, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_scale.distributed.comm import all_gather_object, data_group, data_rank, data_size
from jepa_scale.optim.matrices import Matrix

BATCH_ELEMENTS = 1 << 24
"""Of matrices that are orthogonalised in one batch; more would take memory and be no faster."""


class Part(NamedTuple):
    """``length`` elements of a flattened matrix, from ``start``, are in a flattened tensor from ``at``."""

    matrix: str
    start: int
    at: int
    length: int


class Piece(NamedTuple):
    """A :class:`Part` of any rank's, in its tensor of that number."""

    rank: int
    tensor: int
    start: int
    at: int
    length: int


class Route(NamedTuple):
    """A buffer of pieces.

    Attributes:
        slots: piece, its matrix, and where in the buffer it begins; sorted by the rank that it goes to or comes from.
        splits: elements of each of these ranks.
    """

    slots: list[tuple[Piece, str, int]]
    splits: list[int]

    @property
    def size(self) -> int:
        return sum(self.splits)


class Plan(NamedTuple):
    """What one rank does in a step of some tensors.

    Attributes:
        send: pieces of this rank, to the owners. arrive: pieces of what this rank owns.
        answer: the same of the results, to whoever steps them. receive: results for this rank.
        batches: matrices of one shape that this rank owns.
    """

    send: Route
    arrive: Route
    answer: Route
    receive: Route
    batches: list[list[Matrix]]


class Layout:
    """Which rank has which elements of which matrix. Collective.

    Args:
        matrices: all of them, by name.
        tensors: of each tensor that this rank steps, the parts of matrices in it. All ranks have the same number of
            tensors in the same order, though maybe nothing in one; a matrix is in the same tensor everywhere.
        replicated: every rank has everything; else every element is some rank's.
    """

    def __init__(self, matrices: Mapping[str, Matrix], tensors: Sequence[Sequence[Part]], replicated: bool) -> None:
        self.matrices, self.replicated = matrices, replicated
        self.pieces: dict[str, list[Piece]] = {name: [] for name in matrices}
        """Of each matrix, by rank."""
        self._home: dict[str, int] = {}
        for number, of_rank in enumerate(all_gather_object([list(map(tuple, parts)) for parts in tensors])):
            assert len(of_rank) == len(tensors), "ranks step different numbers of tensors"
            for tensor, parts in enumerate(of_rank):
                for name, *place in parts:
                    self.pieces[name].append(Piece(number, tensor, *place))
                    assert self._home.setdefault(name, tensor) == tensor, f"{name} is in two tensors"
        for name, pieces in self.pieces.items():
            self._check(matrices[name], pieces)

    def _check(self, matrix: Matrix, pieces: list[Piece]) -> None:
        ranks = [piece.rank for piece in pieces]
        assert len(set(ranks)) == len(ranks), f"{matrix.name}: a rank has two parts of it"
        if self.replicated:
            whole = all((p.start, p.length) == (0, matrix.numel) for p in pieces) and len(pieces) == data_size()
        else:
            whole, end = True, 0
            for piece in sorted(pieces, key=lambda piece: piece.start):
                whole, end = whole and piece.start == end, end + piece.length
            whole = whole and end == matrix.numel
        assert whole, f"{matrix.name}: the ranks' parts are not the matrix"

    def plan(self, tensors: Iterable[int]) -> Plan:
        """For a step of these tensors; all ranks step the same ones."""
        wanted = set(tensors)
        names = [name for name in self.matrices if self._home[name] in wanted]
        held = {name: {p.rank: p.length for p in self.pieces[name]} for name in names}
        if self.replicated:
            held = {name: {} for name in names}  # of no account
        owners = assign_owners([self.matrices[name] for name in names], held, data_size())
        me = data_rank()
        sent = {n: [p for p in self.pieces[n] if not self.replicated or p.rank == owners[n]] for n in names}
        mine = [(owners[name], p, name) for name in names for p in self.pieces[name] if p.rank == me]
        owned = [name for name in names if owners[name] == me]
        return Plan(
            send=_route(item for item in mine if item[1] in sent[item[2]]),
            arrive=_route((p.rank, p, name) for name in owned for p in sent[name]),
            answer=_route((p.rank, p, name) for name in owned for p in self.pieces[name]),
            receive=_route(mine),
            batches=_batches([self.matrices[name] for name in owned]),
        )


def _route(items: Iterable[tuple[int, Piece, str]]) -> Route:
    """Of pieces with the rank at the other end. Those of one rank stay in their order, which is the same at that end."""
    slots, splits = [], [0] * data_size()
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
    """The rank that orthogonalises each matrix: as evenly in FLOPs as a greedy choice makes it, and where the matrix is if
    that costs nothing.

    The most expensive first, each goes to the rank that has most of it, of the ranks that stay within an equal share; if
    there is none, to the one with the least to do (Graham 1969, list scheduling). No rank gets more than an equal share and one
    matrix.

    Args:
        held: name → rank → elements that it has.
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
    """Send a buffer's pieces where they go; what has come. Collective."""
    if data_size() == 1:
        return out
    came = out.new_empty(receive.size)
    dist.all_to_all_single(came, out, receive.splits, send.splits, group=data_group())
    return came


def copy_pieces(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
