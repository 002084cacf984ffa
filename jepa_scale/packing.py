"""Packed sequences: segments of tokens laid end to end without padding, and the packer that builds them.

A *segment* is a run of tokens that attend only to each other. A *packed sequence* is a number of
segments laid end to end, with their boundaries in ``cu_seqlens``. A micro-batch has one or more packed sequences, because an
objective may run different segments through different parts of the decoder (names through the lower blocks, answers through
all of them).

Because attention is causal, a view with the same beginning as another segment of its sample need not compute it again: its
remaining tokens are a *branch*, whose queries also see the first n tokens of the other segment, the branch's *parent*. The
parent never sees the branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position without a prediction (the convention of ``torch.nn.functional.cross_entropy``)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that attend only to each other and, in a branch, to the beginning of another segment.

    Attributes:
        tokens: n token ids.
        role: purpose of the segment in its objective, e.g. ``"forward"``; the objective finds it by this name.
        labels: n ids; ``labels[t]`` is the token to predict *from* position t (already shifted), ``IGNORE`` for none.
            ``None`` = nothing is predicted.
        position_ids: n integers; ``None`` = 0 … n-1, or in a branch the n positions after its prefix.
        sequence: name of the packed sequence that holds the segment.
        key: segments of one micro-batch with the same sequence, role and key are packed once and shared by their samples.
        positions: name → offsets within the segment of tokens whose states or embeddings the objective uses.
        prefix: (role, m) makes the segment a branch, whose tokens also see the first m ≥ 1 tokens of the sample's only
            segment of that role. That segment is in the same packed sequence and is no branch itself; a branch has no ``key``.
        queries: number of its tokens, n ≥ 1, at which a stack's last block is read, if all segments of the packed sequence say so;
            ``None`` = at all of them.
    """

    tokens: Sequence[int]
    role: str
    labels: Sequence[int] | None = None
    position_ids: Sequence[int] | None = None
    sequence: str = "main"
    key: Hashable = None
    positions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    prefix: tuple[str, int] | None = None
    queries: int | None = None


