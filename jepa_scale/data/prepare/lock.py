"""One process at a time in a folder, over all hosts that share it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepa_scale.utils.errors import InputError

LOCK_FILE = "job.lock"


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock; it goes when the process ends, however it ends.

    Raises:
        InputError: someone else holds it and ``wait`` is false, or the file system knows no locks.
    """
    path = folder / LOCK_FILE
    file = _acquire(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever has opened it meanwhile sees in _acquire that it is gone
        os.close(file)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino == path.stat().st_ino:
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        except BlockingIOError:
            who = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise InputError(
                f"{path.parent}: is being prepared by {who}; wait for it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(file)
                raise InputError(f"{path}: the file system knows no locks; choose a folder on another one") from None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                os.close(file)
                raise
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the former holder has removed it: there may be a new one
