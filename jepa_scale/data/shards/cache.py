"""Files by URL in a local cache of bounded size; each is downloaded once, also for several processes."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from webdataset.gopen import gopen

from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.lock import locked

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Seconds without a byte after which an http connection counts as dead."""
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try."""

T = TypeVar("T")


class ShardError(DataError):
    """Damage of a shard, found before or while it is read.

    Attributes:
        where: path or URL of the shard, for people.
        shard: its name in the index.
        member: the sample's key, with the member's extension where only that one is bad; empty = the whole shard.
        what: description of the damage.
    """

    def __init__(self, where: str, shard: str, member: str, what: str) -> None:
        super().__init__(where, shard, member, what)  # as args, so that a loader worker can pickle it
        self.where, self.shard, self.member, self.what = where, shard, member, what

    def __str__(self) -> str:
        sample = f", sample {self.member}" if self.member else ""
        return f"{self.where}{sample}: {self.what}; restore the shard, or skip damaged samples with data.on_error=skip"


class Refused(Exception):
    """The URL cannot be downloaded, and another try would not help."""


class Mismatch(Refused):
    """The download differs from the expected file. If the server sent no length, it may be incomplete."""


class Interrupted(Exception):
    """The download failed this time; another try may succeed."""


def cache_dir(named: str | None = None) -> Path:
    """Return the folder of downloads, prepared data and trained tokenizers.

    It is ``named``, else ``$JEPA_SCALE_CACHE``, else ``~/.cache/jepa_scale``.
    """
    return Path(named or os.environ.get("JEPA_SCALE_CACHE") or Path.home() / ".cache" / "jepa_scale").expanduser()


def redacted_url(url: str) -> str:
    """Return the URL for messages: without its query, which may hold a signature, and without a password."""
    return url if url.startswith("pipe:") else re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def chunks(url: str) -> Iterator[bytes]:
    """Yield the bytes of a URL.

    ``http(s)://`` is read by the standard library, ``s3://`` by ``aws s3 cp URL -``, everything else as webdataset
    opens it (``gs://`` by gsutil, ``pipe:`` by a shell).

    Raises:
        Refused, Interrupted: with a message for people.
    """
    if url.startswith(("http://", "https://")):
        return _http(url)
    return _opened(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)


def _http(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            left = response.length  # None if the server does not send a length
            while chunk := response.read(CHUNK):
                left = None if left is None else left - len(chunk)
                yield chunk
            if left:  # read() of a cut connection just ends
                raise Interrupted(f"the connection was cut {left:,} bytes before the end")
    except urllib.error.HTTPError as error:
        kind = Interrupted if error.code in (408, 425, 429) or error.code >= 500 else Refused
        raise kind(f"the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise Interrupted(f"cannot connect: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(str(error) or type(error).__name__) from None


def _opened(url: str) -> Iterator[bytes]:
    try:
        stream = gopen(url, "rb")
    except FileNotFoundError as error:
        raise Refused(f"the command {error.filename!r} that reads it is not installed") from None
    except ValueError as error:  # no handler for the scheme
        raise Refused(str(error)) from None
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


def with_retries(attempt: Callable[[], T], url: str, delays: tuple[float, ...] | None = None) -> T:
    """Call ``attempt()``, again after each delay if it was interrupted or did not return the expected file.

    Raises:
        Refused: from ``attempt``.
        InputError: interrupted each time.
    """
    delays = RETRY_DELAYS if delays is None else delays
    for delay in (*delays, None):
        try:
            return attempt()
        except (Interrupted, Mismatch) as error:
            if delay is None:
                if isinstance(error, Mismatch):
                    raise
                raise InputError(
                    f"{redacted_url(url)}: {error} (tried {len(delays) + 1} times); check the address and the network"
                ) from None
            time.sleep(delay)
    raise AssertionError


def read_url(url: str) -> bytes:
    """Read a whole small file.

    Raises:
        Refused: there is no such file.
        InputError: it cannot be downloaded now.
    """
    return with_retries(lambda: b"".join(chunks(url)), url)


@dataclass(frozen=True, slots=True)
class Remote:
    """The files of one remote folder, by URL.

    Attributes:
        template: the URL, ``{}`` in place of the file's name.
        folder: where the files of this data are kept locally; its parent holds those of other data, too.
        cache_bytes: size limit of all of them together; the least recently opened is deleted first. It must be enough
            for the shards that all processes of a host read at the same time, else they are downloaded again and again.
    """

    template: str
    folder: Path
    cache_bytes: int

    def url(self, name: str) -> str:
        return self.template.replace("{}", name)

    def fetch(self, name: str, shard: str, sha256: str, size: int | None = None) -> Path:
        """Return the path of the file in the cache; download it if it is not there. Its use is recorded as the file's
        mtime.

        A deleted file stays readable for a process that has it open (POSIX). A process that opens it must expect it to
        be gone, and fetch it again.

        Args:
            name: name of the file. shard: the shard that it belongs to, for errors.
            sha256: SHA-256 of the content, checked during the download. size: bytes, None = unknown.

        Raises:
            ShardError: the server has no such file, or one that differs from the index.
            InputError: it cannot be downloaded now.
        """
        path = self.folder / name
        url = self.url(name)
        try:
            if not self._is_here(path, size):
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder / f".{name}.lock"):
                    if not self._is_here(path, size):  # else another process was faster
                        self._download(url, path, sha256, size)
        except Refused as error:
            raise ShardError(redacted_url(url), shard, "", str(error)) from None
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}; make room or cache elsewhere") from None
        return path

    def _download(self, url: str, path: Path, sha256: str, size: int | None) -> None:
        for left_over in self.folder.glob(f"{path.name}.*.partial"):  # we have the lock, so its writer is dead
            left_over.unlink(missing_ok=True)
        evict(self.folder.parent, self.cache_bytes, size or 0)
        partial = self.folder / f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial"
        try:
            with_retries(lambda: _download(url, partial, sha256, size), url)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _is_here(self, path: Path, size: int | None) -> bool:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return False
        with suppress(OSError):  # a cache that others filled may be read-only
            os.utime(path)
        return size is None or found == size


def _download(url: str, partial: Path, sha256: str, size: int | None) -> None:
    digest, count = hashlib.sha256(), 0
    with open(partial, "wb") as file:
        for chunk in chunks(url):
            digest.update(chunk)
            count += len(chunk)
            if size is not None and count > size:
                raise Refused(f"is larger than the {size:,} bytes of its index")
            file.write(chunk)
        if size is not None and count < size:
            raise Interrupted(f"ended after {count:,} of {size:,} bytes")
        if digest.hexdigest() != sha256:
            raise (Mismatch if size is None else Refused)("its checksum is not the one of its index")
        file.flush()
        os.fsync(file.fileno())  # a crash of the machine must not leave half a file under the final name


def evict(root: Path, limit: int, wanted: int) -> None:
    """Delete the tar files under ``root`` that were opened least recently, until ``wanted`` more bytes are within the
    limit. Index files and unfinished downloads count, but stay."""
    files = []
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in files) + wanted
    for _, size, path in sorted(files):
        if total <= limit:
            break
        if path.suffix == ".tar":
            path.unlink(missing_ok=True)
            total -= size
