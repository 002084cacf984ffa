"""A lock among all processes, also of several hosts, that share a file system."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from jepa_scale.utils.errors import InputError

JOB_LOCK = "job.lock"
"""Name of the lock in a folder that one job at a time may fill."""
POLL = 0.25
"""Seconds between two tries of a process that waits; hundreds of ranks may wait for one file server."""
TRY = 0.2
"""Seconds for which a process that does not wait tries: a lock that is just being released counts as free."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock whose file is ``path``. It is free again when the process ends, however it ends.

    The file names its holder, and is removed when the lock is released.

    Raises:
        InputError: another process holds it and ``wait`` is false, or the file system has no locks.
    """
    lock = FileLock(path, timeout=-1 if wait else TRY, poll_interval=POLL if wait else TRY / 4, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{path.parent}: is being prepared by {_holder(path)}; wait for it or choose another folder"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise InputError(f"{path}: the file system has no locks; choose a folder on another one") from None
        raise
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: a process that has opened it meanwhile finds it removed
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")[:200] or "another process"
    return "another process"
