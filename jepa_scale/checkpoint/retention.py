"""Retention of checkpoints: which are kept, and the removal of the others."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_scale.checkpoint.manifest import FILE, Manifest
from jepa_scale.utils.errors import InputError

NAME = re.compile(r"step_(\d{8,})")


def folder_name(step: int) -> str:
    """Return the name of the folder of the checkpoint of ``step``, which :data:`NAME` matches."""
    return f"step_{step:08d}"


def checkpoint_folders(directory: Path) -> list[Path]:
    """Return the folders in ``directory`` with a checkpoint's name, oldest step first, whether they are complete or not."""
    named = (path for path in directory.glob("step_*") if NAME.fullmatch(path.name))
    return sorted(named, key=lambda path: int(path.name.partition("_")[2]))


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint that has a readable manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def complete(directory: Path) -> list[CheckpointInfo]:
    """Return the complete checkpoints of a folder, oldest step first. Only manifests are read, no other files."""
    found = []
    for path in checkpoint_folders(directory):
        if (path / FILE).is_file():
            try:
                found.append(CheckpointInfo(path, Manifest.read(path)))
            except InputError:
                continue  # a damaged one does not count; `checkpoint ls` reports it
    return sorted(found, key=lambda f: f.step)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules for which checkpoints are kept.

    Attributes:
        last: number of the newest permanent checkpoints to keep.
        every: keep permanent checkpoints whose step is a multiple of this; 0 = none for this reason.
        best: ``split/metric`` whose best permanent checkpoint is kept; None = none.
        higher: whether a higher value of that metric is better.
        ephemeral: number of the newest ephemeral checkpoints to keep; those older than a permanent one are removed.
    """

    last: int = 2
    every: int = 0
    best: str | None = None
    higher: bool = False
    ephemeral: int = 1

    def remaining(self, found: Sequence[CheckpointInfo]) -> set[int]:
        """Return the steps of the checkpoints that are kept. The newest checkpoint is always kept."""
        permanent = [f for f in found if f.manifest.permanent]
        stay = {f.step for f in permanent[-self.last :]}
        if self.every:
            stay |= {f.step for f in permanent if f.step % self.every == 0}
        rated = [f for f in permanent if self.best in f.manifest.metrics] if self.best else []
        if rated:
            assert self.best
            sign = 1 if self.higher else -1
            stay.add(max(rated, key=lambda f: (sign * f.manifest.metrics[self.best or ""], f.step)).step)
        newest = permanent[-1].step if permanent else -1
        passing = [f for f in found if not f.manifest.permanent and f.step > newest]
        return stay | {f.step for f in passing[-self.ephemeral :]}


def prune(directory: Path, policy: Policy) -> list[Path]:
    """Remove the checkpoints that the policy does not keep, oldest first, and return their paths.

    A folder is renamed before its files are removed, so that a half-removed checkpoint does not count as complete.
    """
    found = complete(directory)
    stay = policy.remaining(found)
    gone = [f.path for f in found if f.step not in stay]
    for path in gone:
        trash = path.with_name(f"{path.name}.removed")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    return gone


def sweep(directory: Path) -> None:
    """Remove the folders that a killed run left of an unfinished save or removal."""
    for path in directory.glob("step_*"):
        name, _, state = path.name.partition(".")
        if NAME.fullmatch(name) and state in ("partial", "removed"):
            shutil.rmtree(path, ignore_errors=True)
