"""Everything is a segment: flat token streams without padding, and the packer that makes them.

A *segment* is a run of tokens that attend only to each other. A *stream* is many segments laid end to end with their
boundaries in ``cu_seqlens``. A micro-batch holds one or more streams, because an objective may send different segments
through different parts of the decoder (names through the lower blocks, answers through all of them).

Because attention is causal, a view that begins like another segment of its sample need not be computed again: its own
tokens are a *branch*, whose queries also see the first n tokens of the other segment, the branch's *parent*. The parent
never sees the branch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position from which nothing is predicted (the convention of ``torch.nn.functional.cross_entropy``)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that attend only within themselves, and, in a branch, to the beginning of another segment.

    Attributes:
        tokens: n token ids.
        role: what the segment is to its objective, e.g. ``"forward"``; the objective finds it by this name.
        labels: n ids; ``labels[t]`` is the token to predict *from* position t (already shifted), ``IGNORE`` for none.
            ``None`` means nothing is predicted.
        positions: n position ids; ``None`` means 0 … n-1, in a branch those that follow its prefix.
        stream: the stream that the segment travels in.
        key: segments of one micro-batch with the same stream, role and key are packed once and shared by their samples.
        places: name → offsets of tokens within the segment, those that the objective reads out or puts something in.
        prefix: makes the segment a branch: (role, m), its tokens see the first m ≥ 1 tokens of the sample's one segment of
            that role too. That segment travels in the same stream and is no branch itself; a branch has no ``key``.
    """

    tokens: Sequence[int]
    role: str
    labels: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    stream: str = "main"
    key: Hashable = None
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
    prefix: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Views:
    """What an objective makes of one example.

    Attributes:
        segments: its segments.
        values: name → an array of the same shape for every sample; they are stacked.
        rows: name → an array with a row for each of whatever a sample may have a varying number of, a horizon for each of
            its pairs perhaps; they are laid end to end.
        counts: added up over the global batch; they are the denominators of the objective's means.
        seed: where the model's own random choices for this sample come from, in [0, 2⁶²); the loader sets it.
    """

    segments: list[Segment]
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Where the segments of a stream lie.

    Attributes:
        cu_seqlens: (S+1,) int32 on the stream's device; segment s is ``[cu_seqlens[s], cu_seqlens[s+1])``.
        lengths: the S lengths as plain integers, so that no kernel choice needs a device-to-host copy.
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
    """What the segments of a stream with branches see: keys and values are rows of the stream, some of them several times.

    Attributes:
        index: (T_k,) int64, the rows; of a branch, first those of its prefix, then its own.
        table: where the segments' keys lie within ``index``; the segments are those of the stream, in its order.
    """

    index: Tensor
    table: SegmentTable

    def to(self, device: torch.device | str) -> KeyRows:
        return KeyRows(self.index.to(device, non_blocking=True), self.table.to(device))


