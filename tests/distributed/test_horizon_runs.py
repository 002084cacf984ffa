"""Whole runs of ``horizon`` with an EMA teacher, on real ranks: the same curves and diagnostics on every engine and world
size (which also changes the accumulation), bitwise resume, and a run that goes on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import write_text
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import ENGINES, assert_same_run, resumed_bitwise
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
    """One process, four micro-batches a step, FSDP2 on a mesh of one."""
    folder = tmp_path_factory.mktemp("reference")
    cases = [config_file(folder, name, corpus, name, "fsdp") for name in OBJECTIVES]
    cases += [config_file(folder, name, corpus, "vicreg", "fsdp", model=model) for name, model in MODELS.items()]
    run_ranks(train_runs, 1, [(case, None) for case in cases], timeout=300)
    return folder


def fit_tolerance(metric: str) -> tuple[None, float]:
    return None, 1e-3 if metric.startswith("grad_norm") else 2e-4


def valid_tolerance(metric: str) -> tuple[float, float]:
    return 1e-3, 0.1 if "top1" in metric else 2e-2 if "rank" in metric else 1e-3  # near neighbours may tip over


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_curves_and_diagnostics_do_not_depend_on_engine_or_world_size(reference, corpus, tmp_path, world_size):
    """The last step has fewer micro-batches than there are ranks: some of them run without a pair."""
    cases = [f"{engine}-vicreg" for engine in ENGINES if (engine, world_size) != ("fsdp", 1)]
    if world_size == 2:
        cases += [f"{engine}-barlow" for engine in ENGINES]
        cases += ["fsdp-cosine", "zero3-cosine", "zero3-smooth_l1"]
        cases += [f"{engine}-{name}" for engine in ("fsdp", "zero3") for name in MODELS]
    files = []
    for case in cases:
        engine, _, name = case.partition("-")
        objective, changes = ("vicreg", {"model": MODELS[name]}) if name in MODELS else (name, {})
        files.append((config_file(tmp_path, case, corpus, objective, engine, **changes), None))
    run_ranks(train_runs, world_size, files, timeout=400)
    for case in cases:
        assert_same_run(tmp_path, case, reference, case.partition("-")[2], None, fit_tolerance, valid_tolerance)


def test_training_learns(reference):
    for name in OBJECTIVES:
        fit = rows(reference, name)
        assert fit[-1]["lm_loss"] < fit[0]["lm_loss"], name
        assert fit[-1]["jepa_loss"] < fit[0]["jepa_loss"], name
        valid = rows(reference, name, "valid")
        assert len(valid) >= 2 and {"ppl", "std_gap", "effective_rank", "retrieval_margin_h3"} <= valid[-1].keys()
        assert "kl_future" in valid[-1]
        assert ("grad_norm_lower" in fit[0]) == (name != "cosine")
        assert pytest.approx(fit[0]["ema_momentum"]) == 0.5 and fit[-1]["ema_momentum"] > 0.8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_continues_bitwise_and_elsewhere(corpus, tmp_path, precision):
    """From step 4 to the end, in new processes: rows, parameters, moments and teacher equal to the bit; on another engine
    and world size within rounding."""
    engines = ENGINES if precision == "fp32" else ("fsdp", "zero1", "zero3")
    files = {
        name: config_file(
            tmp_path, name, corpus, "vicreg", name, engine={"precision": precision}, checkpoint={"every": 4}
        )
        for name in engines
    }
    for held in resumed_bitwise(files, tmp_path, 4).values():
        assert any(name.startswith("teacher/backbone") for name in held)


@pytest.mark.parametrize(("first", "second", "world_size"), [("zero1", "zero3", 4)])
def test_a_run_goes_on_with_another_engine_and_world_size(reference, corpus, tmp_path, first, second, world_size):
    before = config_file(tmp_path, "run", corpus, "vicreg", first, checkpoint={"every": 4})
    run_ranks(train_runs, 2, [(before, None)], timeout=300)
    after = config_file(tmp_path, "run", corpus, "vicreg", second, checkpoint={"every": 4})
    run_ranks(train_runs, world_size, [(after, str(tmp_path / "run/checkpoints/step_00000004"))], timeout=300)
    assert_same_run(tmp_path, "run", reference, "vicreg", None, fit_tolerance, valid_tolerance)
