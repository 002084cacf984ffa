"""Blocks of raw records; each block becomes one shard and a file that records its completion."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepa_scale.data.prepare.base import BadRecord, Encoder, LeftOut, Record
from jepa_scale.data.shards.format import Sample, ShardInfo, index_name, write_shard
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import sha256_of, write_atomic

BLOCK_BYTES = 64 * 2**20
"""A block is closed when its raw values reach this size (:func:`raw_size`), even with few records."""
DONE_SUFFIX = ".done.json"
EXAMPLES = 3
"""Largest number of bad records named per reason."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of a split, from record ``first`` on, that become shard ``number``; ``size`` by :func:`raw_size`."""

    split: str
    number: int
    first: int
    records: list[Record | BadRecord]
    size: int = 0

    @property
    def shard(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a finished block.

    Attributes:
        first: number of the block's first record in its split.
        records: number of its records, bad ones included.
        shard: None if all records are bad; the shard numbers then have a gap.
        skipped: reason → number of records left out.
        examples: reason → the names of the first few of them, for messages.
        unused: name of a column or field that is not used → number of records that have it.
    """

    first: int
    records: int
    shard: ShardInfo | None
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


def raw_size(value: Any) -> int:
    """Estimate the bytes of a raw value; equal values have the same size on any machine."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(raw_size(k) + raw_size(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return 8 + sum(raw_size(v) for v in value)
    return value.nbytes if isinstance(value, np.ndarray) else 8


def cut(records: Iterable[Record | BadRecord], split: str, most: int) -> Iterator[Block]:
    """Cut records into blocks of ``most``, or fewer if they reach ``BLOCK_BYTES``. The cuts depend on the records alone."""
    number, first, size = 0, 0, 0
    held: list[Record | BadRecord] = []
    for record in records:
        held.append(record)
        size += raw_size(record.value) if isinstance(record, Record) else 0
        if len(held) == most or size >= BLOCK_BYTES:
            yield Block(split, number, first, held, size)
            number, first, size, held = number + 1, first + len(held), 0, []
    if held:
        yield Block(split, number, first, held, size)


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Callable that turns a block into a shard; picklable, so that worker processes can call it."""

    folder: Path
    encoder: Encoder
    on_error: Literal["stop", "skip"]

    def __call__(self, block: Block) -> Done:
        """Encode the block's records, write its shard, and then the file that records its completion.

        Raises:
            InputError: a record is bad and ``on_error`` is stop, or the shard cannot be written.
        """
        samples, skipped, examples, unused = self._encode(block)
        try:
            info = write_shard(self.folder, block.shard, samples) if samples else None
            done = Done(block.first, len(block.records), info, skipped, examples, dict(unused))
            write_atomic(_done_file(self.folder, block.shard), json.dumps(asdict(done)).encode())
        except OSError as error:
            raise cannot_write(error, self.folder / block.shard) from None
        return done

    def _encode(self, block: Block) -> tuple[list[Sample], dict[str, int], dict[str, list[str]], Counter[str]]:
        samples: list[Sample] = []
        unused: Counter[str] = Counter()
        skipped: dict[str, int] = {}
        examples: dict[str, list[str]] = {}
        for record in block.records:
            try:
                if isinstance(record, BadRecord):
                    raise record
                made = self.encoder(record)
                assert made, f"{record.where}: the encoder made no samples of it"
                samples += made
                unused.update({*record.unused, *self.encoder.unused(record)})
            except BadRecord as bad:
                if self.on_error == "stop" and not isinstance(bad, LeftOut):
                    raise InputError(f"{bad}; fix it, or leave it out with on_error=skip") from None
                skipped[bad.reason] = skipped.get(bad.reason, 0) + 1
                if len(named := examples.setdefault(bad.reason, [])) < EXAMPLES:
                    named.append(f"{bad.where}: {bad.detail}" if bad.detail else bad.where)
        return samples, skipped, examples, unused


def finished(folder: Path, block: Block) -> Done | None:
    """Return the block's result from an earlier run if its files are complete, else None.

    Shard and index are read and hashed. That is about ten times as fast as tokenizing, and keeps files that a crash left
    half written out of the data.
    """
    try:
        values = json.loads(_done_file(folder, block.shard).read_bytes())
        info = ShardInfo(**values.pop("shard")) if values["shard"] else values.pop("shard")
        done = Done(shard=info, **values)
        whole = info is None or (
            (folder / info.name).stat().st_size == info.bytes
            and sha256_of(folder / info.name) == info.sha256
            and sha256_of(folder / index_name(info.name)) == info.index_sha256
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    same = (done.first, done.records) == (block.first, len(block.records))
    return done if same and whole else None


def cannot_write(error: OSError, file: Path) -> InputError:
    """Make a one-line error for a full disk, a missing permission or the like. It names the error's own file, else ``file``."""
    name = os.fsdecode(error.filename or file)
    what = " ".join(str(error.strerror or error).split())
    return InputError(f"{name}: {what}; correct this and start again: finished shards are kept")


def _done_file(folder: Path, shard: str) -> Path:
    return folder / (shard.removesuffix(".tar") + DONE_SUFFIX)
