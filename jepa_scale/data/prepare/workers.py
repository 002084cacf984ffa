"""Worker processes that make shards of blocks and return the results in order."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from jepa_scale.data.prepare.blocks import Block, Done, ShardMaker, finished
from jepa_scale.utils import allocator
from jepa_scale.utils.errors import InputError

BLOCKS_PER_PROCESS = 2
"""Blocks per process that are in memory at a time, including those in progress."""
WORTH_A_WORKER = 16 * 2**20
"""Raw bytes that one process makes by itself before it starts a worker with a faster ``malloc``, which takes seconds."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that make shards of blocks. Leaving the context kills them at once, even while they work.

    Processes are spawned, not forked: the caller may hold a CUDA context, and the threads of ``tokenizers`` and ``datasets``
    do not survive a fork. They are connected by pipes, because the queues of an executor can hang when a worker dies during
    the transfer of a large block. A process is started when a block is waiting and no process is idle. A single block is
    made in this process, because starting another takes seconds.

    They have tcmalloc where it is installed, which this process cannot get any more. So one process alone leaves the blocks to
    one worker too, after ``WORTH_A_WORKER``.
    """

    def __init__(self, make: ShardMaker, processes: int) -> None:
        """Set up without starting a process; with ``processes`` = 1 small work is done in this process, as all is without tcmalloc."""
        self._make, self._processes = make, processes
        self._here = processes == 1
        self._left_here = WORTH_A_WORKER if allocator.to_preload() and allocator.in_use() == "system" else math.inf
        self._started: list[tuple[SpawnProcess, Connection]] = []
        self._idle: list[Connection] = []
        self._busy: list[Connection] = []
        self._waiting: deque[tuple[int, Block]] = deque()
        self._results: dict[int, tuple[Done | Exception, bool]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for process, pipe in self._started:
            process.kill()
            pipe.close()
        for process, _ in self._started:
            process.join()

    def finish(self, blocks: Iterable[Block]) -> Iterator[tuple[Done, bool]]:
        """Yield the result of each block, in order, and whether it was finished by an earlier run.

        At most ``BLOCKS_PER_PROCESS * processes`` blocks are in memory at a time.

        Raises:
            InputError: the first failure of reader or encoder in the order of the records; it is the same for any number
                of processes.
        """
        submitted = yielded = 0
        source = iter(blocks)
        failed = False
        while not failed:
            try:
                block = next(source, None)
            except Exception as error:  # raised in order: an earlier block may fail first
                self._results[submitted] = (error, False)
                submitted += 1
                break
            if block is None:
                break
            there = finished(self._make.folder, block)
            if there is not None:
                self._results[submitted] = (there, True)
            else:
                self._submit(submitted, block)
            submitted += 1
            while yielded in self._results:
                yield self._take_result(yielded)
                yielded += 1
            failed = any(isinstance(result, Exception) for result, _ in self._results.values())
        if self._waiting and not self._started:
            self._make_here(*self._waiting.popleft())
        while yielded < submitted:
            while yielded not in self._results:
                self._collect(None)
            yield self._take_result(yielded)
            yielded += 1

    def _take_result(self, number: int) -> tuple[Done, bool]:
        result, there = self._results.pop(number)
        if isinstance(result, Exception):
            raise result
        return result, there

    def _submit(self, number: int, block: Block) -> None:
        if self._here:
            self._make_here(number, block)
            self._left_here -= block.size
            self._here = self._left_here > 0
            return
        self._waiting.append((number, block))
        self._collect(0)
        if self._started or len(self._waiting) > 1:  # else this may be the only block
            for _ in range(1 if self._started else 2):
                if self._waiting and len(self._started) < self._processes:
                    self._busy.append(self._spawn())  # busy until it reports that it is ready
        while len(self._waiting) + len(self._busy) >= BLOCKS_PER_PROCESS * self._processes:
            self._collect(None)

    def _make_here(self, number: int, block: Block) -> None:
        try:
            self._results[number] = (self._make(block), False)
        except Exception as error:
            self._results[number] = (error, False)

    def _collect(self, timeout: float | None) -> None:
        """Receive the results of the workers and send them waiting blocks. Without a timeout, wait for at least one."""
        for pipe in wait(self._busy, timeout) if self._busy else ():
            assert isinstance(pipe, Connection)
            try:
                answer: tuple[int, Done | Exception] | None = pipe.recv()
            except (EOFError, OSError):
                raise self._ended(pipe) from None
            if answer is not None:
                self._results[answer[0]] = (answer[1], False)
            self._busy.remove(pipe)
            self._idle.append(pipe)
        while self._idle and self._waiting:
            pipe = self._idle.pop()
            self._busy.append(pipe)
            try:
                pipe.send(self._waiting.popleft())
            except OSError:
                raise self._ended(pipe) from None

    def _spawn(self) -> Connection:
        resource_tracker.ensure_running()  # started later, it would unblock the signals
        mine, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(self._make, theirs), daemon=True, name=f"prepare-{len(self._started)}"
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited: no Ctrl-C while the worker imports
        main = sys.modules["__main__"]
        # a spawned process imports the main module again. That may be a notebook, or a script without a __main__ guard,
        # which would run again. Workers do not need it.
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            with allocator.preloaded():
                process.start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._started.append((process, mine))
        return mine

    def _ended(self, pipe: Connection) -> Exception:
        (process,) = (process for process, mine in self._started if mine is pipe)
        process.join(1)
        if process.exitcode is not None and process.exitcode > 0:
            return RuntimeError(f"a worker process ended with exit code {process.exitcode}; its traceback is above")
        return InputError(
            "a worker process was killed from outside (is the memory full?); finished shards are kept: start again, "
            f"perhaps with fewer than {self._processes} processes"
        )


def _serve(make: ShardMaker, pipe: Connection) -> None:
    """Main function of a worker process: send None when ready, then (number, result) for each block received."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already one process per core
    for number in SIGNALS:  # sent to all processes of a job; the parent decides what to do
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(None)
        while True:
            number, block = pipe.recv()
            answer: Done | Exception
            try:
                answer = make(block)
            except InputError as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"making {block.shard} failed in a worker process:\n{traceback.format_exc()}")
            del block
            pipe.send((number, answer))


def _end_with_parent() -> None:
    """Exit when the parent ends, so that no orphan writes into a folder that another run has locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
