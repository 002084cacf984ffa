"""Plain text files, read as documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

from jepa_scale.data.files.raw import RawFile, open_raw, read_raw
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.source import Items
from jepa_scale.utils.errors import InputError

_BOM = b"\xef\xbb\xbf"
_TITLE = re.compile(rb"\s*= (?!= ).*(?<! =) =\s*")


def read_text(path: RawFile, documents: str) -> Items:
    """Read the documents of a file. With ``file`` the whole file is in memory, otherwise one document at a time.

    Args:
        documents: unit of a document: ``file``; ``line``; ``paragraph``, separated by blank lines; or ``heading``, from
            one line ``= Title =`` (WikiText) to the next.
    """
    if documents == "file":
        yield from read_piece(path, 0, None)
        return
    try:
        with open_raw(path) as file:
            lines = (line if n else line.removeprefix(_BOM) for n, line in enumerate(file))
            yield from split_documents(lines, documents, partial(_line_name, path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _line_name(path: RawFile, number: int) -> str:
    return f"{path}:{number}"


def split_documents(lines: Iterable[bytes], documents: str, name: Callable[[int], str]) -> Items:
    """Group lines (line ends included) into documents by ``line``, ``paragraph`` or ``heading``.

    Blank lines between documents belong to none. A document is named after its first line, and a byte that is not UTF-8
    after its own line; ``name`` maps a line number, counted from 1, to that name.
    """
    group: list[bytes] = []
    first = 1

    def close() -> Record | BadRecord:
        data = b"".join(group)
        return document(data if documents == "heading" else data.rstrip(b"\r\n"), name(first), name, first)

    for number, line in enumerate(lines, 1):
        blank = not line.strip()
        starts = (
            documents == "line" or (documents == "paragraph" and blank) or (documents == "heading" and is_title(line))
        )
        if starts and group:
            yield close()
            group = []
        if not group:
            first = number
        if not blank or (group and documents == "heading"):
            group.append(line)
    if group:
        yield close()


def is_title(line: bytes) -> bool:
    """Return whether a line is an article's title in WikiText, `` = Title = ``; `` = = Section = = `` is not."""
    return _TITLE.fullmatch(line) is not None


def document(data: bytes, where: str, name: Callable[[int], str], first: int = 1) -> Record | BadRecord:
    """Make a record of a text that begins at line ``first``; a bad one if it is not UTF-8 or only white space."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        return BadRecord(name(line), "invalid UTF-8", f"byte {data[error.start]:#04x}; save the file as UTF-8")
    return Record(where, text) if text.strip() else BadRecord(where, "empty document")


def read_piece(path: RawFile, start: int, stop: int | None) -> Items:
    """Read bytes [start, stop) of a file as one document."""
    try:
        data = read_raw(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    first = data.count(b"\n", 0, start) + 1
    piece = data[start:stop] if start else data[:stop].removeprefix(_BOM)
    yield document(piece, f"{path}:{first}" if start else str(path), partial(_line_name, path), first)


def cut_at_line(path: RawFile, fraction: float) -> int:
    """Return the byte at which to cut a file so that about ``fraction`` of its bytes lie before the cut.

    The cut is after the last line end before that point, else after the first line end beyond it. In a file of a single
    line it is after the last space before that point, else 0.
    """
    data = read_raw(path)
    at = int(len(data) * fraction)
    before = data.rfind(b"\n", 0, at) + 1
    beyond = data.find(b"\n", at) + 1
    if before or 0 < beyond < len(data):
        return before or beyond
    return data.rfind(b" ", 0, at) + 1
