"""The cache of downloaded files: each is downloaded once, also for several processes, and together they have a bounded size."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jepa_scale.data.files.download import download
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import locked

CACHE_BYTES = 100 * 10**9
SHARDS, RAW = "shards", "raw"
"""Folders of the cache that hold downloads: prepared shards, and raw data."""


def cache_dir(named: str | None = None) -> Path:
    """Return the folder of downloads, prepared data and trained tokenizers.

    It is ``named``, else ``$JEPA_SCALE_CACHE``, else ``~/.cache/jepa_scale``.
    """
    return Path(named or os.environ.get("JEPA_SCALE_CACHE") or Path.home() / ".cache" / "jepa_scale").expanduser()


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of downloads.

    Attributes:
        folder: :func:`cache_dir` or the like; downloads are in its subfolders ``SHARDS`` and ``RAW``.
        limit: size limit in bytes of all downloads together; the least recently opened is deleted first. It must be enough
            for the files that all processes of a host read at the same time, else they are downloaded again and again.
    """

    folder: Path
    limit: int = CACHE_BYTES

    def fetch(
        self,
        path: Path,
        address: str,
        sha256: str | None = None,
        size: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Path:
        """Download a file to ``path`` if it is not there, and return ``path``. Its use is recorded as the file's mtime.

        A deleted file stays readable for a process that has it open (POSIX). A process that opens it must expect it to
        be gone, and fetch it again.

        Args:
            sha256: SHA-256 of the content, checked during the download, None = unknown. size: bytes, None = unknown.
            check: called after the download and before the file gets its name; it raises if the file is not the wanted one.

        Raises:
            Refused: the server has no such file, or one of another size or content.
            InputError: it cannot be downloaded now, credentials are missing, or ``path`` cannot be written.
        """
        try:
            if not _is_here(path, size):
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path.parent / f".{path.name}.lock"):
                    if not _is_here(path, size):  # else another process was faster
                        self._download(path, address, sha256, size, check)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}; make room or cache elsewhere") from None
        return path

    def _download(
        self, path: Path, address: str, sha256: str | None, size: int | None, check: Callable[[], None]
    ) -> None:
        for left_over in path.parent.glob(f"{path.name}.*.partial"):  # we have the lock, so its writer is dead
            left_over.unlink(missing_ok=True)
        self.evict(size or 0)
        partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
        try:
            download(address, partial, sha256, size)
            check()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def evict(self, wanted: int) -> None:
        """Delete the downloads that were opened least recently, until ``wanted`` more bytes are within the limit.

        Of shards only the tar files are deleted. Their index files and unfinished downloads count, but stay.
        """
        files = []
        for path in [path for name in (SHARDS, RAW) for path in (self.folder / name).rglob("*")]:
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files) + wanted
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            raw = path.is_relative_to(self.folder / RAW) and path.suffix not in (".partial", ".lock")
            if raw or path.suffix == ".tar":
                path.unlink(missing_ok=True)
                total -= size


def _is_here(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return False
    with suppress(OSError):  # a cache that others filled may be read-only
        os.utime(path)
    return size is None or found == size
