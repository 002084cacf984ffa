"""Tar files of many small members, with the bytes that webdataset's ``TarWriter`` writes, without an object for each member."""

from __future__ import annotations

import tarfile

BLOCK = 512
_RECORD = 10240
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)  # of the fields of a header


def _slow_header(name: str, size: int) -> bytes:
    """Return the header of a member as tarfile makes it: for names and sizes that need an extended header too."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf()


def _blank() -> bytes:
    fields = bytearray(_slow_header("", 0))
    fields[_SIZE], fields[_CHECKSUM] = bytes(12), b" " * 8  # spaces are what the checksum counts in its own place
    return bytes(fields)


_BLANK = _blank()
_BLANK_SUM = sum(_BLANK)


def header(name: str, size: int) -> bytes:
    """Return the header of a member that nobody owns, that all may read, and that has no time."""
    encoded, digits = name.encode(), b"%011o" % size
    if len(encoded) > 100 or len(digits) > 11 or not name.isascii():
        return _slow_header(name, size)
    fields = bytearray(_BLANK)
    fields[: len(encoded)] = encoded
    fields[124:135] = digits
    fields[_CHECKSUM] = b"%06o\0 " % (_BLANK_SUM + sum(encoded) + sum(digits))
    return bytes(fields)


def member(name: str, content: bytes) -> bytes:
    """Return a member with its header, padded to whole blocks."""
    return header(name, len(content)) + content + bytes(-len(content) % BLOCK)


def end(written: int) -> bytes:
    """Return what follows the last member of a file that holds ``written`` bytes."""
    return bytes(2 * BLOCK + -(written + 2 * BLOCK) % _RECORD)
