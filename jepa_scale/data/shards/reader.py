"""Examples of prepared shards by number: random access through the shards' index files, with every byte checked."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np

from jepa_scale.data.examples import Conversation, Document, GridSequence, LabelledTokens
from jepa_scale.data.shards.decode import BadSample, decode, truncate
from jepa_scale.data.shards.format import SAMPLE
from jepa_scale.data.shards.locate import Located
from jepa_scale.data.shards.remote import ShardError
from jepa_scale.utils.errors import InputError

Example = Document | LabelledTokens | Conversation | GridSequence | dict[str, Any]
Long = Literal["split", "drop", "truncate", "error"]
ALLOWED: dict[str, tuple[Long, ...]] = {
    "text": ("split", "drop", "truncate", "error"),
    "tokens": ("drop", "truncate", "error"),
    "chat": ("drop", "truncate", "error"),
    "grids": ("drop", "error"),
    "reversal": ("drop", "error"),
}
"""Possible treatments of a sample that is too long, by kind of data."""

OPEN_SHARDS = 64
"""Shards that a process keeps open: for each a file descriptor, and a table of 28 bytes a sample and 24 a piece."""
FRACTION_SEED = 0
"""Seed of the choice of a fraction of the pieces: runs of any seed use the same pieces."""
DECODED = 8
"""Documents that a process keeps decoded, because pieces of the same document are often read one after another."""


@dataclass(frozen=True, slots=True)
class _Table:
    """A shard's samples and the pieces made of them.

    Attributes:
        start, stop: (n,) int64, byte range of each sample in the tar file.
        tokens: (n,) int64, tokens of each sample.
        crc: (n,) uint32, CRC-32 of each sample's bytes.
        sample, first: (p,) int64, each piece's sample and its first token within that sample.
        size: (p,) int64, tokens of each piece.
    """

    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray
    crc: np.ndarray
    sample: np.ndarray
    first: np.ndarray
    size: np.ndarray


@lru_cache(maxsize=64)  # most shards have the same number of samples
def _header(samples: int) -> bytes:
    """Return what ``numpy.save`` writes before the rows of an index file."""
    raw = io.BytesIO()
    values = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(raw, values)
    return raw.getvalue()


def _parse(raw: bytes, samples: int) -> Any:
    """Return the array in an index file. Only an unexpected header is parsed: that takes most of the time with 10,000 shards."""
    header = _header(samples)
    if raw.startswith(header) and len(raw) == len(header) + samples * SAMPLE.itemsize:
        return np.frombuffer(raw, SAMPLE, offset=len(header))
    return np.load(io.BytesIO(raw), allow_pickle=False)


class _File:
    """A file descriptor that is closed when the last reference to it is dropped."""

    __slots__ = ("fd",)

    def __init__(self, path: os.PathLike[str]) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardExamples(Sequence[Example]):
    """The examples of one split: one for each sample, or several pieces of a long sample.

    Piece k of a text is ``tokens[k·L : (k + 1)·L + 1]``: at most L inputs and, as the last label, the first token of the
    next piece. So every token except the text's first is predicted exactly once. Pieces are numbered in the order of the
    index. Files are fetched and opened when they are needed; a process keeps at most ``OPEN_SHARDS`` of them open. The object
    can be pickled and forked; the copies share no mutable state (reads use no file position).

    Args:
        located: the shards.
        split: one of ``located.index.splits``.
        max_length: L, inputs of a piece (its tokens less one).
        long: treatment of a sample of more than L + 1 tokens: ``split`` it, ``drop`` it, ``truncate`` it to L + 1 tokens,
            or raise an ``error``; see ``ALLOWED``.
        fraction: in (0, 1]; ⌈fraction · total⌉ pieces are used, chosen at random in each shard, always the same ones.
        train_all: predict every token of a conversation instead of the assistant's only.
        on_error: if a shard's index file is missing or damaged, ``stop`` with the error or ``skip`` the shard.

    Attributes:
        shard_lengths: (S,) int64 pieces of each shard of the split, in the order of the index; may be 0.
        counts: counts over the whole split, for any fraction: ``samples``, ``pieces``, ``too_short`` (fewer than two tokens,
            left out), ``split`` (into more than one piece), ``dropped``, ``truncated``, ``lost`` (in skipped shards).
        lost: names of the skipped shards; part of the fingerprint, because their loss renumbers the pieces.
        max_size: tokens of the largest piece of the whole split.
        mean_size: mean tokens of a piece.

    Raises:
        ShardError: a shard's index file is missing or damaged (``error.shard`` names the shard).
        InputError: the split does not exist, ``long`` is not allowed for the kind, or a sample is too long (``error``).
    """

    def __init__(
        self,
        located: Located,
        split: str,
        *,
        max_length: int,
        long: Long,
        fraction: float = 1.0,
        train_all: bool = False,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        index = located.index
        assert max_length >= 1 and 0 < fraction <= 1, (max_length, fraction)
        if split not in index.splits:
            raise InputError(f"{located.where}: has no split {split!r}; it has {', '.join(sorted(index.splits))}")
        if long not in ALLOWED[index.kind]:
            what = "a conversation cannot be split" if index.kind == "chat" else f"{index.kind} cannot be cut"
            raise InputError(f"data.long: {long}: {what}; use {' or '.join(ALLOWED[index.kind])}")
        self.located, self.split, self.kind = located, split, index.kind
        self.max_length, self.long, self.fraction, self.train_all = max_length, long, fraction, train_all
        self.shards = index.splits[split]
        self.counts = dict.fromkeys(("samples", "pieces", "too_short", "split", "dropped", "truncated", "lost"), 0)
        self.lost: list[str] = []
        self.max_size = self._tokens = 0
        self._refused: dict[int, ShardError] = {}
        self._make_caches()
        lengths = np.zeros(len(self.shards), dtype=np.int64)
        for number, shard in enumerate(self.shards):
            try:
                lengths[number] = self._count(number)
            except ShardError:
                if on_error == "stop":
                    raise
                self.lost.append(shard.name)
                self.counts["lost"] += shard.samples
        total = int(lengths.sum())
        kept = math.ceil(Fraction(str(fraction)) * total)  # exact decimal arithmetic: 0.07 · 100 is 7
        # each shard has its share; Python's integers, as the product may exceed 64 bits
        ends = np.array(
            [kept * end // total for end in np.cumsum(lengths).tolist()] if total else lengths, dtype=np.int64
        )
        self.shard_lengths = np.diff(ends, prepend=0)
        self._ends: list[int] = ends.tolist()
        self._starts: list[int] = (ends - self.shard_lengths).tolist()

    def _make_caches(self) -> None:
        self._table = lru_cache(OPEN_SHARDS)(self._read_table)
        self._file = lru_cache(OPEN_SHARDS)(self._open)
        self._document = lru_cache(DECODED)(self._read_document)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_table", "_file", "_document")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that determines the examples and their order."""
        fraction = (
            self.fraction if self.fraction == 1 else ["random", self.fraction]
        )  # version 0.1 took the first pieces
        values = [self.split, self.max_length, self.long, fraction, self.train_all, self.lost]
        return hashlib.sha256(json.dumps([self.located.index.fingerprint, *values]).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def mean_size(self) -> float:
        return self._tokens / max(self.counts["pieces"], 1)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the token counts, (m,) int64, of pieces with the given numbers, (m,) int64. Reads only index files."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if not len(numbers):
            return numbers.copy()
        assert numbers.min() >= 0 and numbers.max() < len(self), "no such piece"
        shards = np.searchsorted(self._ends, numbers, side="right")
        order = np.argsort(shards, kind="stable")
        found, begins = np.unique(shards[order], return_index=True)
        sizes = np.empty(len(numbers), dtype=np.int64)
        for shard, rows in zip(found.tolist(), np.split(order, begins[1:]), strict=True):
            sizes[rows] = self._table(shard).size[numbers[rows] - self._starts[shard]]
        return sizes

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        """Return the example of a piece.

        Raises:
            ShardError: a shard or a sample is missing or damaged; the message names it.
            InputError: a shard cannot be fetched now.
        """
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = int(number)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"piece {number} of {len(self)}")
        shard = bisect_right(self._ends, number)
        table = self._table(shard)
        place = number - self._starts[shard]
        sample, first, size = table.sample.item(place), table.first.item(place), table.size.item(place)
        if self.long == "split":
            tokens = self._document(shard, sample)
            return Document(tokens if size == len(tokens) else tokens[first : first + size])
        example = self._read(shard, sample)
        if self.long == "truncate" and size < table.tokens.item(sample):
            assert isinstance(example, Document | LabelledTokens | Conversation)
            return truncate(example, size)
        return example

    def _read_document(self, shard: int, sample: int) -> np.ndarray:
        document = self._read(shard, sample)
        assert isinstance(document, Document)
        return document.tokens

    def _read(self, shard: int, sample: int) -> Example:
        """Read and decode a whole sample."""
        table, file = self._table(shard), self._file(shard)
        start, stop = table.start.item(sample), table.stop.item(sample)
        try:
            data = os.pread(file.fd, stop - start, start)
        except OSError as error:
            raise self._error(shard, sample, f"cannot be read ({error.strerror})") from None
        if len(data) < stop - start:
            raise self._error(shard, sample, "the file ends before it; the shard is truncated")
        if zlib.crc32(data) != table.crc.item(sample):
            raise self._error(shard, sample, "checksum differs; the shard is damaged")
        try:
            return decode(data, self.kind, table.tokens.item(sample), self.located.index.vocab_size, self.train_all)
        except BadSample as error:
            raise self._error(shard, sample, error.what, error.extension) from None

    def _open(self, shard: int) -> _File:
        """Open a shard's file, and fetch it if necessary.

        It is not memory-mapped: if a file is truncated or a disk fails, a read raises an error, but access to a map would
        kill the process with SIGBUS.
        """
        if shard in self._refused:
            raise self._refused[shard]
        name = self.shards[shard].name
        for _ in range(3):
            try:
                path = self.located.fetch(name)
                return _File(path)
            except FileNotFoundError:  # another process has deleted it from the cache
                continue
            except OSError as error:
                raise ShardError(str(path), name, "", f"cannot be opened ({error.strerror})") from None
            except ShardError as error:  # do not download it again for each of its samples
                self._refused[shard] = error
                raise
        raise ShardError(self._label(shard), name, "", "is missing")

    def _count(self, shard: int) -> int:
        """Return the number of pieces of a shard, and add the shard to ``counts``."""
        tokens = self._rows(shard)["tokens"].astype(np.int64)
        too_short, too_long = tokens < 2, tokens > self.max_length + 1
        if self.long == "error" and too_long.any():
            sample = int(too_long.argmax())
            raise InputError(
                f"{self._label(shard)}, sample {self._key(shard, sample)}{self._where(shard, sample)}: has "
                f"{tokens[sample]:,} tokens, and "
                f"data.max_length={self.max_length} allows {self.max_length + 1:,}; raise it, or choose another data.long: "
                f"{', '.join(ALLOWED[self.kind])}"
            )
        lengths = self._pieces(tokens)
        counts = {
            "samples": len(tokens),
            "pieces": int(lengths.sum()),
            "too_short": int(too_short.sum()),
            {"split": "split", "drop": "dropped"}.get(self.long, "truncated"): int(too_long.sum()),
        }
        for key, count in counts.items():
            self.counts[key] += count
        used = tokens[lengths > 0]
        whole = used if self.long == "split" else np.minimum(used, self.max_length + 1)
        overlaps = counts["pieces"] - len(used)  # consecutive pieces of a sample share one token
        self._tokens += int(whole.sum()) + overlaps
        if len(used):
            self.max_size = max(self.max_size, min(int(used.max()), self.max_length + 1))
        return counts["pieces"]

    def _pieces(self, tokens: np.ndarray) -> np.ndarray:
        """Return the number of pieces, (n,), of samples with the given token counts, (n,)."""
        if self.long == "split":
            return np.maximum(-(-(tokens - 1) // self.max_length), 0)
        fits = tokens >= 2
        return (fits & (tokens <= self.max_length + 1) if self.long == "drop" else fits).astype(np.int64)

    def _read_table(self, shard: int) -> _Table:
        rows = self._rows(shard)
        tokens = rows["tokens"].astype(np.int64)
        lengths = self._pieces(tokens)
        sample = np.repeat(np.arange(len(tokens)), lengths)
        before = np.cumsum(lengths) - lengths
        first = (np.arange(len(sample)) - before[sample]) * self.max_length
        size = np.minimum(tokens[sample] - first, self.max_length + 1)
        if self.fraction < 1:
            chosen = np.random.default_rng([FRACTION_SEED, shard]).permutation(len(sample))
            chosen = np.sort(chosen[: self.shard_lengths[shard]])
            sample, first, size = sample[chosen], first[chosen], size[chosen]
        start, stop = rows["start"].astype(np.int64), rows["stop"].astype(np.int64)
        return _Table(start, stop, tokens, rows["crc"].copy(), sample, first, size)

    def _rows(self, shard: int) -> np.ndarray:
        """Read a shard's index file, (n,) rows of dtype ``SAMPLE``."""
        info = self.shards[shard]
        path = self.located.fetch_index(info.name)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ShardError(str(path), info.name, "", f"cannot be read ({error.strerror})") from None
        if hashlib.sha256(raw).hexdigest() != info.index_sha256:
            raise ShardError(
                str(path), info.name, "", f"checksum differs; it is damaged or is not the index of {info.name}"
            )
        try:
            rows = _parse(raw, info.samples)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise ShardError(str(path), info.name, "", f"is no index of a shard ({error})") from None
        if not isinstance(rows, np.ndarray) or rows.dtype != SAMPLE or rows.shape != (info.samples,):
            raise ShardError(
                str(path), info.name, "", f"does not have the {info.samples:,} samples of the folder's index"
            )
        wrong = (rows["stop"] > info.bytes) | (rows["start"] > rows["stop"])
        wrong |= rows["tokens"] > rows["stop"] - rows["start"]  # a token takes two bytes
        if wrong.any():
            sample = int(wrong.argmax())
            raise ShardError(
                str(path), info.name, self._key(shard, sample), "has bytes or tokens that cannot be in the shard"
            )
        return rows

    def _label(self, shard: int) -> str:
        """Return the shard's name for messages: the path of the file that is read, so that it can be inspected."""
        return str(self.located.path(self.shards[shard].name))

    def _key(self, shard: int, sample: int) -> str:
        return f"{self.shards[shard].name.removesuffix('.tar')}-{sample:06d}"

    def _where(self, shard: int, sample: int) -> str:
        """Return `` (file:line)`` of a sample's source row, or an empty string if unknown."""
        with suppress(ShardError, InputError):
            where = getattr(self._read(shard, sample), "where", "")
            return f" ({where})" if where else ""
        return ""

    def _error(self, shard: int, sample: int, what: str, extension: str = "") -> ShardError:
        member = self._key(shard, sample) + (f".{extension}" if extension else "")
        if not self.located.is_local:
            what += " (this is a cached copy; delete it to fetch it again)"
        return ShardError(self._label(shard), self.shards[shard].name, member, what)
