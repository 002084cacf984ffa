"""Retention of checkpoints: which are kept, and the removal of the others."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from jepa_scale.checkpoint.manifest import FILE, Manifest
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

NAME = re.compile(r"step_(\d{8,})")
LATEST = "latest"
"""File with the name of the newest complete checkpoint, for the user only."""


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


def kept(found: Sequence[CheckpointInfo], policy: Policy, hashes: bool) -> tuple[set[Path], set[Path]]:
    """Return the checkpoints that the policy keeps, each of them undamaged, and those found damaged meanwhile.

    A damaged checkpoint counts for no rule, so that an older one stays in its place.

    Args:
        hashes: whether to read all files and compare their hashes; otherwise only sizes are compared.
    """
    whole = list(found)
    damaged: set[Path] = set()
    checked: set[Path] = set()
    while True:
        steps = policy.remaining(whole)
        stay = [f for f in whole if f.step in steps]
        bad = {f.path for f in stay if f.path not in checked and f.manifest.damage(f.path, hashes=hashes)}
        if not bad:
            return {f.path for f in stay}, damaged
        checked |= {f.path for f in stay} - bad
        damaged |= bad
        whole = [f for f in whole if f.path not in bad]


def prune(directory: Path, policy: Policy) -> list[Path]:
    """Remove the checkpoints that the policy does not keep, oldest first, and return their paths.

    A checkpoint whose files lack bytes is neither counted nor removed.
    """
    found = complete(directory)
    stay, damaged = kept(found, policy, hashes=False)
    gone = [f.path for f in found if f.path not in stay | damaged]
    for path in gone:
        discard(path)
    return gone


def discard(path: Path) -> None:
    """Remove a checkpoint's folder. Of a link to a folder, the link is removed.

    The folder is renamed before its files are removed, so that a half-removed checkpoint does not count as complete.
    """
    trash = path.with_name(f"{path.name.partition('.')[0]}.removed")
    if trash != path:
        _remove(trash)
        path.rename(trash)
    _remove(trash)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints of steps after ``step``, from which a run now goes on, to ``….abandoned``; return the new paths.

    They are of a line of training that was left. Under their names retention would keep them and remove the new ones, and a
    resume would go back to them. The newest is renamed first.
    """
    aside = []
    for path in reversed(checkpoint_folders(directory)):
        if int(path.name.partition("_")[2]) > step:
            names = (f"{path.name}.abandoned{f'.{n}' if n else ''}" for n in count())
            target = next(directory / name for name in names if not os.path.lexists(directory / name))
            path.rename(target)
            aside.append(target)
    if aside and (found := complete(directory)):
        write_atomic(directory / LATEST, found[-1].path.name)
    return aside


def sweep(directory: Path) -> None:
    """Remove the folders that a killed run left of an unfinished save or removal.

    The manifest is written last. A save that was killed after it is complete, and gets its name.
    """
    for path in directory.glob("step_*"):
        name, _, state = path.name.partition(".")
        if not NAME.fullmatch(name) or state not in ("partial", "removed"):
            continue
        if state == "partial" and not os.path.lexists(directory / name) and _is_complete(path):
            path.rename(directory / name)
        else:
            _remove(path)


def _is_complete(path: Path) -> bool:
    try:
        return not Manifest.read(path).damage(path)
    except InputError:
        return False
