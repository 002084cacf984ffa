"""Creation and check of the run directory before a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from jepa_scale.distributed import comm
from jepa_scale.telemetry.records import METRICS_FILE, SUMMARY_FILE
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import JOB_LOCK, NoLocks, holder, locked

logger = logging.getLogger(__name__)


WAIT = 15.0
"""Seconds to wait for a holder: the loader's workers of a killed run hold its lock for a few seconds longer."""


@contextmanager
def locked_run_dir(run_dir: Path, resume: bool) -> Iterator[None]:
    """Prepare the run directory, and keep other processes from training in it meanwhile. Collective.

    A directory that is still empty at the end, because the run was refused, is removed if it was made here.

    Raises:
        InputError: another process trains in it, it holds a run and ``resume`` is false, or it cannot be created.
    """
    with ExitStack() as held:
        problem = None
        if comm.rank() == 0:
            if not run_dir.exists():
                held.callback(_remove_empty, run_dir)  # after the lock is released
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                left = holder(run_dir / JOB_LOCK)
                held.enter_context(locked(run_dir / JOB_LOCK, wait=WAIT))
                if left:
                    logger.warning(f"{run_dir}: was in use by {left}, which has ended; this process goes on with it")
            except NoLocks:
                logger.warning(f"{run_dir}: the file system has no locks; do not start a run twice in this directory")
            except InputError as error:
                problem = f"run directory {error}, or another run.name"
            except OSError as error:
                problem = f"run.dir: cannot use {str(run_dir)!r} as a run directory: {error.strerror}"
        if problem := comm.broadcast_object(problem):
            raise InputError(problem)
        prepare_run_dir(run_dir, resume)
        yield


def _remove_empty(run_dir: Path) -> None:
    for folder in (run_dir / "checkpoints", run_dir):
        with suppress(OSError):  # it holds something
            folder.rmdir()


def prepare_run_dir(run_dir: Path, resume: bool) -> None:
    """Create the run directory; refuse one that already holds a run unless that run is resumed.

    Collective: rank 0 checks, every rank raises.

    Raises:
        InputError: the directory holds a run and ``resume`` is false, or it cannot be created.
    """
    problem = _prepare(run_dir, resume) if comm.rank() == 0 else None
    problem = comm.broadcast_object(problem)
    if problem:
        raise InputError(problem)


def _prepare(run_dir: Path, resume: bool) -> str | None:
    try:
        checkpoints = run_dir / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        used = any(checkpoints.iterdir())
        for folder in (run_dir, checkpoints):
            with TemporaryFile(dir=folder):  # hours of training would be lost if nothing could be saved here
                pass
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"run.dir: cannot use {str(run_dir)!r} as a run directory: {what}"
    used = used or any((run_dir / f).exists() for f in (METRICS_FILE, SUMMARY_FILE))
    if used and not resume:
        return (
            f"run directory {str(run_dir)!r} already holds a run: continue it with --resume auto, "
            "choose another run.name, or remove it"
        )
    return None
