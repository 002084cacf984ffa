"""Raw data as split → records: the parts of every format's reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_scale.data.base import Kind
from jepa_scale.data.files.raw import Damaged, RawFile, RemoteFile
from jepa_scale.data.prepare.base import BadRecord, Record

Items = Iterator[Record | BadRecord]

HASHED_WHOLE = 256 * 2**20
"""Bytes up to which the whole content of a file is hashed; of a larger one size, time of change, first and last MiB."""
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids that the data bring along, so that no tokenizer is needed.

    Attributes:
        vocab_size: one more than the largest token id.
        special: token ids with a meaning, by name.
        file: the file that defines them, to be kept beside the shards, or None.
    """

    vocab_size: int
    special: dict[str, Any]
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One split: ``read`` starts from the beginning at every call; ``count`` is None if not known."""

    read: Callable[[], Items]
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A reader of raw data as records, in an order that never changes. Picklable if its functions are.

    Attributes:
        kind: kind of the records.
        parts: split → its part: ``train``, and the splits that the data themselves hold (``valid``, ``test`` …).
        identify: function that returns the fingerprint.
        vocabulary: vocabulary of data that are token ids already, else None.
        cut: whether ``valid`` was cut off the training text already, by ``valid_fraction``.
    """

    kind: Kind
    parts: Mapping[str, Part]
    identify: Callable[[], str]
    vocabulary: Vocabulary | None = None
    cut: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def fingerprint(self) -> str:
        """SHA-256 in hex of the content, to detect a changed file; cheap where the files are large."""
        return self.identify()

    def count(self, split: str) -> int | None:
        """Return the number of records of a split, None if it is not known before the end."""
        return self.parts[split].count

    def records(self, split: str) -> Items:
        """Yield all records in order. One that cannot be read is yielded as a BadRecord, and the next one follows."""
        return self.parts[split].read()


def read_each(read: Callable[[RawFile], Items], files: Iterable[RawFile]) -> Items:
    """Yield the records of several files, one after another. What follows the damage in a compressed file is a bad record."""
    for file in files:
        try:
            yield from read(file)
        except Damaged as error:
            yield BadRecord(str(file), "damaged compression", str(error).removeprefix(f"{file}: "))


def identity(*parts: Any) -> str:
    """Return the SHA-256 in hex of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def identify_files(splits: Mapping[str, tuple[RawFile, ...]], root: Path | str, *choices: Any) -> str:
    """Return the SHA-256 in hex of files (names relative to ``root``, contents) and of the options that pick
    records."""
    files = {split: [(relative(path, root), hash_file(path)) for path in paths] for split, paths in splits.items()}
    return identity(files, *choices)


def relative(file: RawFile, root: Path | str) -> str:
    """Return the name of a file relative to a folder, or to the address of one; its own name if it lies elsewhere."""
    if isinstance(file, RemoteFile):
        return str(file).removeprefix(f"{root}/") if str(file).startswith(f"{root}/") else file.name
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def hash_file(path: RawFile) -> str:
    """Return the SHA-256 in hex of a file's content; see ``HASHED_WHOLE`` for large ones, :meth:`RemoteFile.fingerprint`
    for those elsewhere."""
    if isinstance(path, RemoteFile):
        return path.fingerprint()
    stat = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if stat.st_size > HASHED_WHOLE:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
            digest.update(file.read(_CHUNK))
            file.seek(-_CHUNK, 2)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
