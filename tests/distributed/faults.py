"""Faults of a rank. Each function installs one fault in the process that calls it, before the run starts."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def dies_writing(rank: int, who: list[int], event: int, save: int = 1) -> None:
    """Kill the process by SIGKILL right before the ``event``-th operation that changes something in ``checkpoints/``.

    Operations are counted from the start of the ``save``-th save of this process; operation 0 creates its folder. The
    operation that is prevented is printed.
    """
    if rank not in who:
        return
    seen, saves = -1, set[str]()

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == "open":
            changes = isinstance(args[0], str | os.PathLike) and bool(args[2] & WRITES)
        else:
            changes = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes and "/checkpoints/" in f"{args[0]}/":
            if name == "os.mkdir" and (folder := re.search(r"step_\d+\.partial", str(args[0]))):
                saves.add(folder[0])
            if len(saves) >= save:
                seen += 1
            if seen == event:
                os.write(1, f"killed before {name} {args[0]}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def nan_loss(rank: int, who: int, steps: list[int]) -> None:
    """Put NaN into the loss of rank ``who`` in the given steps, counted from 1 in this process."""
    after_loss(
        lambda step, loss: loss._replace(total=loss.total * torch.nan) if rank == who and step in steps else loss
    )


def holds_in_step(rank: int, who: int, step: int, gate: str) -> None:
    """Make rank ``who`` wait at a gate in the forward of a step, counted from 1 in this process."""

    def maybe(now: int, loss: Any) -> Any:
        if rank == who and now == step:
            hold(gate)
        return loss

    after_loss(maybe)


def holds_evaluating(rank: int, who: int, gate: str, evaluation: int = 1, forward: int = 1) -> None:
    """Make rank ``who`` wait at a gate in one forward of one evaluation, both counted from 1 in this process."""

    def maybe(*now: int) -> None:
        if rank == who and now == (evaluation, forward):
            hold(gate)

    in_evaluations(maybe)


def hangs(rank: int, who: int, step: int, mark: str) -> None:
    """Make rank ``who`` hang in the forward of a step, and create the file ``mark`` when the hang begins."""

    def maybe(now: int, loss: Any) -> Any:
        if rank == who and now == step:
            hang(mark)
        return loss

    after_loss(maybe)


def hangs_saving(rank: int, who: int, mark: str) -> None:
    """Make rank ``who`` hang at the start of a save."""
    from jepa_scale.checkpoint import saver

    generators = saver.rng_state

    def slow() -> Any:
        if rank == who:
            hang(mark)
        return generators()

    saver.rng_state = slow


def hangs_evaluating(rank: int, who: int, mark: str) -> None:
    """Make rank ``who`` hang before the first forward of an evaluation."""

    def slow(evaluation: int, forward: int) -> None:
        if rank == who:
            hang(mark)

    in_evaluations(slow)


def hang_begins(rank: int, mark: str, speakers: list[int]) -> None:
    """Stop the watchdog's clock until the file ``mark`` exists, and delay its verdict until all ``speakers`` have reported.

    So no rank is taken for a hanging one because the machine is slow.
    """
    from jepa_scale.training import watchdog

    began = 0.0
    verdict = watchdog.Watchdog._verdict

    def clock() -> float:
        nonlocal began
        if not began and os.path.exists(mark):
            began = time.monotonic()
        return time.monotonic() - began if began else 0.0

    def has_told(file: Path) -> bool:
        try:
            _, _, place, _ = json.loads(file.read_text())
        except (OSError, ValueError):
            return False
        return bool(place)

    def patient(self: Any) -> str:
        while not all(has_told(self._file(speaker)) for speaker in speakers):
            time.sleep(0.01)
        return verdict(self)

    watchdog.time = SimpleNamespace(monotonic=clock, sleep=time.sleep)
    watchdog.Watchdog._verdict = patient


def evaluates_long(rank: int, limit: float, forwards: int = 4) -> None:
    """Make each of the first ``forwards`` of an evaluation take most of the ``limit`` by the watchdog's clock.

    A forward ends after the watchdog has checked it. Otherwise the clock is stopped.
    """
    from jepa_scale.training import watchdog

    now, looks = 0.0, threading.Semaphore(0)

    def clock() -> float:
        if threading.current_thread().name == "watchdog":
            looks.release()
        return now

    def slow(evaluation: int, forward: int) -> None:
        nonlocal now
        if forward <= forwards:
            now += 0.9 * limit
            while looks.acquire(blocking=False):
                pass
            for _ in range(3):  # it asks for the time once a look, and may have been in the middle of one
                looks.acquire()
        elif forward == forwards + 1:
            print(f"evaluating for {now / limit:.1f} times the limit", flush=True)

    watchdog.time = SimpleNamespace(monotonic=clock, sleep=time.sleep)
    in_evaluations(slow)


def impatient(rank: int) -> None:
    """Retry a failed save without a pause."""
    from jepa_scale.checkpoint import saver

    saver.RETRY_DELAYS = (0.02, 0.05)


def no_room(rank: int, who: int, before: str, tries: int) -> None:
    """Limit the size of the files of rank ``who`` in its first ``tries`` to save.

    The limit is 8 kB. It applies from the start of writing the ``"tensors"``, or of the ``"generators"`` after them, whose file
    has 16 kB.
    """
    from jepa_scale.checkpoint import saver

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    write, tried = saver.store.write, 0

    def limited(*args: Any) -> Any:
        nonlocal tried
        tried += 1
        limit = (1 << 13 if rank == who and tried <= tries else most, most)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit if before == "tensors" else (most, most))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    saver.store.write = limited


def bound_by_permissions(rank: int) -> None:
    """Make file permissions apply to this process even if it runs as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def after_loss(change: Any) -> None:
    """Call ``change(step, loss)`` on each language-modelling loss with gradient; steps count from 1 in this process."""
    from jepa_scale.objectives.lm import LanguageModeling

    real, step = LanguageModeling.loss, 0

    def loss(self: Any, *args: Any) -> Any:
        nonlocal step
        step += torch.is_grad_enabled()
        return change(step, real(self, *args))

    LanguageModeling.loss = loss


def in_evaluations(before: Any) -> None:
    """Call ``before(evaluation, forward)`` right before each forward of an evaluation, both counted from 1 in this process."""
    from jepa_scale.training import build

    real, evaluations = build.device_call, 0

    def device_call(*args: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        evaluation, forwards, call = evaluations, 0, real(*args)

        def counted(*args: Any) -> Any:
            nonlocal forwards
            forwards += 1
            before(evaluation, forwards)
            return call(*args)

        return counted

    build.device_call = device_call


def hold(gate: str) -> None:
    """Wait until a gate of the test opens."""
    Path(f"{gate}.reached").touch()
    while not os.path.exists(f"{gate}.open"):
        time.sleep(0.01)


def hang(mark: str) -> None:
    Path(mark).touch()
    while True:
        time.sleep(600)


def path_through(pid: int, path: Path) -> Path:
    """Return a path as seen by process ``pid``, which may have its own mounts."""
    return Path(f"/proc/{pid}/root") / path.relative_to("/")