@dataclass(frozen=True, slots=True)
class PackedStream:
    """One flat stream.

    Attributes:
        input_ids: (T,) int64. position_ids: (T,) int64. labels: (T,) int64 with ``IGNORE``.
        labelled: (L,) int64, the places in the stream that have a label, so that the LM head runs on them alone.
        table: where the segments lie.
        keys: what they see, if there is a branch among them; ``None`` = each itself.
        seeds: (S,) int64, another one for each segment of a sample and wherever the segment lies; ``None`` = not packed
            from views. A shared segment has that of the first sample that asks for it.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    labelled: Tensor
    table: SegmentTable
    keys: KeyRows | None = None
    seeds: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Of each segment, the tokens that its last one sees: its own and, in a branch, those of its prefix."""
        return (self.table if self.keys is None else self.keys.table).lengths

    @property
    def first(self) -> Tensor:
        """(S,) place of each segment's first token."""
        return self.table.cu_seqlens[:-1].long()

    @property
    def last(self) -> Tensor:
        """(S,) place of each segment's last token."""
        return self.table.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str) -> PackedStream:
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return PackedStream(
            move(self.input_ids),
            move(self.position_ids),
            move(self.labels),
            move(self.labelled),
            self.table.to(device),
            None if self.keys is None else self.keys.to(device),
            None if self.seeds is None else move(self.seeds),
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank.

    Attributes:
        streams: the streams by name.
        segments: role → (n,) int64, the number of the segment within its stream, one entry for every segment that the
            samples asked for (a shared segment appears more than once).
        samples: role → (n,) int64, the sample (row of ``values``) that each of those entries belongs to.
        values: name → (N, …) stacked over the N samples.
        places: name → (n,) int64, tokens of the stream that the segments named so, sample by sample.
        rows: name → (n, …) laid end to end, sample by sample.
        counts: name → the sum over this micro-batch, plain integers.
        totals: name → 0-d float tensor, the sum over the *global* batch (all ranks, all micro-batches). Set by the loop.
        max_samples: samples in the largest micro-batch of the step, of any rank: what ranks pad to when they gather rows.
        step: optimizer step that the batch belongs to; ``seed``: the run's seed.
    """

    streams: dict[str, PackedStream]
    segments: dict[str, Tensor]
    samples: dict[str, Tensor]
    values: dict[str, Tensor]
    places: dict[str, Tensor]
    rows: dict[str, Tensor]
    counts: dict[str, int]
    totals: dict[str, Tensor] = field(default_factory=dict)
    max_samples: int = 1
    step: int = 0
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.streams.values())

    def to(self, device: torch.device | str) -> PackedBatch:
        move = lambda d: {k: v.to(device, non_blocking=True) for k, v in d.items()}  # noqa: E731
        return replace(
            self,
            streams={k: s.to(device) for k, s in self.streams.items()},
            segments=move(self.segments),
            samples=move(self.samples),
            values=move(self.values),
            places=move(self.places),
            rows=move(self.rows),
            totals=move(self.totals),
        )


def pack_stream(
    segments: Sequence[Segment], parents: Mapping[int, int] | None = None, seeds: Sequence[int] | None = None
) -> PackedStream:
    """Lay segments end to end in the order given. An empty list gives one unlabelled filler token, because every rank
    must run the same modules even when it has nothing to say (ZeRO-3 and FSDP2 wait for each other).

    Args:
        parents: number of a branch → number of the segment that its ``prefix`` is part of; of every branch.
        seeds: of each segment.
    """
    if not segments:
        segments, seeds = [Segment(tokens=[0], role="filler")], None if seeds is None else [0]
    lengths = [len(s.tokens) for s in segments]
    total = sum(lengths)
    ids = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    labels = np.full(total, IGNORE, dtype=np.int64)
    at = 0
    for segment, n in zip(segments, lengths, strict=True):
        if n == 0:
            raise ValueError(f"a segment of role {segment.role!r} has no tokens; leave it out instead")
        for what in (segment.labels, segment.positions):
            assert what is None or len(what) == n, f"role {segment.role!r}: {len(what)} labels or positions, {n} tokens"
        ids[at : at + n] = segment.tokens
        assert segment.prefix is None or parents, f"role {segment.role!r}: a branch without a parent"
        start = 0 if segment.prefix is None else segment.prefix[1]
        positions[at : at + n] = np.arange(start, start + n) if segment.positions is None else segment.positions
        if segment.labels is not None:
            labels[at : at + n] = segment.labels
        at += n
    return PackedStream(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        labelled=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        table=SegmentTable.from_lengths(lengths),
        keys=_key_rows(lengths, _prefix_lengths(segments), parents) if parents else None,
        seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.int64),
    )


def _prefix_lengths(segments: Iterable[Segment]) -> list[int]:
    return [0 if s.prefix is None else s.prefix[1] for s in segments]


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
    streams: Sequence[str] = ("main",),
    step: int = 0,
    seed: int = 0,
    max_samples: int | None = None,
    like: Views | None = None,
) -> PackedBatch:
    """Pack the views of a micro-batch's samples.

    Segments are laid out by length, and by the length of their prefix, so that equal shapes are neighbours and the CPU
    attention can batch them as plain slices; ``segments`` and ``samples`` say which is whose. ``counts["tokens"]``,
    ``["labels"]`` and ``["samples"]`` are always there; a branch's tokens are its own alone.

    Args:
        max_samples: of the largest micro-batch of the step; by default this one is the largest.
        like: views that an empty micro-batch takes its roles, values and their shapes from, with zero rows of each.

    Raises:
        ValueError: a segment names a stream that is not in ``streams``, or a prefix that there isn't.
    """
    unique: dict[str, list[Segment]] = {name: [] for name in streams}
    seeds: dict[str, list[int]] = {name: [] for name in streams}  # of those
    parents: dict[str, dict[int, int]] = {name: {} for name in streams}  # numbers there: of a branch → of its parent
    seen: dict[tuple[str, str, Hashable], int] = {}
    refs: dict[str, list[int]] = {}
    owners: dict[str, list[int]] = {}
    stream_of: dict[str, str] = {}
    marked: dict[str, list[tuple[str, int, Sequence[int]]]] = {}  # name → stream, number of the segment, offsets
    counts: dict[str, int] = {"samples": len(views)}
    for sample, view in enumerate(views):
        for name, n in view.counts.items():
            counts[name] = counts.get(name, 0) + n
        numbers: list[int] = []  # of the sample's segments
        branches: list[int] = []  # which of them are branches
        for segment in view.segments:
            if segment.stream not in unique:
                raise ValueError(f"segment of role {segment.role!r} names the unknown stream {segment.stream!r}")
            pool = unique[segment.stream]
            number = len(pool)
            if segment.key is not None:
                number = seen.setdefault((segment.stream, segment.role, segment.key), number)
            if number == len(pool):
                pool.append(segment)
                seeds[segment.stream].append(view.seed + len(numbers))  # whoever uses them hashes them
            if segment.prefix is not None:
                branches.append(len(numbers))
            numbers.append(number)
            refs.setdefault(segment.role, []).append(number)
            owners.setdefault(segment.role, []).append(sample)
            stream_of[segment.role] = segment.stream
            for name, offsets in segment.places.items():
                marked.setdefault(name, []).append((segment.stream, number, offsets))
        for i in branches:  # resolved only now: a branch may come before its parent
            segment = view.segments[i]
            parents[segment.stream][numbers[i]] = numbers[_parent(segment, view.segments)]

    packed: dict[str, PackedStream] = {}
    place: dict[str, np.ndarray] = {}  # number in the order asked for → number in the stream
    for name, pool in unique.items():
        lengths = [len(s.tokens) for s in pool]  # the first thing to sort by: lexsort takes it last
        order = np.lexsort((_prefix_lengths(pool), lengths)) if parents[name] else np.argsort(lengths, kind="stable")
        place[name] = np.empty(len(pool), dtype=np.int64)
        place[name][order] = np.arange(len(pool))
        moved = {int(place[name][branch]): int(place[name][parent]) for branch, parent in parents[name].items()}
        packed[name] = pack_stream([pool[i] for i in order], moved, [seeds[name][i] for i in order])

    counts["tokens"] = sum(len(s.tokens) for pool in unique.values() for s in pool)
    counts["labels"] = sum(len(p.labelled) for p in packed.values())
    values = {name: _stack([v.values[name] for v in views]) for name in (views[0].values if views else {})}
    rows = {name: _rows([v.rows[name] for v in views]) for name in (views[0].rows if views else {})}
    starts = {name: stream.table.cu_seqlens.numpy() for name, stream in packed.items()}
    places = {
        name: _rows([starts[stream][place[stream][n]] + np.asarray(offsets, np.int64) for stream, n, offsets in marks])
        for name, marks in marked.items()
    }
    if not views and like is not None:
        values = {name: _stack([value])[:0] for name, value in like.values.items()}
        rows = {name: _rows([value])[:0] for name, value in like.rows.items()}
        places = {name: torch.zeros(0, dtype=torch.int64) for segment in like.segments for name in segment.places}
        counts |= dict.fromkeys(like.counts, 0)
        for segment in like.segments:
            refs[segment.role], owners[segment.role], stream_of[segment.role] = [], [], segment.stream
    return PackedBatch(
        streams=packed,
        segments={
            role: torch.from_numpy(place[stream_of[role]][np.asarray(numbers, dtype=np.int64)])
            for role, numbers in refs.items()
        },
        samples={role: torch.as_tensor(rows, dtype=torch.int64) for role, rows in owners.items()},
        values=values,
        places=places,
        rows=rows,
        counts=counts,
        max_samples=max(1, len(views)) if max_samples is None else max_samples,
        step=step,
        seed=seed,
    )


def _parent(branch: Segment, segments: Sequence[Segment]) -> int:
    """Which of a sample's segments a branch's prefix is part of."""
    assert branch.prefix is not None
    role, n = branch.prefix
    found = [i for i, segment in enumerate(segments) if segment.role == role]
    trouble = ""
    if branch.key is not None:
        trouble = "a branch is never shared: it takes no key"
    elif len(found) != 1:
        trouble = f"the sample has {len(found)} segments of that role, not one"
    elif (parent := segments[found[0]]).prefix is not None:
        trouble = "that segment is a branch itself"
    elif parent.stream != branch.stream:
        trouble = f"that segment travels in the stream {parent.stream!r}, not in {branch.stream!r}"
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
    """Sum of the counts of several micro-batches."""
    total: dict[str, int] = {}
    for batch in batches:
        for name, n in batch.counts.items():
            total[name] = total.get(name, 0) + n
    return total
