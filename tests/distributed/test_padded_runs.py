"""Runs in padded rows train as packed ones, with every objective, and alike on every engine and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.launch import run_ranks
from tests.distributed.systems import config_file, write_data
from tests.distributed.test_runs import rows, train_runs
from tests.models.test_backbone_sharded import FALCON_H1, MAMBA2

STEPS = 3
"""The last loss follows two updates."""
LLAMA = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
KEYS = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def file(folder: Path, data: Path, name: str, system: str, engine: str, accumulation: int, **model: Any) -> str:
    """The config of a small system with another model."""
    path = Path(config_file(folder, data, name, system, engine, accumulation, steps=STEPS))
    values = yaml.safe_load(path.read_text())
    values["model"] = {"family": "huggingface", **model}
    path.write_text(yaml.safe_dump(values))
    return str(path)


def curves(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = rows(folder, name)
    assert len(found) == STEPS
    return {key: torch.tensor([row[key] for row in found]) for key in KEYS}


SYSTEMS = ("chat_teacher", "concept_memory", "span_teacher")
"""Branches and conversations; runs through the lower blocks, with embeddings of the objective's own; positions of its own."""
MORE = ("stp", "pairs_infonce", "vicreg", "next_latent_teacher", "mtp", "grid_decoder")


@pytest.mark.parametrize("system", [*SYSTEMS, *(pytest.param(name, marks=pytest.mark.matrix) for name in MORE)])
def test_a_padded_run_is_the_packed_one(tmp_path, data, system):
    cases = [
        (file(tmp_path, data, name, system, "fsdp", 1, packing=name, config=LLAMA), None)
        for name in ("packed", "padded")
    ]
    run_ranks(train_runs, 1, cases)
    packed, padded = (curves(tmp_path, name) for name in ("packed", "padded"))
    torch.testing.assert_close(padded, packed, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mamba2", pytest.param("falcon_h1", marks=pytest.mark.matrix)])
def test_ranks_and_micro_batches_change_nothing(tmp_path, data, family):
    """Two ranks, of which each has micro-batches of its own length and number of segments."""
    model = {"packing": "padded", "config": MAMBA2 if family == "mamba2" else FALCON_H1}
    run_ranks(train_runs, 1, [(file(tmp_path, data, "one", "lm", "fsdp", 1, **model), None)])
    names = {"fsdp": "fsdp", "zero3": "zero3"}
    run_ranks(train_runs, 2, [(file(tmp_path, data, n, "lm", engine, 2, **model), None) for n, engine in names.items()])
    for name in names:
        torch.testing.assert_close(curves(tmp_path, name), curves(tmp_path, "one"), rtol=2e-4, atol=1e-5)
