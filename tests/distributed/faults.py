"""What goes wrong in a rank. Each function puts one fault in place, in the process that calls it, before the run starts."""

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
    """SIGKILL right before the ``event``-th operation that changes something in ``checkpoints/``, from the beginning of the
    ``save``-th save of this process, whose operation number 0 is to make its folder. What it was about to do is printed."""
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
    """NaN in the loss of rank ``who`` in the training steps numbered from 1 of this process."""
    after_loss(
        lambda step, loss: loss._replace(total=loss.total * torch.nan) if rank == who and step in steps else loss
    )


def holds_in_step(rank: int, who: int, step: int, gate: str) -> None:
    """Rank ``who`` waits at a gate of the test in the forward of a step; the steps of this process from 1."""

    def maybe(now: int, loss: Any) -> Any:
        if rank == who and now == step:
            hold(gate)
        return loss

    after_loss(maybe)


def holds_evaluating(rank: int, who: int, gate: str, evaluation: int = 1, forward: int = 1) -> None:
    """Rank ``who`` waits at a gate of the test in one of the forwards of one of the evaluations of this process."""

    def maybe(*now: int) -> None:
        if rank == who and now == (evaluation, forward):
            hold(gate)

    in_evaluations(maybe)


def hangs(rank: int, who: int, step: int, mark: str) -> None:
    """Rank ``who`` hangs in the forward of a step. As it begins to, it makes the file ``mark``."""

    def maybe(now: int, loss: Any) -> Any:
        if rank == who and now == step:
            hang(mark)
        return loss

    after_loss(maybe)


def hangs_saving(rank: int, who: int, mark: str) -> None:
    """Rank ``who`` hangs as it begins to save."""
    from jepa_scale.checkpoint import saver

    generators = saver.rng_state

    def slow() -> Any:
        if rank == who:
            hang(mark)
        return generators()

    saver.rng_state = slow


def hangs_evaluating(rank: int, who: int, mark: str) -> None:
    """Rank ``who`` hangs before the first forward of an evaluation."""

    def slow(evaluation: int, forward: int) -> None:
        if rank == who:
            hang(mark)

    in_evaluations(slow)


def hang_begins(rank: int, mark: str, speakers: list[int]) -> None:
    """The watchdog's clock stands still until the file ``mark`` is there, and its verdict waits until each of the
    ``speakers`` has told where it is: no rank is taken for one that hangs because the machine is slow."""
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
            _, _, _, place, _ = json.loads(file.read_text())
        except (OSError, ValueError):
            return False
        return bool(place)

    def patient(self: Any) -> str:
        while not all(has_told(self._file(speaker)) for speaker in speakers):
            time.sleep(0.01)
        return verdict(self)

    watchdog.time = SimpleNamespace(time=clock, sleep=time.sleep)
    watchdog.Watchdog._verdict = patient


def evaluates_long(rank: int, limit: float, forwards: int = 4) -> None:
    """By the watchdog's clock each of the first ``forwards`` of an evaluation takes most of the ``limit``, and ends when the
    watchdog has looked at it. The clock stands still otherwise."""
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

    watchdog.time = SimpleNamespace(time=clock, sleep=time.sleep)
    in_evaluations(slow)


def impatient(rank: int) -> None:
    """A save that fails is tried again at once."""
    from jepa_scale.checkpoint import saver

    saver.PATIENCE = (0.02, 0.05)


def no_room(rank: int, who: int, before: str, tries: int) -> None:
    """In its first ``tries`` to save, no file of rank ``who`` may become larger than 8 kB from the moment when it begins to
    write the ``"tensors"``, or the ``"generators"`` (16 kB) after them."""
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
    """Permissions bind this process even if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


def after_loss(change: Any) -> None:
    """``change(step, loss)`` for each loss of language modelling with gradient; the steps of this process from 1."""
    from jepa_scale.objectives.lm import LanguageModeling

    real, step = LanguageModeling.loss, 0

    def loss(self: Any, *args: Any) -> Any:
        nonlocal step
        step += torch.is_grad_enabled()
        return change(step, real(self, *args))

    LanguageModeling.loss = loss


def in_evaluations(before: Any) -> None:
    """``before(evaluation, forward)`` right before each forward of an evaluation; both are numbered from 1 in this process."""
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
    """Wait at a gate of the test."""
    Path(f"{gate}.reached").touch()
    while not os.path.exists(f"{gate}.open"):
        time.sleep(0.01)


def hang(mark: str) -> None:
    Path(mark).touch()
    while True:
        time.sleep(600)


def path_through(pid: int, path: Path) -> Path:
    """A path as process ``pid`` sees it, which may have mounts of its own."""
    return Path(f"/proc/{pid}/root") / path.relative_to("/")
