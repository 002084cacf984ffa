"""Which checkpoints stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jepa_scale.checkpoint.manifest import FILE, Manifest
from jepa_scale.utils.errors import InputError

NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that has a readable manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def complete(directory: Path) -> list[Found]:
    """The checkpoints of a folder that are complete, oldest step first. Their files have not been looked at."""
    found = []
    for path in directory.glob("step_*"):
        if NAME.fullmatch(path.name) and (path / FILE).is_file():
            try:
                found.append(Found(path, Manifest.read(path)))
            except InputError:
                continue  # damaged: it counts as none, and is told of by `checkpoint ls`
    return sorted(found, key=lambda f: f.step)


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep.

    Attributes:
        last: newest permanent checkpoints. every: checkpoints whose step is a multiple of it; 0 = none by that reason.
        best: ``split/metric`` whose best checkpoint stays; None = none. higher: whether more is better.
        ephemeral: newest ephemeral checkpoints; they go, too, when a permanent one is newer.
    """

    last: int = 2
    every: int = 0
    best: str | None = None
    higher: bool = False
    ephemeral: int = 1

    def remaining(self, found: Sequence[Found]) -> set[int]:
        """Steps that stay. The newest of all always does."""
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
    """Remove what need not stay, oldest first; the removed folders. A folder is renamed before it is emptied, so that a
    half-removed one does not look complete."""
    found = complete(directory)
    stay = policy.remaining(found)
    gone = [f.path for f in found if f.step not in stay]
    for path in gone:
        grave = path.with_name(f"{path.name}.removed")
        shutil.rmtree(grave, ignore_errors=True)
        path.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
    return gone


def sweep(directory: Path) -> None:
    """Remove what a run that was killed left of a save or of pruning: folders that never counted, or no longer."""
    for path in directory.glob("step_*"):
        name, _, state = path.name.partition(".")
        if NAME.fullmatch(name) and state in ("partial", "removed"):
            shutil.rmtree(path, ignore_errors=True)
