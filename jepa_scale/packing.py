"""Everything is a segment: flat token streams without padding, and the packer that makes them.

A *segment* is a run of tokens that attend only to each other. A *stream* is many segments laid end to end with their
boundaries in ``cu_seqlens``. A micro-batch holds one or more streams, because an objective may send different segments
through different parts of the decoder (names through the lower blocks, answers through all of them).
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
    """Tokens that attend only within themselves.

    Attributes:
        tokens: n token ids.
        role: what the segment is to its objective, e.g. ``"forward"``; the objective finds it by this name.
        labels: n ids; ``labels[t]`` is the token to predict *from* position t (already shifted), ``IGNORE`` for none.
            ``None`` means nothing is predicted.
        positions: n position ids; ``None`` means 0 … n-1.
        stream: the stream that the segment travels in.
        key: segments of one micro-batch with the same stream, role and key are packed once and shared by their samples.
        places: name → offsets of tokens within the segment, those that the objective reads out or puts something in.
    """

    tokens: Sequence[int]
    role: str
    labels: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    stream: str = "main"
    key: Hashable = None
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Views:
    """What an objective makes of one example.

    Attributes:
        segments: its segments.
        values: name → an array of the same shape for every sample; they are stacked.
        rows: name → an array with a row for each of whatever a sample may have a varying number of, a horizon for each of
            its pairs perhaps; they are laid end to end.
        counts: added up over the global batch; they are the denominators of the objective's means.
    """

    segments: list[Segment]
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Where the segments of a stream lie.

    Attributes:
        cu_seqlens: (S+1,) int32 on the stream's device; segment s is ``[cu_seqlens[s], cu_seqlens[s+1])``.
        lengths: the S lengths as plain integers, so that no kernel choice needs a device-to-host copy.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> SegmentTable:
        lengths = tuple(int(n) for n in lengths)
        ends = np.cumsum((0, *lengths), dtype=np.int32)
        return cls(torch.from_numpy(ends).to(device), lengths)


@dataclass(frozen=True, slots=True)
class PackedStream:
    """One flat stream.

    Attributes:
        input_ids: (T,) int64. position_ids: (T,) int64. labels: (T,) int64 with ``IGNORE``.
        labelled: (L,) int64, the places in the stream that have a label, so that the LM head runs on them alone.
        table: where the segments lie.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    labelled: Tensor
    table: SegmentTable

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

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
        table = replace(self.table, cu_seqlens=move(self.table.cu_seqlens))
        return PackedStream(
            move(self.input_ids), move(self.position_ids), move(self.labels), move(self.labelled), table
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


def pack_stream(segments: Sequence[Segment]) -> PackedStream:
    """Lay segments end to end in the order given. An empty list gives one unlabelled filler token, because every rank
    must run the same modules even when it has nothing to say (ZeRO-3 and FSDP2 wait for each other)."""
    if not segments:
        segments = [Segment(tokens=[0], role="filler")]
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
        positions[at : at + n] = np.arange(n) if segment.positions is None else segment.positions
        if segment.labels is not None:
            labels[at : at + n] = segment.labels
        at += n
    return PackedStream(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        labelled=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        table=SegmentTable.from_lengths(lengths),
    )


def pack(
    views: Sequence[Views],
    streams: Sequence[str] = ("main",),
    step: int = 0,
    seed: int = 0,
    max_samples: int | None = None,
    like: Views | None = None,
) -> PackedBatch:
    """Pack the views of a micro-batch's samples.

    Segments are laid out by length, so that equal lengths are neighbours and the CPU attention can batch them as plain
    slices; ``segments`` and ``samples`` say which is whose. ``counts["tokens"]``, ``["labels"]`` and ``["samples"]``
    are always there.

    Args:
        max_samples: of the largest micro-batch of the step; by default this one is the largest.
        like: views that an empty micro-batch takes its roles, values and their shapes from, with zero rows of each.

    Raises:
        ValueError: a segment names a stream that is not in ``streams``.
    """
    unique: dict[str, list[Segment]] = {name: [] for name in streams}
    seen: dict[tuple[str, str, Hashable], int] = {}
    refs: dict[str, list[int]] = {}
    owners: dict[str, list[int]] = {}
    stream_of: dict[str, str] = {}
    marked: dict[str, list[tuple[str, int, Sequence[int]]]] = {}  # name → stream, number of the segment, offsets
    counts: dict[str, int] = {"samples": len(views)}
    for sample, view in enumerate(views):
        for name, n in view.counts.items():
            counts[name] = counts.get(name, 0) + n
        for segment in view.segments:
            if segment.stream not in unique:
                raise ValueError(f"segment of role {segment.role!r} names the unknown stream {segment.stream!r}")
            pool = unique[segment.stream]
            number = len(pool)
            if segment.key is not None:
                number = seen.setdefault((segment.stream, segment.role, segment.key), number)
            if number == len(pool):
                pool.append(segment)
            refs.setdefault(segment.role, []).append(number)
            owners.setdefault(segment.role, []).append(sample)
            stream_of[segment.role] = segment.stream
            for name, offsets in segment.places.items():
                marked.setdefault(name, []).append((segment.stream, number, offsets))

    packed: dict[str, PackedStream] = {}
    place: dict[str, np.ndarray] = {}  # number in the order asked for → number in the stream
    for name, pool in unique.items():
        order = np.argsort([len(s.tokens) for s in pool], kind="stable")
        packed[name] = pack_stream([pool[i] for i in order])
        place[name] = np.empty(len(pool), dtype=np.int64)
        place[name][order] = np.arange(len(pool))

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
