"""Files of raw data: on this machine or behind an address, compressed or not, opened in one way."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from jepa_scale.config.values import is_url
from jepa_scale.data.files.addresses import Refused, explained, filesystem, redacted_url
from jepa_scale.data.files.cache import RAW, Cache, cache_dir
from jepa_scale.data.files.download import with_retries
from jepa_scale.data.files.suffixes import split_name
from jepa_scale.utils.errors import InputError

_BUFFER = 1 << 20
_VERSIONS = (  # names under which file systems report a version, the surest first
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "blob_id", "sha"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "modify"),
)
_NO_VERSION = "unknown "


class Damaged(InputError):
    """A compressed file whose content cannot be decompressed to its end."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind an address. It is downloaded whole when it is read, and kept in the cache.

    Attributes:
        address: the URL. size: bytes, None = the server does not say.
        version: ETag, checksum or time of change, as the file system reports it. Without one a file is downloaded again by each
            command.
    """

    address: str
    size: int | None
    version: str
    cache: Cache

    def __str__(self) -> str:
        return redacted_url(self.address)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(str(self)).name

    def fetch(self) -> Path:
        """Return the path of the downloaded file. It may be deleted at any time, as :meth:`Cache.fetch` says.

        Raises:
            InputError: the file cannot be downloaded, or is of another version.
        """
        key = hashlib.sha256(json.dumps([self.address, self.size, self.version]).encode()).hexdigest()[:32]
        try:
            return self.cache.fetch(
                self.cache.folder / RAW / key, self.address, size=self.size, check=self._is_still_the_same
            )
        except Refused as error:
            raise InputError(f"{self}: {error}; correct the address") from None

    def fingerprint(self) -> str:
        """SHA-256 in hex of address and version; of the content where the server reports no version."""
        if not self.version.startswith(_NO_VERSION):
            return hashlib.sha256(json.dumps([self.address, self.size, self.version]).encode()).hexdigest()
        with _stored(self) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    def _is_still_the_same(self) -> None:
        if not self.version.startswith(_NO_VERSION) and describe(self.address, self.cache).version != self.version:
            raise InputError(f"{self}: has changed since the command began; start again")


RawFile = Path | RemoteFile


def raw_file(path: str, cache: Cache | None = None) -> RawFile:
    """Return the file of a path or address. A local file may be missing.

    Raises:
        InputError: the address cannot be read.
    """
    if not is_url(path):
        return Path(path).expanduser()
    try:
        return describe(path, cache or Cache(cache_dir()))
    except Refused as error:
        raise InputError(f"{redacted_url(path)}: {error}; correct the address") from None


def describe(address: str, cache: Cache) -> RemoteFile:
    """Ask for size and version of one file.

    Raises:
        Refused: there is no such file. InputError: it cannot be asked for now, or credentials are missing.
    """
    return remote_file(address, info_of(address), cache)


def info_of(address: str) -> dict[str, Any]:
    """Return what the file system knows about an address, with ``type`` (file or directory) and ``size``."""

    def ask() -> dict[str, Any]:
        with explained(address):
            system, path = filesystem(address)
            system.invalidate_cache()
            return dict(system.info(path))

    return with_retries(ask, address)


def remote_file(address: str, info: dict[str, Any], cache: Cache) -> RemoteFile:
    """Make a file of an entry of a listing.

    Raises:
        Refused: a web server answers with a page.
    """
    if info.get("mimetype") == "text/html" and split_name(PurePosixPath(redacted_url(address)).name)[0] not in (
        ".html",
        ".htm",
    ):
        raise Refused("is a web page, not a file of data")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), _NO_VERSION + uuid.uuid4().hex)
    size = info.get("size")
    return RemoteFile(address, size if isinstance(size, int) else None, version, cache)


def open_raw(file: RawFile) -> BinaryIO:
    """Open a file for reading its content, decompressed. It can be sought in only if it is not compressed.

    Raises:
        OSError: a local file cannot be opened.
        InputError: a remote file cannot be downloaded. Damaged: while reading, where the compressed data are damaged.
    """
    compression = split_name(file.name)[1]
    stored = _stored(file)
    if compression is None:
        return stored
    return io.BufferedReader(_Decompressed(str(file), compression, stored), _BUFFER)


def open_seekable(file: RawFile) -> BinaryIO:
    """Open a file as :func:`open_raw`, for reading at any position. Compressed content is unpacked into a temporary file."""
    if split_name(file.name)[1] is None:
        return open_raw(file)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with open_raw(file) as content:
        shutil.copyfileobj(content, unpacked, _BUFFER)
    unpacked.seek(0)
    return cast(BinaryIO, unpacked)


def read_raw(file: RawFile) -> bytes:
    """Read the whole content of a file, decompressed."""
    with open_raw(file) as content:
        return content.read()


def _stored(file: RawFile) -> BinaryIO:
    if isinstance(file, Path):
        return open(file, "rb")
    for _ in range(3):
        try:
            return open(file.fetch(), "rb")
        except FileNotFoundError:  # another process has deleted it from the cache
            continue
    raise InputError(f"{file}: is deleted from the cache as soon as it is there; raise cache_gb")


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. A fault of the compressed data is a :class:`Damaged` that names the file."""

    def __init__(self, name: str, compression: str, stored: BinaryIO) -> None:
        self._name, self._stored = name, stored
        self._content = _decompressor(compression, stored)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._content.readinto(buffer))
        except (EOFError, OSError, ValueError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self._damaged(error) from None
        except Exception as error:  # lzma has an exception of its own
            if type(error).__name__ != "LZMAError":
                raise
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> Damaged:
        return Damaged(f"{self._name}: cannot be decompressed: {' '.join(str(error).split())}; restore the file")

    def close(self) -> None:
        if not self.closed:
            self._content.close()
            self._stored.close()
        super().close()


def _decompressor(compression: str, stored: BinaryIO) -> Any:
    if compression == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=stored)
    if compression == ".bz2":
        import bz2

        return bz2.BZ2File(stored)
    if compression == ".xz":
        import lzma

        return lzma.LZMAFile(stored)
    import pyarrow  # reads several frames, and notices a missing end

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, mode="r"), "zstd")
