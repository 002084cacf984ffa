"""Checkpoints: written aside, renamed when complete, found again.

checkpoints/
  latest                   name of the newest complete one
  step_00000100/
    state.json             where training was; engine and world size that wrote it
    engine/                the engine's own files, sharded
    rng_rank00000.pt       random number generators of each rank
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa_scale.distributed import barrier, rank, world_size
from jepa_scale.engines.base import Engine
from jepa_scale.errors import InputError

NAME = re.compile(r"step_(\d{8,})")


def save(directory: Path, step: int, engine: Engine, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint of the engine and of ``state`` (plain JSON values). Collective.

    The folder gets its name when every rank has written its part, so a folder named ``step_…`` is always complete. Then
    ``latest`` is replaced and all but the ``keep`` newest checkpoints are removed.
    """
    assert keep >= 1, keep
    final = directory / f"step_{step:08d}"
    partial = final.with_suffix(".tmp")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        (partial / "engine").mkdir(parents=True)
    barrier()
    engine.save(partial / "engine")
    torch.save(rng_state(), partial / f"rng_rank{rank():05d}.pt")
    barrier()
    if rank() == 0:
        header = {
            "format": 1,
            "step": step,
            "engine": engine.name,
            "layout": engine.layout,
            "world_size": world_size(),
        }
        _write(partial / "state.json", json.dumps({**header, "state": state}, indent=2))
        shutil.rmtree(final, ignore_errors=True)  # the same step again, e.g. after going back to an older checkpoint
        os.replace(partial, final)
        _write(directory / "latest.tmp", final.name)
        os.replace(directory / "latest.tmp", directory / "latest")
        for old in complete(directory)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def read_header(path: Path) -> dict[str, Any]:
    """``step``, ``engine``, ``layout``, ``world_size`` and ``state`` of a checkpoint.

    Raises:
        InputError: it is not complete.
    """
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a complete checkpoint: state.json: {error}") from None


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Restore the engine and this rank's random number generators; returns the ``state`` that was saved. Collective.

    Raises:
        InputError: the checkpoint is of another engine, ZeRO stage, precision or world size, or is not complete.
    """
    try:
        header = json.loads((path / "state.json").read_text(encoding="utf-8"))
        layout, ranks, state = header["layout"], header["world_size"], header["state"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{path}: not a complete checkpoint: state.json: {error}") from None
    for what, theirs, ours in (("engine", layout, engine.layout), ("world size", ranks, world_size())):
        if theirs != ours:
            raise InputError(f"{path}: saved with {what} {theirs}, but this run has {what} {ours}; use the former")
    engine.load(path / "engine")
    set_rng_state(torch.load(path / f"rng_rank{rank():05d}.pt", weights_only=True))
    return state


def find(run_dir: Path, which: str | Path) -> Path | None:
    """The checkpoint that ``--resume`` means.

    Args:
        which: ``"auto"`` for the newest one of the run (None if there is none yet), or a path: a checkpoint, a folder
            of checkpoints or a run directory.

    Raises:
        InputError: there is no checkpoint at that path.
    """
    if str(which) == "auto":
        return newest(run_dir / "checkpoints")
    path = Path(which)
    if (path / "state.json").is_file():
        return path
    found = newest(path) or newest(path / "checkpoints")
    if found is None:
        raise InputError(f"--resume: no checkpoint at {path}; give a folder step_…, a run directory, or auto")
    return found


def newest(directory: Path) -> Path | None:
    """What ``latest`` names, or the complete checkpoint of the highest step if that is gone."""
    latest = directory / "latest"
    if latest.is_file():
        path = directory / latest.read_text(encoding="utf-8").strip()
        if NAME.fullmatch(path.name) and (path / "state.json").is_file():
            return path
    paths = complete(directory)
    return paths[-1] if paths else None


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest step first."""
    paths = [p for p in directory.glob("step_*") if NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(paths, key=lambda p: int(p.name.removeprefix("step_")))


def rng_state() -> dict[str, Any]:
    """Every generator of this process, as tensors and plain values that ``weights_only`` loading accepts."""
    legacy: Any = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "rest": [legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        },
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    key = state["numpy"]["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, *state["numpy"]["rest"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))


def _write(path: Path, text: str) -> None:
    """Write and flush to the disk, so that a rename after it never exposes an empty file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
