"""What goes wrong in a rank. Each function puts one fault in place, in the process that calls it, before the run starts."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def dies_writing(rank: int, who: list[int], event: int) -> None:
    """SIGKILL right before the ``event``-th operation that changes something in ``checkpoints/``, from the beginning of the
    first save, which is number 0: its folder is made."""
    if rank not in who:
        return
    seen = -1

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == "open":
            changes = isinstance(args[0], str | os.PathLike) and bool(args[2] & WRITES)
        else:
            changes = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes and "/checkpoints/" in f"{args[0]}/":
            if seen >= 0 or (name == "os.mkdir" and "partial" in str(args[0])):
                seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def nan_loss(rank: int, who: int, steps: list[int]) -> None:
    """NaN in the loss of rank ``who`` in the training steps numbered from 1 of this process."""
    after_loss(
        lambda step, loss: loss._replace(total=loss.total * torch.nan) if rank == who and step in steps else loss
    )


def hangs(rank: int, who: int, step: int, seconds: float = 600.0) -> None:
    """Rank ``who`` sleeps in the forward of a step."""

    def maybe(now: int, loss: Any) -> Any:
        if rank == who and now == step:
            time.sleep(seconds)
        return loss

    after_loss(maybe)


def hangs_saving(rank: int, who: int, seconds: float = 600.0) -> None:
    """Rank ``who`` sleeps as it begins to save."""
    from jepa_scale.checkpoint import saver

    generators = saver.rng_state

    def slow() -> Any:
        time.sleep(seconds if rank == who else 0)
        return generators()

    saver.rng_state = slow


def hangs_evaluating(rank: int, who: int, seconds: float = 600.0) -> None:
    """Rank ``who`` sleeps before the first forward of an evaluation."""
    slow_evaluation(rank, seconds if rank == who else 0.0)


def slow_steps(rank: int, seconds: float) -> None:
    def pause(step: int, loss: Any) -> Any:
        time.sleep(seconds)
        return loss

    after_loss(pause)


def slow_evaluation(rank: int, seconds: float) -> None:
    """Every forward of an evaluation takes so long. "evaluating" is printed as the first one begins."""
    from jepa_scale import build

    real = build.device_call

    def device_call(*args: Any) -> Any:
        call = real(*args)
        print("evaluating", flush=True)

        def slow(*args: Any) -> Any:
            time.sleep(seconds)
            return call(*args)

        return slow

    build.device_call = device_call


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


def path_through(pid: int, path: Path) -> Path:
    """A path as process ``pid`` sees it, which may have mounts of its own."""
    return Path(f"/proc/{pid}/root") / path.relative_to("/")
