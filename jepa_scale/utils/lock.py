"""A lock among all processes, also of several hosts, that share a file system."""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from jepa_scale.utils.errors import InputError

JOB_LOCK = "job.lock"
"""Name of the lock in a folder that one job at a time may fill: a run, prepared data, a conversion."""
POLL = 0.25
"""Seconds between two tries of a process that waits; hundreds of ranks may wait for one file server."""
TRY = 0.2
"""Seconds for which a process that does not wait tries: a lock that is just being released counts as free."""


class NoLocks(InputError):
    """A file system has no locks."""


@contextmanager
def locked(path: Path, wait: float = math.inf) -> Iterator[None]:
    """Hold the lock whose file is ``path``. It is free again when the process ends, however it ends.

    The file names its holder, and is removed when the lock is released.

    Args:
        wait: seconds to wait for another holder. With 0 it is ``TRY``.

    Raises:
        InputError: another process still holds it. NoLocks: the file system has none.
    """
    timeout, poll = (-1, POLL) if wait == math.inf else (max(wait, TRY), min(POLL, max(wait, TRY) / 4))
    lock = FileLock(path, timeout=timeout, poll_interval=poll, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{path.parent}: is in use by {holder(path) or 'another process'}; wait for it or choose another folder"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise NoLocks(f"{path}: the file system has no locks; choose a folder on another one") from None
        raise
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the release: a process that has opened it meanwhile finds it removed
        lock.release()


def holder(path: Path) -> str:
    """Return who holds the lock, or held it and was killed; empty if that is not known."""
    with suppress(OSError):
        return path.read_text(errors="replace")[:200]
    return ""
