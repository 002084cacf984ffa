"""Whole runs on real ranks: the same loss curve on every engine, world size and accumulation; bitwise resume."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jepa_scale.distributed import Ranks
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import run_file

STEPS = 20
CONCEPT = {"name": "concept", "tap_layer": 1, "say_fraction": 0.6, "scale_init": 5.0, "bridge_width": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "lm": {"name": "lm"},
    "two_view": {"name": "two_view", "predictor_tokens": 2, "loss_dropout": 0.3},
    "two_view_infonce": {"name": "two_view", "distance": "infonce"},
    "concept": CONCEPT,
    "concept_memory": {**CONCEPT, "memory": True, "concept_dim": 8},
    "concept_linear": {**CONCEPT, "predictor": "linear", "concept_dim": 8},
}
BACKBONES: dict[str, dict[str, Any]] = {
    "native": {"family": "native", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {
        "family": "huggingface",
        "config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
}


def config_file(folder: Path, objective: str, engine: str, accumulation: int = 1, **train: Any) -> Path:
    """A small real config; ``engine`` is ``"fsdp"`` or ``"zero0"`` … ``"zero3"``."""
    backbone = train.pop("backbone", "native")
    precision = train.pop("precision", "fp32")
    checkpoint = train.pop("checkpoint", {})
    name = train.pop("name", "run")
    return Path(
        run_file(
            folder,
            name,
            engine,
            engine={"precision": precision},
            model=BACKBONES[backbone],
            data={"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2},
            objective=OBJECTIVES[objective],
            optim={"lr": 3e-3, "lr_head": 5e-3, "weight_decay": 0.02, "warmup_steps": 3, "clip_norm": 0.5},
            train={"steps": STEPS, "batch_size": 16, "accumulation": accumulation, **train},
            checkpoint=checkpoint,
            eval={"max_facts": 11, "rank_facts": 5, "batch_size": 4},
        )
    )


def train_runs(ranks: Ranks, cases: list[tuple[str, str | None]]) -> None:
    """Train each (config file, --resume value) in turn, in this process group."""
    from jepa_scale import train

    for config, resume in cases:
        torch.manual_seed(0)
        train.run_training(argparse.Namespace(config=config, resume=resume, overrides=[]))


def rows(folder: Path, name: str, split: str | None = "fit") -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``; None = of all splits."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


def curve(folder: Path, name: str, column: str = "loss") -> torch.Tensor:
    values = [row[column] for row in rows(folder, name)]
    assert len(values) == STEPS
    return torch.tensor(values, dtype=torch.float64)


def run_all(folder: Path, world_size: int, cases: dict[str, dict[str, Any]]) -> None:
    files = [(str(config_file(folder, name=name, **case)), None) for name, case in cases.items()]
    run_ranks(train_runs, world_size, files, timeout=300)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, one micro-batch, FSDP2 on a mesh of one: the curve of every objective."""
    folder = tmp_path_factory.mktemp("reference")
    cases = {o: {"objective": o, "engine": "fsdp"} for o in OBJECTIVES}
    cases["gpt2"] = {"objective": "concept", "engine": "fsdp", "backbone": "gpt2"}
    run_all(folder, 1, cases)
    return folder


ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_curve_does_not_depend_on_engine_world_size_or_accumulation(reference, tmp_path, world_size):
    cases: dict[str, dict[str, Any]] = {}
    for engine in ENGINES:
        cases[f"concept-{engine}"] = {"objective": "concept", "engine": engine}
    if world_size == 2:
        for engine in ("fsdp", "zero1", "zero3"):
            for objective in OBJECTIVES:
                cases[f"{objective}-{engine}"] = {"objective": objective, "engine": engine}
            cases[f"gpt2-{engine}"] = {"objective": "concept", "engine": engine, "backbone": "gpt2"}
        for engine in ("fsdp", "zero1", "zero2", "zero3"):
            cases[f"concept-{engine}-a"] = {"objective": "concept", "engine": engine, "accumulation": 2}
            cases[f"two_view_infonce-{engine}-a"] = {
                "objective": "two_view_infonce",
                "engine": engine,
                "accumulation": 4,
            }
    if world_size == 1:
        cases |= {f"{o}-fsdp-a": {"objective": o, "engine": "fsdp", "accumulation": 4} for o in OBJECTIVES}
    run_all(tmp_path, world_size, cases)
    for name in cases:
        for column, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
            expected = curve(reference, name.partition("-")[0], column)
            difference = (curve(tmp_path, name, column) - expected).abs().max()
            assert difference < tolerance, f"{name}, world size {world_size}: {column} differs by {difference}"
        for split in ("train", "atomic", "test"):  # ranks share the questions; odd ones out must not count twice
            expected, got = (rows(f, n, split)[-1] for f, n in ((reference, name.partition("-")[0]), (tmp_path, name)))
            assert abs(got["joint_nll"] - expected["joint_nll"]) < 1e-2, name
            assert abs(got["mrr"] - expected["mrr"]) < 0.02, name


def test_training_learns_and_evaluates(reference):
    for objective in OBJECTIVES:
        losses = curve(reference, objective)
        assert losses[-5:].mean() < 0.95 * losses[:5].mean(), objective
        for split in ("train", "atomic", "test"):
            metrics = rows(reference, objective, split)[-1]
            assert 0 <= metrics["exact_match"] <= 1 and 0 < metrics["mrr"] <= 1
            assert math.isfinite(metrics["joint_nll"])


def test_bf16_works_on_every_engine(reference, tmp_path):
    run_all(tmp_path, 2, {e: {"objective": "concept", "engine": e, "precision": "bf16"} for e in ENGINES})
    expected = curve(reference, "concept")
    for engine in ENGINES:
        losses = curve(tmp_path, engine)
        assert losses[-5:].mean() < 0.95 * losses[:5].mean()
        assert (losses - expected).abs().max() < 0.1 * expected.mean(), engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_continues_bitwise(tmp_path, precision):
    """Interrupted after 10 of 20 steps: rows, metrics and final parameters equal the undisturbed run's to the bit."""
    engines = ENGINES if precision == "fp32" else ("fsdp", "zero1", "zero3")
    whole, again = tmp_path / "whole", tmp_path / "again"
    cases: list[tuple[str, str | None]] = []
    for folder in (whole, again):
        folder.mkdir()
        for engine in engines:
            config = config_file(
                folder, "concept", engine, accumulation=2, name=engine, precision=precision, checkpoint={"every": 10}
            )
            cases.append((str(config), None))
    run_ranks(train_runs, 2, cases, timeout=300)
    # "again" goes back to its checkpoints of step 10, in new processes
    back = {engine: again / engine / "checkpoints" / "step_00000010" for engine in engines}
    run_ranks(train_runs, 2, [(str(again / f"{e}.yaml"), str(path)) for e, path in back.items()], timeout=300)
    for engine in engines:
        expected, got = rows(whole, engine), rows(again, engine)
        assert [r["step"] for r in got] == list(range(1, STEPS + 1))
        for a, b in zip(expected, got, strict=True):
            timing = {"tokens_per_second", "seconds", "data_wait"}
            assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
        assert rows(whole, engine, "test") == rows(again, engine, "test")


def test_resume_with_other_data_is_refused(tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", steps=4)
    run_ranks(train_runs, 1, [(str(config), None)])
    values = yaml.safe_load(config.read_text())
    values["data"]["seed"] = 1
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(AssertionError, match="fingerprint differs"):
        run_ranks(train_runs, 1, [(str(config), "auto")])
