"""Real runs in processes of their own, so that a test can kill, stop, signal and watch each rank.

``ProcessPool`` imports everything once and forks the ranks of a run, which then start in a fraction of a second. Each rank is a
process with its own signal handlers and exit code, which runs the command line of ``jepa_scale/train.py``. ``Launched`` is a
run under a real launcher. Both end the processes that they started, and no others. A test that must act at a certain point
of a run installs a ``Gate`` there, at which the run waits, however fast or slow the machine is.
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
"""Environment variable that marks the processes of a launched run."""
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
"""Seconds after which a wait counts as a hang. The limit only ends hangs; no result depends on it."""


def until(condition: Callable[[], Any], what: str = "it", timeout: float = HANG) -> Any:
    """Wait until the condition returns a true value, and return that.

    Raises:
        AssertionError: it did not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} after {timeout} s"
        time.sleep(0.01)
    return value


class Gate:
    """A point of a run at which a rank waits until the test opens it.

    A fault that gets the gate's ``path`` determines the point (``holds_in_step``, ``holds_evaluating``, …).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def reached(self, run: Forked) -> None:
        """Wait until the rank has reached the gate."""
        arrived = Path(f"{self.path}.reached")
        until(lambda: arrived.exists() or run.codes, f"rank at {self.path.name}")
        assert arrived.exists(), f"a rank ended before {self.path.name}:\n{run.output()}"

    def open(self) -> None:
        Path(f"{self.path}.open").touch()


class Forked:
    """The ranks of one run, forked by a ``ProcessPool``.

    Attributes:
        pids: process id of each rank.
        codes: rank → exit code of the ranks that have ended; a negative one is the signal that killed the rank.
    """

    def __init__(self, pids: list[int], logs: list[Path], ended: threading.Condition) -> None:
        self.pids, self.logs, self._ended = pids, logs, ended
        self.codes: dict[int, int] = {}

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank, unless it has ended."""
        with self._ended:
            if rank not in self.codes:
                with suppress(ProcessLookupError):  # it has just ended, and its code is on the way
                    os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for rank in range(len(self.pids)):
            self.send(rank, signal.SIGKILL)

    def wait(self, timeout: float = HANG) -> list[int]:
        """Wait for all ranks to end, and return their exit codes by rank."""
        with self._ended:
            done = self._ended.wait_for(lambda: len(self.codes) == len(self.pids), timeout)
        assert done, f"ranks {sorted(set(range(len(self.pids))) - set(self.codes))} still run:\n{self.output()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def output(self, rank: int | None = None) -> str:
        """Return the output of a rank, or of all ranks in turn."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())


class ProcessPool:
    """A process that forks runs.

    Args:
        folder: folder for the output of the ranks.
        prefix: command to start the process under, e.g. ``["unshare", "-m", …]``.
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
        """Start a run: each rank installs the ``faults`` and then calls ``main(arguments)`` of the program."""
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
            assert self._ended.wait_for(lambda: self._pids, HANG), "the process pool does not answer"
            assert self._pids
            run = Forked(self._pids, logs, self._ended)
            self._by_pid.update({pid: (run, rank) for rank, pid in enumerate(self._pids)})
            self._ended.notify_all()
        return run

    def run(self, arguments: Sequence[str], *more: Any, **options: Any) -> Forked:
        """Start a run as :meth:`start` does, and wait until it has ended without error on every rank."""
        run = self.start(arguments, *more, **options)
        assert not any(run.wait()), run.output()
        return run

    def close(self) -> None:
        """End the process and all that it forked."""
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
def shared_process_pool() -> ProcessPool:
    """Return the ``ProcessPool`` that all tests of this process share, because its imports take some seconds."""
    folder = Path(tempfile.mkdtemp(prefix="nursery_"))
    process_pool = ProcessPool(folder)
    atexit.register(lambda: (process_pool.close(), shutil.rmtree(folder, ignore_errors=True)))
    return process_pool


@contextmanager
def held_port() -> Iterator[int]:
    """Reserve a port on which a program of the test can listen.

    The port is bound here without listening. The kernel does not assign it to processes that request any free port, but a
    server can bind it by number with ``SO_REUSEADDR``.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def default_signals() -> None:
    """Undo what ``nohup`` and a shell's ``&`` do to the signals of the tests themselves."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Launched:
    """A command in a session of its own: a launcher and the processes that it starts.

    Attributes:
        process: the command. log: output of all processes.

    Args:
        environment: further variables. Processes that daemons (sshd, slurmd) start for the command are found by ``mark``,
            if they inherit it as the variable ``MARK``.
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
                preexec_fn=default_signals,
            )

    def marked(self) -> dict[int, dict[str, str]]:
        """Return pid → environment of every process of this run."""
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
        """Return the process id of a rank."""
        from jepa_scale.training.preemption import (
            parent_of,  # imports torch, which the process pool does in its own order
        )

        def found() -> list[int]:
            ranks = [pid for pid, environment in self.marked().items() if environment.get("RANK") == str(number)]
            # its loader's workers have its environment, and after the highest process id comes a low one
            return [pid for pid in ranks if parent_of(pid) not in ranks]

        pids = until(lambda: found() or ([0] if self.process.poll() is not None else []), f"rank {number}")
        assert pids != [0], f"ended before there was a rank {number}:\n{self.output()}"
        return pids[0]

    def wait(self, timeout: float = HANG) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def wait_for_all(self) -> int:
        """Wait until every process of the run has ended, and return the exit code of the command."""
        code = self.wait()
        try:
            until(lambda: not self.marked(), "end of all processes")
        except AssertionError as error:
            raise AssertionError(f"{error}; {sorted(self.marked())} still run:\n{self.output()}") from None
        return code

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Kill the remaining processes."""
        while left := self.marked():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()


# -- in the process pool ---------------------------------------------------------------------------------------------------


def serve() -> int:
    """Fork ranks on orders from stdin, one a line, and report their starts and ends on stdout.

    In a forked rank the return value is the rank's exit code.
    """
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
    """Run as a rank, as if started by a launcher, or by plain ``python`` if it is the only rank."""
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
