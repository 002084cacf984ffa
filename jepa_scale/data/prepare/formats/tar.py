"""Existing webdataset shards: consecutive members of the same name form a sample, which is read as a row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from jepa_scale.data.files.raw import RawFile, open_seekable
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.source import Items
from jepa_scale.data.prepare.formats.table import parse
from jepa_scale.utils.errors import InputError

_BLOCK = tarfile.BLOCKSIZE
Member = tuple[str, str, bytes | BadRecord]
"""Key, extension, and content; or a bad record in place of damaged content."""


def read_tar(path: RawFile) -> Items:
    """Read samples as rows: the fields of the member ``json``, and the member ``txt`` as ``text``. Others are not used.

    A sample is named ``shard.tar:key``. A fault in any of its members makes it a bad record. If the archive itself is damaged,
    the samples before the damage are returned and the rest of the shard is lost.

    Raises:
        InputError: a sample has neither ``txt`` nor ``json``, but token ids as ``npy``.
    """
    key, members = "", dict[str, bytes]()
    for new_key, extension, content in _members(path):
        if new_key != key:
            if members:
                yield _sample(path, key, members)
            key, members = new_key, {}
        if isinstance(content, BadRecord):
            members = {}  # the sample is not whole
            yield content
        else:
            members[extension] = content
    if members:
        yield _sample(path, key, members)


def _members(path: RawFile) -> Iterator[Member]:
    """Yield the members in order; reading ends at the first damaged one.

    A damaged header whose sample is unknown counts for the sample before it, because it might have been another member of
    that sample.
    """
    key, last = "", "start"

    def lost(reason: str, detail: str) -> Member:
        return key, "", BadRecord(f"{path}:after {last}", reason, detail)

    try:
        with open_seekable(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = _size(file)
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # otherwise it keeps every member in memory
                last = member.name
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("._"):  # macOS's tar keeps attributes of a file in ._NAME
                    continue
                base, _, extension = name.partition(".")
                key = f"{folder}/{base}".lstrip("/")
                if member.offset_data + member.size > size:
                    there = f"{max(size - member.offset_data, 0)} of {member.size} bytes are there"
                    detail = f"{there}, the rest of the shard is lost"
                    yield key, "", BadRecord(f"{path}:{member.name}", "truncated tar", detail)
                    return
                content = archive.extractfile(member)
                assert content is not None
                yield key, extension.lower(), content.read()
            # tarfile takes any block that is not a header for the end; a complete archive ends with a block of zeros
            file.seek(archive.offset)
            block = file.read(_BLOCK)
            if len(block) < _BLOCK:
                yield lost("truncated tar", "the file stops before the archive's end")
            elif any(block):
                yield lost("corrupt member", "the next header is damaged, the rest is lost")
    except tarfile.TarError as error:
        end = any(word in str(error) for word in ("unexpected end", "truncated", "empty"))
        yield lost("truncated tar" if end else "corrupt member", str(error))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _size(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(position)
    return size


def _sample(path: RawFile, key: str, members: dict[str, bytes]) -> Record | BadRecord:
    row: dict[str, Any] = {}
    if "json" in members:
        value = parse(members["json"], f"{path}:{key}.json")
        if isinstance(value, BadRecord):
            return BadRecord(value.where, "corrupt member", f"{value.reason}: {value.detail}")
        if not isinstance(value, dict):
            return BadRecord(f"{path}:{key}.json", "not a row", f"must be an object, not {type(value).__name__}")
        row.update(value)
    if "txt" in members:
        try:
            row["text"] = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            detail = f"invalid UTF-8: byte {members['txt'][error.start]:#04x} at position {error.start}"
            return BadRecord(f"{path}:{key}.txt", "corrupt member", detail)
    if not row and "npy" in members:
        raise InputError(
            f"{path}:{key}.npy: the vocabulary of token ids alone is unknown; shards need the member txt, or "
            f"json with messages, text, or input and output (for ids: save {'shard_*.npy'} beside a metadata.json)"
        )
    if not row:
        return BadRecord(f"{path}:{key}", "no member txt or json", f"it has {', '.join(sorted(members))}")
    return Record(f"{path}:{key}", row, tuple(f"member .{name}" for name in members if name not in ("json", "txt")))
