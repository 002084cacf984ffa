"""Real runs as processes of their own, so that a test can kill, stop, signal and watch each rank.

``Nursery`` imports everything once and forks the ranks of a run, which then start in a fraction of a second: each is a
process of its own, with its own signal handlers and exit code, that runs the command line of ``jepa_scale/train.py``.
``Launched`` is a run under a real launcher. Both end whatever they started, and nothing else. A test that must act at a
certain moment of a run puts a ``Gate`` there: the run waits at it, however fast or slow the machine is.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "JEPA_SCALE_TEST_RUN"
"""Environment variable by which the processes of a launched run are known."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONUNBUFFERED": "1",
}
Fault = dict[str, Any]
"""Name of a function of ``faults.py`` under ``"name"``, and its arguments."""


HANG = 1200.0
"""Seconds after which what has not come is taken for something that never will. It ends a hang and decides nothing else."""


def until(condition: Callable[[], Any], what: str = "it", timeout: float = HANG) -> Any:
    """Wait for a value that is true, and return it.

    Raises:
        AssertionError: there was none in ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} after {timeout} s"
        time.sleep(0.01)
    return value


class Gate:
    """A point of a run at which a rank waits until the test has acted.

    Where it stands, a fault says that is given its ``path`` (``holds_in_step``, ``holds_evaluating``, …).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def reached(self, run: Forked) -> None:
        """Wait for the rank to come to it."""
        arrived = Path(f"{self.path}.reached")
        until(lambda: arrived.exists() or run.codes, f"rank at {self.path.name}")
        assert arrived.exists(), f"a rank ended before {self.path.name}:\n{run.output()}"

    def open(self) -> None:
        Path(f"{self.path}.open").touch()


class Forked:
    """The ranks of one run, forked by a nursery.

    Attributes:
        pids: of each rank. codes: rank → exit code (negative: the signal that killed it) of those that have ended.
    """

    def __init__(self, pids: list[int], logs: list[Path], ended: threading.Condition) -> None:
        self.pids, self.logs, self._ended = pids, logs, ended
        self.codes: dict[int, int] = {}

    def send(self, rank: int, number: signal.Signals) -> None:
        """A rank that has ended already gets nothing."""
        with self._ended:
            if rank not in self.codes:
                with suppress(ProcessLookupError):  # it has just ended, and its code is on the way
                    os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for rank in range(len(self.pids)):
            self.send(rank, signal.SIGKILL)

    def wait(self, timeout: float = HANG) -> list[int]:
        """The exit codes of all ranks, by rank."""
        with self._ended:
            done = self._ended.wait_for(lambda: len(self.codes) == len(self.pids), timeout)
        assert done, f"ranks {sorted(set(range(len(self.pids))) - set(self.codes))} still run:\n{self.output()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def output(self, rank: int | None = None) -> str:
        """What a rank, or each of them in turn, has printed."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())


class Nursery:
    """A process that forks runs.

    Args:
        folder: for the ranks' output.
        prefix: command to start it under, e.g. ``["unshare", "-m", …]``.
    """

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self._folder, self._runs = folder, 0
        self._by_pid: dict[int, tuple[Forked, int]] = {}
        self._ended = threading.Condition()
        self._pids: list[int] | None = None
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def start(
        self,
        arguments: Sequence[str],
        world_size: int = 1,
        faults: Sequence[Fault] = (),
        program: str = "jepa_scale.train",
    ) -> Forked:
        """Start a run: the ranks call ``main(arguments)`` of the program after each of the ``faults`` has been put in place."""
        self._runs += 1
        logs = [self._folder / f"output_{self._runs}_{rank}.txt" for rank in range(world_size)]
        order = {
            "arguments": list(arguments),
            "logs": list(map(str, logs)),
            "faults": list(faults),
            "program": program,
        }
        assert self.process.stdin
        with self._ended:
            self._pids = None
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            assert self._ended.wait_for(lambda: self._pids, HANG), "the nursery does not answer"
            assert self._pids
            run = Forked(self._pids, logs, self._ended)
            self._by_pid.update({pid: (run, rank) for rank, pid in enumerate(self._pids)})
            self._ended.notify_all()
        return run

    def run(self, arguments: Sequence[str], *more: Any, **options: Any) -> Forked:
        """Start a run as :meth:`start` does, and wait for it to end well on every rank."""
        run = self.start(arguments, *more, **options)
        assert not any(run.wait()), run.output()
        return run

    def close(self) -> None:
        """End it, with all that it forked."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(HANG)
        finally:
            self.process.kill()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            told = json.loads(line)
            with self._ended:
                if "pids" in told:
                    self._pids = told["pids"]
                    self._ended.notify_all()
                    self._ended.wait_for(lambda told=told: told["pids"][0] in self._by_pid)  # type: ignore[misc]
                else:
                    run, rank = self._by_pid[told["pid"]]
                    run.codes[rank] = told["code"]
                    self._ended.notify_all()


