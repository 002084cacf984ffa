"""A small reader and encoder: a line is a record, a word is a token."""

import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.shards.format import Sample
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True)
class LineReader:
    """``train.txt``, ``valid.txt`` … of a folder; the line ``unreadable`` is, and ``break`` ends the job."""

    folder: Path
    kind: str = "text"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted(file.stem for file in self.folder.glob("*.txt")))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"\0".join((self.folder / f"{s}.txt").read_bytes() for s in self.splits)).hexdigest()

    def count(self, split: str) -> int | None:
        return len((self.folder / f"{split}.txt").read_text().splitlines())

    def records(self, split: str) -> Iterator[Record | BadRecord]:
        for number, line in enumerate((self.folder / f"{split}.txt").read_text().splitlines(), 1):
            where = f"{split}.txt:{number}"
            if line == "break":
                raise InputError(f"{where}: the file breaks off")
            yield BadRecord(where, "unreadable", "it says so") if line == "unreadable" else Record(where, line)


@dataclass(frozen=True)
class WordEncoder:
    """Takes ``delay`` seconds a record, hours for ``slow`` if any at all, and writes its name into ``log``."""

    delay: float = 0.0
    log: Path | None = None
    vocab_size: int = 1000
    tokenizer_fingerprint: str = "words"

    @property
    def special(self) -> dict[str, Any]:
        return {"eos": 0}

    def __call__(self, record: Record) -> list[Sample]:
        time.sleep(self.delay * (1e6 if record.value == "slow" else 1))
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{record.where}\n")
        words = record.value.split()
        if not words:
            raise BadRecord(record.where, "empty document")
        ids = np.array([zlib.crc32(word.encode()) % 1000 for word in words], dtype=np.uint16)
        return [Sample({"npy": part}, len(part)) for part in np.array_split(ids, 1 + (len(ids) > 8))]

    def unused(self, record: Record) -> tuple[str, ...]:
        return ()

    def save(self, folder: Path) -> bool:
        (folder / "tokenizer.json").write_text("{}")
        return True


def open_reader(path: str, options: PrepareOptions, cache: object = None) -> LineReader:
    return LineReader(Path(path))


def make_encoder(reader: LineReader, options: PrepareOptions, cache: Path) -> WordEncoder:
    log = os.environ.get("LINES_LOG")
    return WordEncoder(
        float(os.environ.get("LINES_DELAY", "0")),
        Path(log) if log else None,
        tokenizer_fingerprint=options.tokenizer,
    )
