"""Whole runs with optim.method=muon: the same curve on every engine, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import TIMING, checkpoint, tensors
from tests.distributed.test_runs import ENGINES, STEPS, config_file, curve, rows, train_runs


def muon(folder: Path, name: str, engine: str, **train: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = config_file(folder, "concept", engine, name=name, **train)
    values = yaml.safe_load(path.read_text())
    values["optim"] |= {"method": "muon", "lr_muon": 1e-2}
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_curve_does_not_depend_on_the_engine_and_goes_on_to_the_bit(tmp_path):
    """On two ranks, with two micro-batches, against one and one."""
    run_ranks(train_runs, 1, [(str(muon(tmp_path, "reference", "fsdp")), None)])
    every = {"every": 10}
    cases = [(str(muon(tmp_path, e, e, accumulation=2, checkpoint=every)), None) for e in ENGINES]
    run_ranks(train_runs, 2, cases)
    expected = curve(tmp_path, "reference")
    assert expected[-5:].mean() < 0.95 * expected[:5].mean()
    for engine in ENGINES:
        for column, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
            difference = (curve(tmp_path, engine, column) - curve(tmp_path, "reference", column)).abs().max()
            assert difference < tolerance, f"{engine}: {column} differs by {difference}"

    again = ("fsdp", "zero1")
    wanted = {engine: (rows(tmp_path, engine), tensors(checkpoint(tmp_path / engine, STEPS))) for engine in again}
    assert any(name.startswith("momentum_buffer/") for name in wanted["fsdp"][1])
    back = [(str(tmp_path / f"{engine}.yaml"), str(checkpoint(tmp_path / engine, 10))) for engine in again]
    run_ranks(train_runs, 2, back)
    for engine, (metrics, state) in wanted.items():
        assert [{k: v for k, v in row.items() if k not in TIMING} for row in rows(tmp_path, engine)] == [
            {k: v for k, v in row.items() if k not in TIMING} for row in metrics
        ]
        got = tensors(checkpoint(tmp_path / engine, STEPS))
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state), engine
