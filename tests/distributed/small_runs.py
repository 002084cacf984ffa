"""Small runs: their configs, the comparison of two runs, and invariants of a run's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from jepa_scale.checkpoint import complete, store, verify
from jepa_scale.checkpoint.retention import NAME
from tests.distributed.processes import REPOSITORY

TIMING = {"tokens_per_second", "seconds", "data_wait"}


def run_file(folder: Path, name: str, engine: str, /, **sections: dict[str, Any]) -> str:
    """Write the config of run ``name`` in ``folder``, and return its path.

    Args:
        engine: ``"fsdp"``, or ``"zero0"`` … ``"zero3"``.
        sections: of the config; their keys go before the few that every small run has.
    """
    stage = int(engine[-1]) if engine.startswith("zero") else 1
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "engine": {
            "name": "fsdp" if engine == "fsdp" else "deepspeed",
            "deepspeed": str(REPOSITORY / f"configs/ds/zero{stage}.json"),
            "threads": 1,
        },
        "train": {"log_every": 1},
        "log": {"progress": False, "report": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | {key: values.get(key, {}) | keys for key, keys in sections.items()}))
    return str(path)


def rows(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` without timing; an unfinished last line is left out."""
    found = []
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        if split in (None, row["split"]):
            found.append({key: value for key, value in row.items() if key not in TIMING})
    return found


def last_step(run: Path) -> int:
    """Return the last step in the rows of training; 0 if there are none."""
    return max((row["step"] for row in rows(run, "train")), default=0)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint: weights and moments."""
    return store.read_whole(folder / "tensors", list(store.shapes(folder / "tensors")))


def newest(run: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    return max((found.step for found in complete(run / "checkpoints")), default=0)


def check_checkpoints(run: Path) -> None:
    """Assert the invariant: every complete checkpoint is undamaged, and ``latest`` is one of them."""
    folder = run / "checkpoints"
    named = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name)]
    for path in named:
        assert not verify(path), verify(path)
    if (folder / "latest").exists():
        assert (folder / "latest").read_text() in [path.name for path in named]


def assert_same(run: Path, expected: Path, step: int) -> None:
    """Assert equal rows, and bitwise equal weights and moments at ``step``."""
    for a, b in zip(rows(run), rows(expected), strict=True):
        assert a == b
    got, wanted = tensors(checkpoint(run, step)), tensors(checkpoint(expected, step))
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted), "weights or moments differ"