@dataclass(frozen=True, slots=True)
class Views:
    """Segments and arrays that an objective makes from one example.

    Attributes:
        segments: the segments.
        values: name → an array of the same shape for every sample; the arrays are stacked.
        rows: name → an array with a varying number of rows a sample, such as a horizon for each of its pairs; the arrays are
            concatenated.
        counts: name → a number to be summed over the global batch; the sums are the denominators of the objective's means.
        seed: seed of the model's random choices for this sample, in [0, 2⁶²); set by the loader.
    """

    segments: list[Segment]
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Boundaries of the segments of a packed sequence.

    Attributes:
        cu_seqlens: (S+1,) int32 on the device of the tokens; segment s is ``[cu_seqlens[s], cu_seqlens[s+1])``.
        lengths: the S lengths as plain integers, so that choosing a kernel needs no device-to-host copy.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> SegmentTable:
        lengths = tuple(int(n) for n in lengths)
        ends = np.cumsum((0, *lengths), dtype=np.int32)
        return cls(torch.from_numpy(ends).to(device), lengths)

    def to(self, device: torch.device | str) -> SegmentTable:
        return SegmentTable(self.cu_seqlens.to(device, non_blocking=True), self.lengths)


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Keys and values of the segments of a packed sequence with branches, as rows of that sequence, some of them repeated.

    Attributes:
        index: (T_k,) int64, the rows; for a branch, first those of its prefix, then its own.
        table: boundaries of each segment's keys within ``index``, in the order of the segments.
    """

    index: Tensor
    table: SegmentTable

    def to(self, device: torch.device | str) -> KeyRows:
        return KeyRows(self.index.to(device, non_blocking=True), self.table.to(device))


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Tensors of one packed sequence: T tokens in S segments, L of them with a label.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64.
        labels: (T,) int64 with ``IGNORE``.
        labelled: (L,) int64, the token positions with a label; the LM head runs only on these.
        table: boundaries of the segments.
        keys: keys of each segment, if one of them is a branch; ``None`` = each segment sees only itself.
        seeds: (S,) int64, a seed for each segment of each sample, which does not depend on the segment's index in the packed
            sequence; ``None`` = not packed from views. A shared segment has the seed of its first sample.
        consecutive: whether the positions of each segment are 0 … n-1, or in a branch those after its prefix.
        queries: number of tokens of each segment at which a stack's last block is read; ``None`` = at all of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    labelled: Tensor
    table: SegmentTable
    keys: KeyRows | None = None
    seeds: Tensor | None = None
    consecutive: bool = True
    queries: SegmentTable | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Number of tokens that each segment's last token sees: those of the segment and, in a branch, of its prefix."""
        return (self.table if self.keys is None else self.keys.table).lengths

    @property
    def first(self) -> Tensor:
        """Position of each segment's first token, (S,)."""
        return self.table.cu_seqlens[:-1].long()

    @property
    def last(self) -> Tensor:
        """Position of each segment's last token, (S,)."""
        return self.table.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> PackedSequence:
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return PackedSequence(
            move(self.input_ids),
            move(self.position_ids),
            move(self.labels),
            move(self.labelled),
            self.table.to(device),
            None if self.keys is None else self.keys.to(device),
            None if self.seeds is None else move(self.seeds),
            self.consecutive,
            None if self.queries is None else self.queries.to(device),
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank.

    Attributes:
        sequences: the packed sequences by name.
        segments: role → (n,) int64, the index of the segment within its packed sequence, with one entry for each segment of
            each sample (a shared segment has several entries).
        samples: role → (n,) int64, the sample (row of ``values``) of each of those entries.
        values: name → (N, …), stacked over the N samples.
        positions: name → (n,) int64, positions in the packed sequence of the tokens of this name, sample by sample.
        rows: name → (n, …), concatenated sample by sample.
        counts: name → the sum over this micro-batch, plain integers.
        totals: name → 0-d float tensor, the sum over the *global* batch (all ranks, all micro-batches). Set by the trainer.
        max_samples: number of samples in the largest micro-batch of the step on any rank; ranks pad to it to gather rows.
        step: optimizer step of the batch.
        seed: the run's seed.
    """

    sequences: dict[str, PackedSequence]
    segments: dict[str, Tensor]
    samples: dict[str, Tensor]
    values: dict[str, Tensor]
    positions: dict[str, Tensor]
    rows: dict[str, Tensor]
    counts: dict[str, int]
    totals: dict[str, Tensor] = field(default_factory=dict)
    max_samples: int = 1
    step: int = 0
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences.values())

    def to(self, device: torch.device | str) -> PackedBatch:
        move = lambda d: {k: v.to(device, non_blocking=True) for k, v in d.items()}  # noqa: E731
        return replace(
            self,
            sequences={k: s.to(device) for k, s in self.sequences.items()},
            segments=move(self.segments),
            samples=move(self.samples),
            values=move(self.values),
            positions=move(self.positions),
            rows=move(self.rows),
            totals=move(self.totals),
        )


def pack_sequence(
    segments: Sequence[Segment], parents: Mapping[int, int] | None = None, seeds: Sequence[int] | None = None
) -> PackedSequence:
    """Lay segments end to end in the given order.

    An empty list gives one unlabelled filler token, because every rank must run the same modules even without any segments
    (ranks wait for each other under ZeRO-3 and FSDP2).

    Args:
        parents: index of each branch → index of its parent.
        seeds: the seed of each segment.

    Raises:
        ValueError: a segment has no tokens.
    """
    if not segments:
        segments, seeds = [Segment(tokens=[0], role="filler")], None if seeds is None else [0]
    lengths = [len(s.tokens) for s in segments]
    total = sum(lengths)
    ids = np.empty(total, dtype=np.int64)
    position_ids = np.empty(total, dtype=np.int64)
    labels = np.full(total, IGNORE, dtype=np.int64)
    at, consecutive = 0, True
    for segment, n in zip(segments, lengths, strict=True):
        if n == 0:
            raise ValueError(f"a segment of role {segment.role!r} has no tokens; leave it out instead")
        for what in (segment.labels, segment.position_ids):
            assert what is None or len(what) == n, (
                f"role {segment.role!r}: {len(what)} labels or position ids, {n} tokens"
            )
        ids[at : at + n] = segment.tokens
        assert segment.prefix is None or parents, f"role {segment.role!r}: a branch without a parent"
        start = 0 if segment.prefix is None else segment.prefix[1]
        position_ids[at : at + n] = np.arange(start, start + n)
        if segment.position_ids is not None:
            consecutive &= np.array_equal(position_ids[at : at + n], segment.position_ids)
            position_ids[at : at + n] = segment.position_ids
        if segment.labels is not None:
            labels[at : at + n] = segment.labels
        at += n
    return PackedSequence(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(position_ids),
        labels=torch.from_numpy(labels),
        labelled=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        table=SegmentTable.from_lengths(lengths),
        keys=_key_rows(lengths, _prefix_lengths(segments), parents) if parents else None,
        seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.int64),
        consecutive=consecutive,
        queries=SegmentTable.from_lengths(asked) if (asked := _queries(segments)) else None,
    )


def _prefix_lengths(segments: Iterable[Segment]) -> list[int]:
    return [0 if s.prefix is None else s.prefix[1] for s in segments]


def _queries(segments: Iterable[Segment]) -> list[int]:
    """Return the number of queries of each segment; empty if a segment does not say."""
    found = [s.queries for s in segments]
    return [] if None in found else [n for n in found if n is not None]


def _key_rows(lengths: Sequence[int], prefixes: Sequence[int], parents: Mapping[int, int]) -> KeyRows:
    own, shared = np.array(lengths, dtype=np.int64), np.array(prefixes, dtype=np.int64)
    starts = np.cumsum(own) - own
    heads = starts[[parents.get(i, i) for i in range(len(own))]]
    seen = shared + own
    offset = np.arange(seen.sum()) - np.repeat(np.cumsum(seen) - seen, seen)  # within a segment's keys
    index = offset + np.where(
        offset < np.repeat(shared, seen), np.repeat(heads, seen), np.repeat(starts - shared, seen)
    )
    return KeyRows(torch.from_numpy(index), SegmentTable.from_lengths(seen.tolist()))


def pack(
    views: Sequence[Views],
    sequences: Sequence[str] = ("main",),
    step: int = 0,
    seed: int = 0,
    max_samples: int | None = None,
    like: Views | None = None,
) -> PackedBatch:
    """Pack the views of a micro-batch's samples.

    Segments are ordered by length, by the length of their prefix and by their queries, so that equal shapes are neighbours and the CPU
    attention can batch them as plain slices; ``segments`` and ``samples`` map them to their samples. ``counts["tokens"]``,
    ``["labels"]`` and ``["samples"]`` are always set; the tokens of a branch are counted without its prefix.

    Args:
        max_samples: number of samples of the step's largest micro-batch; by default this one is the largest.
        like: views that give an empty micro-batch its roles, values and their shapes, with zero rows of each.

    Raises:
        ValueError: a segment names a packed sequence that is not in ``sequences``, or a prefix that does not exist.
    """
    unique: dict[str, list[Segment]] = {name: [] for name in sequences}
    seeds: dict[str, list[int]] = {name: [] for name in sequences}  # one for each of `unique`
    parents: dict[str, dict[int, int]] = {
        name: {} for name in sequences
    }  # index in `unique` of a branch → of its parent
    seen: dict[tuple[str, str, Hashable], int] = {}
    refs: dict[str, list[int]] = {}
    owners: dict[str, list[int]] = {}
    sequence_of: dict[str, str] = {}
    marked: dict[str, list[tuple[str, int, Sequence[int]]]] = {}  # name → sequence, index of the segment, offsets
    counts: dict[str, int] = {"samples": len(views)}
    for sample, view in enumerate(views):
        for name, n in view.counts.items():
            counts[name] = counts.get(name, 0) + n
        numbers: list[int] = []  # index in `unique` of each of the sample's segments
        branches: list[int] = []  # indices in `numbers` of the branches
        for segment in view.segments:
            if segment.sequence not in unique:
                raise ValueError(
                    f"a segment of role {segment.role!r} names the unknown packed sequence {segment.sequence!r}"
                )
            pool = unique[segment.sequence]
            number = len(pool)
            if segment.key is not None:
                number = seen.setdefault((segment.sequence, segment.role, segment.key), number)
            if number == len(pool):
                pool.append(segment)
                seeds[segment.sequence].append(view.seed + len(numbers))  # neighbouring seeds: users hash them
            if segment.prefix is not None:
                branches.append(len(numbers))
            numbers.append(number)
            refs.setdefault(segment.role, []).append(number)
            owners.setdefault(segment.role, []).append(sample)
            sequence_of[segment.role] = segment.sequence
            for name, offsets in segment.positions.items():
                marked.setdefault(name, []).append((segment.sequence, number, offsets))
        for i in branches:  # resolved only now: a branch may come before its parent
            segment = view.segments[i]
            parents[segment.sequence][numbers[i]] = numbers[_parent(segment, view.segments)]

    packed: dict[str, PackedSequence] = {}
    index: dict[str, np.ndarray] = {}  # index in `unique` → index in the packed sequence
    for name, pool in unique.items():
        lengths = [len(s.tokens) for s in pool]  # the primary sort key, which lexsort takes last
        further = [keys for keys in (_queries(pool), _prefix_lengths(pool) if parents[name] else []) if keys]
        order = np.lexsort((*further, lengths)) if further else np.argsort(lengths, kind="stable")
        index[name] = np.empty(len(pool), dtype=np.int64)
        index[name][order] = np.arange(len(pool))
        moved = {int(index[name][branch]): int(index[name][parent]) for branch, parent in parents[name].items()}
        packed[name] = pack_sequence([pool[i] for i in order], moved, [seeds[name][i] for i in order])

    counts["tokens"] = sum(len(s.tokens) for pool in unique.values() for s in pool)
    counts["labels"] = sum(len(p.labelled) for p in packed.values())
    values = {name: _stack([v.values[name] for v in views]) for name in (views[0].values if views else {})}
    rows = {name: _rows([v.rows[name] for v in views]) for name in (views[0].rows if views else {})}
    starts = {name: sequence.table.cu_seqlens.numpy() for name, sequence in packed.items()}
    positions = {
        name: _rows([starts[s][index[s][n]] + np.asarray(offsets, np.int64) for s, n, offsets in marks])
        for name, marks in marked.items()
    }
    if not views and like is not None:
        values = {name: _stack([value])[:0] for name, value in like.values.items()}
        rows = {name: _rows([value])[:0] for name, value in like.rows.items()}
        positions = {name: torch.zeros(0, dtype=torch.int64) for segment in like.segments for name in segment.positions}
        counts |= dict.fromkeys(like.counts, 0)
        for segment in like.segments:
            refs[segment.role], owners[segment.role], sequence_of[segment.role] = [], [], segment.sequence
    return PackedBatch(
        sequences=packed,
        segments={
            role: torch.from_numpy(index[sequence_of[role]][np.asarray(numbers, dtype=np.int64)])
            for role, numbers in refs.items()
        },
        samples={role: torch.as_tensor(rows, dtype=torch.int64) for role, rows in owners.items()},
        values=values,
        positions=positions,
        rows=rows,
        counts=counts,
        max_samples=max(1, len(views)) if max_samples is None else max_samples,
        step=step,
        seed=seed,
    )


def _parent(branch: Segment, segments: Sequence[Segment]) -> int:
    """Return the index of a branch's parent among the sample's segments.

    Raises:
        ValueError: the branch has a key, or no segment of the sample can be its parent.
    """
    assert branch.prefix is not None
    role, n = branch.prefix
    found = [i for i, segment in enumerate(segments) if segment.role == role]
    trouble = ""
    if branch.key is not None:
        trouble = "a branch cannot be shared; remove its key"
    elif len(found) != 1:
        trouble = f"the sample has {len(found)} segments of that role, not one"
    elif (parent := segments[found[0]]).prefix is not None:
        trouble = "that segment is a branch itself"
    elif parent.sequence != branch.sequence:
        trouble = f"that segment is in the packed sequence {parent.sequence!r}, not in {branch.sequence!r}"
    elif not 1 <= n <= len(parent.tokens):
        trouble = f"it has {len(parent.tokens)} tokens"
    if trouble:
        raise ValueError(f"a segment of role {branch.role!r} sees the first {n} tokens of role {role!r}: {trouble}")
    return found[0]


def _stack(values: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(v) for v in values]))


def _rows(values: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(v) for v in values]))


def add_counts(batches: Iterable[PackedBatch]) -> Mapping[str, int]:
    """Return the sum of the counts of several micro-batches."""
    total: Counter[str] = Counter()
    for batch in batches:
        total.update(batch.counts)
    return total