@functools.cache
def shared_nursery() -> Nursery:
    """The one of all tests of this process; what it imports takes some seconds."""
    folder = Path(tempfile.mkdtemp(prefix="nursery_"))
    nursery = Nursery(folder)
    atexit.register(lambda: (nursery.close(), shutil.rmtree(folder, ignore_errors=True)))
    return nursery


@contextmanager
def held_port() -> Iterator[int]:
    """A port that a program can be told to listen on, and that nobody else gets meanwhile.

    It is bound here and not listened on: the kernel gives it to nobody who asks for a free port, and lets it be shared by
    who names it with ``SO_REUSEADDR``, as servers do.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


class Launched:
    """A command in a session of its own: a launcher and what it starts.

    Attributes:
        process: the command. log: what all of them print.

    Args:
        environment: further variables. Processes that others start for the command (sshd, slurmd) are found by ``mark``,
            if that comes to them as the variable ``MARK``.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, mark: str = ""
    ) -> None:
        self._mark, self.log = mark or uuid.uuid4().hex, log
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                list(command),
                cwd=REPOSITORY,
                env={**os.environ, **ENVIRONMENT, "PATH": path, **(environment or {}), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def marked(self) -> dict[int, dict[str, str]]:
        """pid → environment of every process of this run."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    raw = (entry / "environ").read_bytes().decode(errors="replace")
                except OSError:  # ended meanwhile, or somebody else's
                    continue
                environment = dict(pair.split("=", 1) for pair in raw.split("\0") if "=" in pair)
                if environment.get(MARK) == self._mark:
                    found[int(entry.name)] = environment
        return found

    def rank(self, number: int) -> int:
        """The pid of a rank."""

        def found() -> list[int]:
            return [pid for pid, environment in self.marked().items() if environment.get("RANK") == str(number)]

        pids = until(lambda: found() or ([0] if self.process.poll() is not None else []), f"rank {number}")
        assert pids != [0], f"ended before there was a rank {number}:\n{self.output()}"
        return pids[0]

    def wait(self, timeout: float = HANG) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Kill what is left of it."""
        while left := self.marked():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()


# -- in the nursery ---------------------------------------------------------------------------------------------------


def serve() -> int:
    """Fork as told on stdin, one order a line; tell on stdout who began and who ended. The exit code: a rank's, in a rank."""
    sys.path[:] = [str(REPOSITORY), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent)]
    from tests.distributed.launch import PRELOAD

    for name in PRELOAD:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    said, woken = os.dup(1), os.pipe2(os.O_NONBLOCK)
    os.dup2(2, 1)
    signal.set_wakeup_fd(woken[1])
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([0, woken[0]], [], [])
        if woken[0] in ready:
            os.read(woken[0], 4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                children.discard(pid)
                tell(said, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            line = read_line()
            if not line:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return 0
            order = json.loads(line)
            pids = []
            # listens before there is a rank: nobody can take its port, and who connects early waits
            listener = socket.create_server(("127.0.0.1", 0))
            for rank in range(len(order["logs"])):
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (said, *woken):
                        os.close(descriptor)
                    return be_rank(rank, order, listener)
                pids.append(pid)
            listener.close()
            children.update(pids)
            tell(said, {"pids": pids})


def tell(where: int, what: dict[str, Any]) -> None:
    os.write(where, (json.dumps(what) + "\n").encode())


def read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            break
        line += byte
    return line


def be_rank(rank: int, order: dict[str, Any], listener: socket.socket) -> int:
    """Become a rank of a run, as if started by a launcher (by plain ``python`` if it is the only one)."""
    gc.freeze()  # as in launch.py
    log = os.open(order["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    world_size, port = len(order["logs"]), listener.getsockname()[1]
    if world_size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        # the ranks find their store there, and make none; as torchrun's agent has one, rank 0 has it here
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if world_size > 1 and rank == 0:
        from torch.distributed import TCPStore

        descriptor, limit = listener.detach(), timedelta(seconds=HANG)
        store = TCPStore("127.0.0.1", port, None, True, limit, wait_for_workers=False, master_listen_fd=descriptor)
        assert store.port == port
    else:
        listener.close()

    from tests.distributed import faults

    for fault in order["faults"]:
        getattr(faults, fault["name"])(rank, **{key: value for key, value in fault.items() if key != "name"})
    code = importlib.import_module(order["program"]).main(order["arguments"])
    if code == 0:
        # nothing of ours is left to do: taking half a million objects down costs as much as a small run
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return code


if __name__ == "__main__":
    sys.exit(serve())
