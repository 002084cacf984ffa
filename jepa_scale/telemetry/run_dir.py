"""Creation and check of the run directory before a run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from jepa_scale.distributed import comm
from jepa_scale.telemetry.records import METRICS_FILE, SUMMARY_FILE
from jepa_scale.utils.errors import InputError


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
