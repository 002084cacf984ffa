"""Download of a file by its address: with retries, from where a cut connection ended, checked against a checksum."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from jepa_scale.data.files.addresses import Interrupted, Refused, explained, filesystem, is_http, redacted_url
from jepa_scale.utils.errors import InputError

CHUNK = 1 << 20
BLOCK = 16 << 20
"""Bytes of a request to a store that is read by ranges."""
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try."""

T = TypeVar("T")


class Mismatch(Refused):
    """The download differs from the expected file, perhaps because it is incomplete or was put together of two versions."""


def read_from(address: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
    """Open an address at byte ``start``. This is the only place where files elsewhere are opened.

    ``pipe:COMMAND`` is run by a shell, as webdataset does it; everything else is opened by fsspec.

    Returns:
        The position of the first byte, which is 0 if the server or command cannot start later, and the chunks from there
        on. An iterator's errors are those of this function.

    Raises:
        Refused, Interrupted, InputError: as :func:`~jepa_scale.data.files.addresses.explained`.
    """
    if address.startswith("pipe:"):
        return 0, _command(address)
    with explained(address):
        system, path = filesystem(address)
        if is_http(address):  # one request for all; many servers know no ranges
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
            stream = system.open(path, "rb", block_size=0, size=1, headers=headers)
            begin = start if stream.r.status == 206 else 0
        else:
            stream = system.open(path, "rb", block_size=BLOCK, cache_type="none")
            stream.seek(start)
            begin = start
    return begin, _chunks(address, stream, CHUNK if is_http(address) else BLOCK)


def _chunks(address: str, stream: object, size: int) -> Iterator[bytes]:
    try:
        while True:
            with explained(address):
                chunk = stream.read(size)  # type: ignore[attr-defined]
            if not chunk:
                return
            yield chunk
    finally:
        stream.close()  # type: ignore[attr-defined]


def _command(address: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen  # slow to import

    stream = gopen(address, "rb")
    try:
        while chunk := stream.read(CHUNK):
            yield chunk
        stream.close()  # raises if the command failed
    except OSError:
        status = getattr(stream, "status", None)
        raise Interrupted(f"the command that reads it failed with exit code {status}") from None
    finally:
        with suppress(OSError):
            stream.close()


def with_retries(
    attempt: Callable[[], T],
    address: str,
    delays: tuple[float, ...] | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Call ``attempt()``, again after each delay if it was interrupted or did not return the expected file.

    Args:
        progress: bytes that are there; tries that got a chunk further are not counted.

    Raises:
        Refused, InputError: from ``attempt``.
        InputError: interrupted each time.
    """
    delays = RETRY_DELAYS if delays is None else delays
    tried = reached = 0
    while True:
        try:
            return attempt()
        except (Interrupted, Mismatch) as error:
            if progress() >= reached + CHUNK:
                tried, reached = 0, progress()
            tried += 1
            if tried <= len(delays):
                time.sleep(delays[tried - 1])
                continue
            if isinstance(error, Mismatch):
                raise
            raise InputError(
                f"{redacted_url(address)}: {error} (tried {tried} times); check the address and the network"
            ) from None


def read_address(address: str, delays: tuple[float, ...] | None = None) -> bytes:
    """Read a whole small file.

    Raises:
        Refused: there is no such file.
        InputError: it cannot be read now, or credentials are missing.
    """
    return with_retries(lambda: b"".join(read_from(address)[1]), address, delays)


def download(address: str, partial: Path, sha256: str | None = None, size: int | None = None) -> None:
    """Download a file to ``partial``. After a cut the next try begins where it ended, if the server can.

    Args:
        sha256: SHA-256 of the content, None = unknown. size: bytes, None = unknown.

    Raises:
        Refused: there is no such file, or it has another size or content.
        InputError: it cannot be downloaded now, or credentials are missing.
        OSError: ``partial`` cannot be written.
    """
    count, digest, resumed = 0, hashlib.sha256(), False

    def attempt() -> None:
        nonlocal count, digest, resumed
        begin, chunks = read_from(address, count)
        if begin == 0:
            count, digest = 0, hashlib.sha256()
            file.seek(0)
            file.truncate()
        resumed |= begin > 0
        for chunk in chunks:
            digest.update(chunk)
            count += len(chunk)
            if size is not None and count > size:
                raise Refused(f"is larger than the {size:,} bytes that it should have")
            file.write(chunk)
            file.flush()  # `progress` is what is there
        if size is not None and count < size:
            raise Interrupted(f"ended after {count:,} of {size:,} bytes")
        if sha256 is not None and digest.hexdigest() != sha256:
            again = size is None or resumed  # of unknown length it may be cut; resumed it may be of two versions
            count, resumed = 0, False
            raise (Mismatch if again else Refused)("its checksum is not the one of its index")

    with open(partial, "wb") as file:
        with_retries(attempt, address, progress=lambda: count)
        file.flush()
        os.fsync(file.fileno())  # a crash of the machine must not leave half a file under the final name
