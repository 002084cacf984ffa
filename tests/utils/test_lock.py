"""One process at a time, over all that see the file."""

import errno
import math
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import filelock
import pytest

from jepa_scale.utils import lock
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import locked
from tests.forked import in_child


def hold_in_child(path: Path) -> int:
    """Start a process that holds the lock until it is killed; return its pid."""
    ready, holds = os.pipe()

    def hold() -> None:
        with locked(path):
            os.write(holds, b"x")
            signal.pause()

    pid = in_child(hold)
    os.read(ready, 1)
    return pid


@pytest.fixture
def held(tmp_path):
    """A lock's path, and the pid of a process that holds it until it is killed."""
    path = tmp_path / "job.lock"
    pid = hold_in_child(path)
    yield path, pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_file_names_the_holder_and_goes_with_the_lock(tmp_path):
    path = tmp_path / "job.lock"
    for _ in range(2):
        with locked(path, wait=0):
            assert re.fullmatch(
                rf"process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d",
                path.read_text(),
            )
        assert not path.exists()
    with pytest.raises(ValueError), locked(path):
        raise ValueError
    assert not path.exists()


def test_a_process_that_does_not_wait_is_refused_and_learns_who_holds_it(held):
    path, pid = held
    with pytest.raises(InputError) as refused, locked(path, wait=0):
        pass
    since = path.read_text().partition(", since ")[2]
    assert str(refused.value) == (
        f"{path.parent}: is in use by process {pid} on {socket.gethostname()}, since {since}; wait for it or choose another folder"
    )
    path.write_text("")
    with pytest.raises(InputError, match="by another process; wait"), locked(path, wait=0):
        pass


def test_a_process_that_waits_gets_it(held, monkeypatch):
    """Here from a holder that ends while the other has long begun to wait."""
    path, pid = held
    monkeypatch.setattr(lock, "POLL", 0.01)
    end = threading.Timer(5 * lock.TRY, os.kill, (pid, signal.SIGKILL))
    end.start()
    with locked(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "job.lock"
    pid = hold_in_child(path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.exists()
    with locked(path, wait=0):
        pass
    assert not path.exists()


def test_a_process_that_was_forked_meanwhile_does_not_keep_it(tmp_path):
    """Such as a worker of a loader, which lives on."""
    path = tmp_path / "job.lock"
    with locked(path):
        pid = in_child(signal.pause)
    try:
        with locked(path, wait=0):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_locks_exclude_each_other(tmp_path, monkeypatch):
    """Waiters come in one after another although each holder removes the lock's file."""
    monkeypatch.setattr(lock, "POLL", 0.001)
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add() -> None:
        for _ in range(20):
            with locked(tmp_path / "job.lock"):
                value = int(counter.read_text())
                time.sleep(0.0005)
                counter.write_text(str(value + 1))

    pids = [in_child(add) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert counter.read_text() == "80"


@pytest.mark.parametrize("wait", [math.inf, 0.0])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number, wait):
    """None of them is answered by a file that merely stands there: it would outlive a killed process."""

    def none(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    path = tmp_path / "job.lock"
    with pytest.raises(InputError, match=f"^{path}: the file system has no locks"), locked(path, wait):
        pass


def test_another_error_is_not_hidden(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error, locked(tmp_path / "file" / "job.lock"):
        pass
    assert error.value.errno in (errno.ENOTDIR, errno.EEXIST) and not isinstance(error.value, filelock.Timeout)
