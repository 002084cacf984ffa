"""Selection of an undamaged checkpoint, and loading."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from jepa_scale.checkpoint import store
from jepa_scale.checkpoint.generators import set_rng_state
from jepa_scale.checkpoint.manifest import FILE, TENSORS, Manifest
from jepa_scale.checkpoint.retention import checkpoint_folders
from jepa_scale.checkpoint.shard_view import Checkpointable, state_of
from jepa_scale.distributed.comm import all_ranks_objects, rank, world_size
from jepa_scale.utils.errors import InputError

logger = logging.getLogger(__name__)


def verify(path: Path, hashes: bool = True, alone: bool = False) -> list[str]:
    """Return a checkpoint's defects, one line each. Collective unless ``alone``: the ranks share the files.

    Args:
        hashes: whether to read all files and compare their hashes; otherwise only sizes are compared.
        alone: verify all files in this process.
    """
    try:
        manifest = Manifest.read(path)
    except InputError as error:
        return [str(error)]
    if alone:
        return manifest.damage(path, hashes=hashes)
    found = manifest.damage(path, rank(), world_size(), hashes)
    return [line for lines in all_ranks_objects(found) for line in lines]


def find(run_dir: Path, which: str | Path, hashes: bool = True, alone: bool = False) -> Path | None:
    """Return a checkpoint of a run, verified by :func:`verify`. Collective unless ``alone``.

    Args:
        which: ``"auto"`` for the run's newest undamaged checkpoint (None if the run has no checkpoints), the name of one of
            its checkpoints, or the path of a checkpoint, a folder of checkpoints or a run directory.

    Raises:
        InputError: there is no checkpoint at that path, or all checkpoints there are damaged.
    """
    directory = run_dir / "checkpoints"
    if str(which) == "auto":
        return _newest_undamaged(directory, hashes, alone)
    path = directory / which if (directory / which / FILE).is_file() else Path(which).expanduser()
    if (path / FILE).is_file():
        if wrong := verify(path, hashes, alone):
            raise InputError(f"{wrong[0]} ({len(wrong)} in all); give another checkpoint, or auto")
        return path
    found = _newest_undamaged(path, hashes, alone) or _newest_undamaged(path / "checkpoints", hashes, alone)
    if found is None:
        raise InputError(f"no checkpoint at {path}; give a folder step_…, a run directory, or auto")
    return found


def _newest_undamaged(directory: Path, hashes: bool, alone: bool) -> Path | None:
    """Return the newest undamaged checkpoint in a folder, or None if it has no checkpoints.

    Raises:
        InputError: there are checkpoints, but all are damaged. A fresh start would overwrite them.
    """
    damaged = []
    for path in reversed(checkpoint_folders(directory)):
        wrong = verify(path, hashes, alone)
        if not wrong:
            return path
        damaged.append(path)
        if alone or rank() == 0:
            logger.warning(f"{path} is damaged and left out: {wrong[0]}")
    if damaged:
        raise InputError(f"{directory}: all {len(damaged)} checkpoints are damaged; restore one, or remove the folder")
    return None


def load(path: Path, parts: Sequence[Checkpointable]) -> Manifest:
    """Restore the parts (the engine first) from a checkpoint of any engine and world size. Collective.

    If the world size is that of the checkpoint, this rank's random number generators are restored, too.

    Raises:
        InputError: the checkpoint is of another model or objective, or a file cannot be read.
    """
    manifest = Manifest.read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns about its internals
        store.read(path / TENSORS, state_of(parts))
    for part in parts:
        part.post_load(manifest.updates)
    if manifest.world_size == world_size():
        problems = all_ranks_objects(_load_generators(path / f"rng_rank{rank():05d}.pt"))
        if problem := next(filter(None, problems), ""):
            raise InputError(problem)
    return manifest


def _load_generators(file: Path) -> str:
    """Restore the random number generators from a file. Return an error message, empty if there is none."""
    try:
        set_rng_state(torch.load(file, weights_only=True))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        return f"{file}: cannot be read: {str(error).splitlines()[0]}"
    return ""
