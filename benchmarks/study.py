"""Runs of several cases and seeds, each a process of its own; those that are complete already are not repeated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parent.parent
K = TypeVar("K")


def train(target: Path, arguments: Sequence[str]) -> Path:
    """The run directory ``target``, trained with these arguments of ``train.py`` unless it is there; one that was stopped goes on."""
    complete = target / "complete"
    if not complete.is_file():
        named = [f"run.dir={target.parent}", f"run.name={target.name}", "log.progress=false", "log.report=false"]
        resume = ["--resume", "auto"] if (target / "checkpoints" / "latest").is_file() else []
        print(target.name, flush=True)
        subprocess.run([sys.executable, "jepa_scale/train.py", *arguments, *named, *resume], cwd=REPOSITORY, check=True)
        complete.touch()
    return target


def train_all(todo: Mapping[K, tuple[Path, Sequence[str]]], jobs: int = 1) -> dict[K, Path]:
    """:func:`train` of each, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(todo, pool.map(lambda one: train(*one), todo.values()), strict=True))
