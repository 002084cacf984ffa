"""Saving checkpoints while training continues.

A save copies this rank's part of the state into host memory; training waits only for this copy. A thread then writes it
into a folder ``step_….partial``. The folder gets its final name when every rank has written its part and the manifest is
written. A failure before that leaves the older checkpoints unchanged.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.generators import rng_state
from jepa_scale.checkpoint.manifest import TENSORS, Manifest, describe
from jepa_scale.checkpoint.retention import LATEST, Policy, discard, folder_name, prune
from jepa_scale.checkpoint.shard_view import Checkpointable, ShardView, state_of
from jepa_scale.distributed.comm import barrier, rank, world_size
from jepa_scale.utils.io import sync_folder, write_atomic

logger = logging.getLogger(__name__)

RETRY_DELAYS = (1.0, 5.0)
"""Seconds before each retry of a failed save."""
GROUP_TIMEOUT = timedelta(hours=2)
"""Maximum time that ranks wait for each other in a save."""
ABANDON_TIMEOUT = 60.0
"""Seconds that a failed run waits for the save in progress."""


@dataclass(slots=True)
class Report:
    """Outcome of a save.

    Attributes:
        step: step of the checkpoint. path: its folder, None if the save failed.
        problem: error message of the first rank that failed; empty if none did.
        stalled: seconds that training waited for the copy (and for the previous save).
        seconds: seconds from the start of the save to its end.
    """

    step: int
    path: Path | None = None
    problem: str = ""
    stalled: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class _Job:
    manifest: Manifest
    tensors: Mapping[str, ShardView]
    generators: dict[str, Any]
    report: Report
    began: float
    thread: threading.Thread | None = None
    done: threading.Event = field(default_factory=threading.Event)
    reported: bool = False


class Saver:
    """Saver of a run's checkpoints. All ranks create one and call its collective methods together.

    Args:
        directory: folder of the checkpoints.
        policy: rules for which checkpoints are kept.
        asynchronous: write in a thread; otherwise :meth:`save` returns when the checkpoint is complete.
        on_finish: callback on rank 0, called with the outcome of each save when it is known.
        every: steps between permanent checkpoints; 0 = only one after the last step.
        ephemeral_every: steps between ephemeral checkpoints, which later ones replace; 0 = none.
    """

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        asynchronous: bool = True,
        on_finish: Callable[[Report], None] = lambda report: None,
        every: int = 0,
        ephemeral_every: int = 0,
    ) -> None:
        self.directory, self.policy, self.asynchronous, self.on_finish = directory, policy, asynchronous, on_finish
        self._every, self._ephemeral_every = every, ephemeral_every
        self._job: _Job | None = None
        self._last: Report | None = None
        # the thread's collectives must not mix with those of training
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if world_size() > 1 else None

    def due(self, done: int, last: int) -> bool:
        """Return whether to save a checkpoint after ``done`` steps of a run that ends after ``last`` steps."""
        ephemeral = self._ephemeral_every > 0 and done % self._ephemeral_every == 0
        return ephemeral or self.permanent(done, last)

    def permanent(self, done: int, last: int) -> bool:
        """Return whether that checkpoint is permanent; otherwise it is ephemeral, and later ones replace it."""
        return done == last or (self._every > 0 and done % self._every == 0)

    def save(self, parts: Sequence[Checkpointable], manifest: Manifest) -> None:
        """Save the state of ``parts``, the random number generators and the manifest. Collective.

        The call first waits for a save in progress. A save that fails is reported; the run continues, the older checkpoints
        stay, and the next save is tried as usual.

        Args:
            parts: the objects to save, the engine first.
            manifest: the manifest without ``files``.
        """
        began = time.monotonic()
        self.wait()
        tensors = {name: view.copy() for name, view in state_of(parts).items()}
        job = _Job(manifest, tensors, rng_state(), Report(manifest.step), began)
        job.report.stalled = time.monotonic() - began
        self._job = job
        if self.asynchronous:
            job.thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            job.thread.start()
        else:
            self._write(job)
            self.wait()

    def wait(self) -> Report | None:
        """Wait until the save in progress, if any, is complete or has failed, and return its outcome. Collective."""
        job, self._job = self._job, None
        if job is None:
            return None
        if job.thread is not None:
            job.thread.join()
        self._notify(job)
        self._last = job.report
        return job.report

    def poll(self) -> None:
        """Report a save that has finished since the last call. Not collective."""
        if self._job is not None and self._job.done.is_set():
            self._notify(self._job)

    def abandon(self) -> None:
        """Give the save in progress ``ABANDON_TIMEOUT`` seconds to finish after the run has failed. Not collective.

        It can finish only if the other ranks still run. If the thread were active at the interpreter's exit, the process
        would be killed by SIGABRT.
        """
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(ABANDON_TIMEOUT)
            self.poll()

    def _notify(self, job: _Job) -> None:
        if rank() == 0 and not job.reported:
            job.reported = True
            self.on_finish(job.report)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _write(self, job: _Job) -> None:
        try:
            for pause in (*RETRY_DELAYS, None):
                problem = self._agree(self._try(job))
                if not problem:
                    job.report.path = self.directory / folder_name(job.manifest.step)
                    break
                job.report.problem = problem
                if pause is not None:
                    time.sleep(pause)
        except Exception:  # the process group itself has failed, which training will notice, too
            job.report.problem = traceback.format_exc()
        finally:
            job.report.seconds = time.monotonic() - job.began
            job.done.set()

    def _try(self, job: _Job) -> str:
        """Write the checkpoint once, and return this rank's error message, empty on success.

        All ranks run through the same collectives, whatever fails on one of them.
        """
        final = self.directory / folder_name(job.manifest.step)
        partial = final.with_name(f"{final.name}.partial")
        problem = ""
        if rank() == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
                (partial / TENSORS).mkdir(parents=True)
            except OSError as error:
                problem = _plain(error)
        if failure := self._agree(problem):
            return failure
        files: dict[str, Any] = {}
        try:
            written = store.write(partial / TENSORS, job.tensors, self._group)
            files = {f"{TENSORS}/{name}": file for name, file in written.items()}
        except Exception as error:  # DCP raises on every rank when it fails on one
            problem = _plain(error)
        if not problem:
            try:
                generators = partial / f"rng_rank{rank():05d}.pt"
                _write(generators, job.generators)
                files |= describe([generators])
            except Exception as error:  # any error: the other ranks wait for this rank's result
                problem = _plain(error)
        everyone = self._gather((problem, files))
        if rank() == 0:
            problem = next((p for p, _ in everyone if p), "")
            if not problem:
                try:
                    self._finish(job.manifest, partial, final, [f for _, f in everyone])
                except Exception as error:
                    problem = _plain(error)
            if problem:
                shutil.rmtree(partial, ignore_errors=True)
        return problem

    def _finish(self, manifest: Manifest, partial: Path, final: Path, files: list[dict[str, Any]]) -> None:
        replace(manifest, files={name: f for part in files for name, f in part.items()}).write(partial)
        sync_folder(partial / TENSORS)
        sync_folder(partial)
        if os.path.lexists(final):
            discard(final)  # if the process is killed here, sweep finds the complete partial one
        os.replace(partial, final)
        sync_folder(self.directory)
        try:
            write_atomic(self.directory / LATEST, final.name)
            prune(self.directory, self.policy)
        except OSError as error:
            logger.warning(f"{final} is saved, but {_plain(error)}; older checkpoints may stay")

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def _agree(self, problem: str) -> str:
        """Return the error of the first rank that has one, on every rank; collective."""
        return next((p for p in self._gather(problem) if p), "")

    def close(self) -> Report | None:
        """Wait for the last save and return its outcome, None if nothing was saved. Collective."""
        self.wait()
        barrier()
        return self._last


def _plain(error: BaseException) -> str:
    """Format an exception as one line: the innermost cause of an exception of DCP, or the file and its error."""
    causes = getattr(error, "failures", {})
    if causes:
        number, (inner, _) = next(iter(causes.items()))
        return f"rank {number}: {_plain(inner)}"
    if isinstance(error := store.origin(error), OSError) and error.strerror:
        full = "the disk is full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'checkpoint'}: {full}{error.strerror}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _write(file: Path, value: Any) -> None:
    """Save a value with ``torch.save``, which given a path would report a full disk as "unexpected pos"."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(file, buffer.getvalue())
