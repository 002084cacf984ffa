"""Whole runs of ``horizon`` with an EMA teacher learn. Other tests run the small configs on engines and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import write_text
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import run_file
from tests.distributed.test_runs import rows, train_runs

HORIZON = {
    "name": "horizon",
    "tap_layer": -2,
    "horizons": [1, 3, 7],
    "horizon_probs": [2, 1, 1],
    "pairs_per_sequence": 6,
    "latent_dim": 8,
    "ema": {"momentum": 0.5, "final_momentum": 0.9},
    "eval_pairs": 60,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "barlow": {**HORIZON, "jepa_weight": 0.5},
    "vicreg": {
        **HORIZON,
        "loss": "vicreg",
        "teacher": "backbone",
        "kl_freeze_head": False,
        "lm_start": 2,
        "lm_ramp": 3,
    },
    "cosine": {**HORIZON, "loss": "cosine", "teacher": "backbone", "kl_ramp": 4, "split_clipping": False},
    "smooth_l1": {**HORIZON, "loss": "smooth_l1", "kl_barrier": True},
    "nitp": {
        "name": "horizon",
        "tap_layer": -1,
        "target_layer": 1,
        "horizons": [1],
        "horizon_probs": [1],
        "pairs_per_sequence": 0,
        "predictor_multiple": 4,
        "loss": "cosine",
        "kl_weight": 0.0,
        "eval_pairs": 60,
    },
}
MODEL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "bridge_after": -2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {**MODEL, "tie_word_embeddings": True, "output_bias": True},
    "qwen3": {
        "family": "huggingface",
        "config": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "head_dim": 8,
        }
        | {"num_key_value_heads": 1, "intermediate_size": 24, "tie_word_embeddings": True},
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder, [10, 1, 30, 8], valid=9)
    return folder


def config_file(
    folder: Path, name: str, corpus: Path, objective: str, engine: str, /, **changes: dict[str, Any]
) -> str:
    sections: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {"source": "text", "path": str(corpus), "max_length": 24, "shuffle_window": 16},
        "objective": OBJECTIVES[objective],
        "optim": {"lr": 3e-3, "lr_head": 5e-3, "warmup_steps": 3, "clip_norm": 0.3},
        "train": {"epochs": 1, "batch_tokens": 240, "micro_tokens": 60, "eval_every": 4},
        "checkpoint": {"every": 0},
        "eval": {"micro_tokens": 50},
    }
    return run_file(folder, name, engine, **(sections | changes))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """Folder of the reference run: one process, four micro-batches a step, FSDP2 on a mesh of one, all data."""
    folder = tmp_path_factory.mktemp("reference")
    cases = [config_file(folder, name, corpus, name, "fsdp") for name in OBJECTIVES]
    run_ranks(train_runs, 1, [(case, None) for case in cases])
    return folder


def fit_tolerance(metric: str) -> tuple[None, float]:
    return None, 1e-3 if metric.startswith("grad_norm") else 2e-4


def valid_tolerance(metric: str) -> tuple[float, float]:
    return 1e-3, 0.1 if "top1" in metric else 2e-2 if "rank" in metric else 1e-3  # near neighbours may tip over


def test_training_learns(reference):
    for name in OBJECTIVES:
        fit = rows(reference, name)
        assert fit[-1]["lm_loss"] < fit[0]["lm_loss"], name
        assert fit[-1]["jepa_loss"] < fit[0]["jepa_loss"], name
        valid = rows(reference, name, "eval/valid")
        assert len(valid) >= 2 and {"ppl", "std_gap", "effective_rank"} <= valid[-1].keys()
        if name == "nitp":
            assert "ema_momentum" not in fit[0] and "retrieval_margin_h1" in valid[-1]
            continue
        assert {"kl_future", "retrieval_margin_h3"} <= valid[-1].keys()
        assert ("grad_norm_lower" in fit[0]) == (name != "cosine")
        assert pytest.approx(fit[0]["ema_momentum"]) == 0.5 and fit[-1]["ema_momentum"] > 0.8
