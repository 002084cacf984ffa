"""Whole runs on synthetic facts learn and are evaluated. Other tests run the small configs on engines and ranks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jepa_scale.distributed.comm import ParallelContext
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import run_file

STEPS = 20
CONCEPT = {"name": "concept", "tap_layer": 1, "decode_fraction": 0.6, "scale_init": 5.0, "bridge_width": 16}
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
    "mixtral": {
        "family": "huggingface",
        "config": {
            "model_type": "mixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 4,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
        },
    },
}


def config_file(folder: Path, objective: str, engine: str, accumulation: int = 1, **train: Any) -> Path:
    """Write a small real config; ``engine`` is ``"fsdp"`` or ``"zero0"`` … ``"zero3"``."""
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


def train_runs(ranks: ParallelContext, cases: list[tuple[str, str | None]]) -> None:
    """Train each (config file, --resume value) in turn, in this process group."""
    from jepa_scale.training.run import run_training

    for config, resume in cases:
        torch.manual_seed(0)
        run_training(argparse.Namespace(config=config, resume=resume, overrides=[]))


def rows(folder: Path, name: str, split: str | None = "train") -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` of a split; None = of all splits."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


def curve(folder: Path, name: str, column: str = "loss") -> torch.Tensor:
    values = [row[column] for row in rows(folder, name)]
    assert len(values) == STEPS
    return torch.tensor(values, dtype=torch.float64)


def run_all(folder: Path, world_size: int, cases: dict[str, dict[str, Any]]) -> None:
    files = [(str(config_file(folder, name=name, **case)), None) for name, case in cases.items()]
    run_ranks(train_runs, world_size, files)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of the reference runs of all objectives: one process, one micro-batch, FSDP2 on a mesh of one."""
    folder = tmp_path_factory.mktemp("reference")
    cases = {o: {"objective": o, "engine": "fsdp"} for o in OBJECTIVES}
    cases["gpt2"] = {"objective": "concept", "engine": "fsdp", "backbone": "gpt2"}
    run_all(folder, 1, cases)
    return folder


ENGINES = ("fsdp", "zero0", "zero1", "zero2", "zero3")


def test_training_learns_and_evaluates(reference):
    for objective in OBJECTIVES:
        losses = curve(reference, objective)
        assert losses[-5:].mean() < 0.95 * losses[:5].mean(), objective
        for split in ("train", "atomic", "test"):
            metrics = rows(reference, objective, f"eval/{split}")[-1]
            assert 0 <= metrics["exact_match"] <= 1 and 0 < metrics["mrr"] <= 1
            assert math.isfinite(metrics["joint_nll"])


def test_resume_with_other_data_is_refused(tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", steps=4)
    run_ranks(train_runs, 1, [(str(config), None)])
    values = yaml.safe_load(config.read_text())
    values["data"]["seed"] = 1
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(AssertionError, match="fingerprint differs"):
        run_ranks(train_runs, 1, [(str(config), "auto")])
