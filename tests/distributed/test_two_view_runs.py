"""Whole runs of ``two_view`` on conversations learn. Other tests run the small configs on engines and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import run_file
from tests.distributed.test_runs import rows, train_runs
from tests.objectives.chats import CONFIGS, conversations, tokenizer, write_rows

STEPS = 8
OBJECTIVES: dict[str, dict[str, Any]] = {
    "upstream": {"predictor_tokens": 2, "linear_predictor": True},
    "all_of_it": {
        "predictor_tokens": 1,
        "shared_prefix": True,
        "distance": "infonce",
        "target": "ema",
        "ema": {"momentum": 0.5, "schedule": "constant"},
        "regularizer": "vicreg",
    },
    "sigreg": {"predictor_tokens": 0, "readout": "mean", "regularizer": "sigreg", "target": "stop_gradient"},
}


def config_file(
    folder: Path, data: Path, name: str, objective: str, engine: str, accumulation: int = 1, **changes: Any
) -> str:
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": "huggingface", "config": CONFIGS["llama"]},
        "data": {
            "source": "chat",
            "path": str(data / "rows.jsonl"),
            "valid_fraction": 0.2,
            "tokenizer": str(data / "llama"),
            "cache": str(data / "cache"),
            "shuffle_window": 16,
        },
        "objective": {"name": "two_view", **OBJECTIVES[objective]},
        "optim": {"lr": 3e-3, "warmup_steps": 3, "clip_norm": 0.5},
        "train": {"steps": STEPS, "batch_size": 8, "accumulation": accumulation},
        "eval": {"micro_tokens": 150},  # the views of one or two conversations
    }
    return run_file(folder, name, engine, **(sections | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_rows(folder, conversations(40))
    tokenizer(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    run_ranks(train_runs, 1, [(config_file(folder, data, name, name, "fsdp"), None) for name in OBJECTIVES])
    return folder


def test_it_learns_and_its_views_are_looked_at(reference):
    for name in OBJECTIVES:
        fit = rows(reference, name)
        assert len(fit) == STEPS and fit[-1]["lm_loss"] < fit[0]["lm_loss"]
        valid = rows(reference, name, "eval/valid")[-1]
        assert {"ppl", "view_cosine", "view_cosine_others", "retrieval_top1", "effective_rank"} <= set(valid)
        assert valid["retrieval_chance"] == pytest.approx(1 / 8, abs=0.02)
