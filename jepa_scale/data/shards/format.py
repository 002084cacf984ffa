"""Shards on disk: webdataset tar files, one index per shard, and one index of the folder.

DIR/
  index.json              the folder's contents: kind, splits, shards, tokenizer, special ids, fingerprint
  tokenizer/              the tokenizer, as transformers saves it (when there is one)
  train-000000.tar        samples; any webdataset reader can read them
  train-000000.idx.npy    (n,) where each sample lies in the tar, its checksum and its number of tokens

A sample's members by kind: ``text`` has ``npy`` (token ids); ``tokens`` has ``npy`` and, unless every next token is predicted,
``labels.npy`` (the label predicted at each token, -100 for none); ``chat`` has ``npy`` and ``json`` (``messages``,
in ``turns`` the token span [start, stop) of each, and in ``where`` the row it was); ``reversal`` and ``grids`` have
``json`` alone (of grids: ``context``, ``target`` and ``where``).
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from webdataset import TarWriter

from jepa_scale.data.base import Kind
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

FORMAT = 1
INDEX_FILE = "index.json"
SAMPLE = np.dtype([("start", "<u8"), ("stop", "<u8"), ("crc", "<u4"), ("tokens", "<u4")])
"""A row of a shard's index: the sample is bytes [start, stop) of the tar, headers and padding included; ``crc`` is their
CRC-32."""


Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
LEAST_BYTES = 512
"""Least bytes of a sample in a tar: the header of a member."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard's entry in the index: samples, tokens, bytes of the tar, SHA-256 of the tar and of its index file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    samples: Count
    tokens: Count
    bytes: Count
    sha256: str
    index_sha256: str


@dataclass(frozen=True, slots=True)
class Index:
    """The index of a folder of shards.

    Attributes:
        kind: kind of the samples: ``text``, ``tokens``, ``chat``, ``reversal`` or ``grids``.
        splits: name of a split → its shards; ``train`` is the training data.
        vocab_size: one more than the largest token id that the tokenizer may give.
        special: token ids with a meaning, by name (``eos``, ``pad``, ``mask`` …).
        tokenizer: name of the tokenizer's folder beside the index, or None.
        tokenizer_fingerprint: SHA-256 of the parts of the tokenizer that determine the ids; data of equal fingerprints
            can be mixed.
        skipped: reason → how many records of the source were left out.
        made_from: the raw data and the options of the preparation; for people to read.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Kind
    splits: dict[str, list[ShardInfo]]
    vocab_size: Annotated[int, Strict(), Field(ge=1, le=2**32)]
    special: dict[str, Any]
    tokenizer: str | None = None
    tokenizer_fingerprint: str = ""
    skipped: dict[str, Count] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the examples depend on."""
        shards = {split: [s.sha256 for s in shards] for split, shards in self.splits.items()}
        text = json.dumps(
            [FORMAT, self.kind, shards, self.vocab_size, self.special, self.tokenizer_fingerprint], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, **asdict(self)}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write the index. It is written last: a folder with an index is complete."""
        write_atomic(folder / INDEX_FILE, self.to_json().encode())

    @classmethod
    def from_json(cls, text: str, where: str) -> Index:
        """Parse an index; InputError if it is damaged or has another format. ``where`` is its name in the message."""
        try:
            values = json.loads(text)
            found, fingerprint = values.pop("format"), values.pop("fingerprint")
            if found != FORMAT:
                raise InputError(f"{where}: is of format {found}, this version reads format {FORMAT}; prepare it again")
            index = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where}: {key}: {first['msg'].lower()}; prepare the data again") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where}: not an index of shards ({error}); prepare the data again") from None
        if index.fingerprint != fingerprint:
            raise InputError(
                f"{where}: contradicts its own fingerprint; it was changed by hand, prepare the data again"
            )
        for shard in (shard for shards in index.splits.values() for shard in shards):
            if shard.samples * LEAST_BYTES > shard.bytes or shard.tokens > shard.bytes:
                raise InputError(
                    f"{where}: {shard.name} cannot hold {shard.samples:,} samples of {shard.tokens:,} tokens in "
                    f"{shard.bytes:,} bytes; prepare the data again"
                )
        return index

    @classmethod
    def read(cls, folder: Path) -> Index:
        file = folder / INDEX_FILE
        try:
            return cls.from_json(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample to be written: ``members`` maps an extension to a NumPy array (``npy``, ``labels.npy``) or JSON value (``json``)."""

    members: Mapping[str, Any]
    tokens: int


def index_name(shard: str) -> str:
    """Return the name of a shard's index: ``train-000000.tar`` → ``train-000000.idx.npy``."""
    return shard.removesuffix(".tar") + ".idx.npy"


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> ShardInfo:
    """Write a shard and its index; the same samples give the same bytes. Each file appears under its name only when it
    is complete and on the disk, the tar last.

    Raises:
        ValueError: there are no samples.
    """
    partial = folder / f"{name}.partial"
    stem = name.removesuffix(".tar")
    ends, tokens = [0], []
    with open(partial, "wb") as file:
        with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
            for number, sample in enumerate(samples):
                members = {extension: _encode(extension, value) for extension, value in sample.members.items()}
                writer.write({"__key__": f"{stem}-{number:06d}", **members})
                ends.append(writer.tarstream.offset)
                tokens.append(sample.tokens)
        file.flush()
        os.fsync(file.fileno())
    if not tokens:
        partial.unlink()
        raise ValueError(f"{name}: a shard must hold at least one sample")
    with open(partial, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    table = np.empty(len(tokens), dtype=SAMPLE)
    table["start"], table["stop"], table["tokens"] = ends[:-1], ends[1:], tokens
    table["crc"] = [zlib.crc32(data[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    digest = hashlib.sha256(data)
    raw = io.BytesIO()
    np.save(raw, table)
    write_atomic(folder / index_name(name), raw.getvalue())
    os.replace(partial, folder / name)
    return ShardInfo(
        name=name,
        samples=len(tokens),
        tokens=int(table["tokens"].sum()),
        bytes=len(data),
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(raw.getvalue()).hexdigest(),
    )


def _encode(extension: str, value: Any) -> bytes:
    if extension.endswith("npy"):
        raw = io.BytesIO()
        np.save(raw, value)
        return raw.getvalue()
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds the token ids."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
