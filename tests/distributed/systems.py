"""Small systems for whole runs: an objective in one of its forms, a decoder, data, an optimizer.

Each system has one config for all engines, ranks and accumulation. Tests assert that its runs are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.data.corpus import write_text
from tests.distributed import (
    test_grid_runs,
    test_horizon_runs,
    test_runs,
    test_span_runs,
    test_text_runs,
    test_two_view_runs,
)
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import Tolerance
from tests.distributed.same_runs import assert_same_run as same_run
from tests.objectives.chats import conversations, tokenizer, write_rows

STEPS = 5
"""Number of steps. Warm-up ends at step 1, so the last loss follows four updates at the full rate. Weights that are one update
old change it by far more than the tolerance."""
WARMUP = 1


@dataclass(frozen=True)
class System:
    """An objective in one of its forms, with a decoder.

    Attributes:
        objective: its name. form: name of its form, as in the file with its runs. family: family of the decoder.
        optimizer: ``"adamw"`` or ``"muon"``.
    """

    objective: str
    form: str
    family: str = "native"
    optimizer: str = "adamw"


SYSTEMS: dict[str, System] = {
    "lm": System("lm", "lm"),
    "lm_budget": System("lm", "text", optimizer="muon"),
    "lm_gpt2": System("lm", "lm", "huggingface"),
    "stp": System("stp", "stp", "huggingface"),
    "stp_native": System("stp", "stp", "native", "muon"),
    "pairs": System("two_view", "two_view"),
    "pairs_infonce": System("two_view", "two_view_infonce", "native", "muon"),
    "chat": System("two_view", "upstream", "huggingface"),
    "chat_teacher": System("two_view", "all_of_it", "huggingface"),
    "chat_sigreg": System("two_view", "sigreg", "huggingface"),
    "concept": System("concept", "concept"),
    "concept_memory": System("concept", "concept_memory", "native", "muon"),
    "concept_linear": System("concept", "concept_linear"),
    "concept_gpt2": System("concept", "concept", "huggingface"),
    "barlow": System("horizon", "barlow"),
    "vicreg": System("horizon", "vicreg"),
    "cosine": System("horizon", "cosine", "native", "muon"),
    "smooth_l1": System("horizon", "smooth_l1"),
    "nitp": System("horizon", "nitp"),
    "tied": System("horizon", "vicreg"),
    "qwen3": System("horizon", "vicreg", "huggingface"),
    "span": System("span", "span", "native", "muon"),
    "span_teacher": System("span", "ema"),
    "next_latent": System("next_latent", "next_latent", "huggingface"),
    "next_latent_teacher": System("next_latent", "next_latent_teacher", "native", "muon"),
    "mtp": System("mtp", "mtp", "huggingface"),
    "mtp_native": System("mtp", "mtp", "native", "muon"),
    "grid_objects": System("grid", "objects"),
    "grid_decoder": System("grid", "decoder", "native", "muon"),
}


ON_CHATS: dict[str, dict[str, Any]] = {
    "stp": {"name": "stp"},
    "next_latent": {"name": "next_latent", "rollout": 3},
    "next_latent_teacher": {
        "name": "next_latent",
        "rollout": 2,
        "target": "ema",
        "target_norm": True,
        "ema": {"momentum": 0.5, "schedule": "constant"},
    },
    "mtp": {"name": "mtp", "heads": 3},
}
"""Form → ``objective`` of the systems that are trained on the conversations of ``two_view``."""


def write_data(folder: Path) -> None:
    """Write the data of all systems into ``folder``."""
    write_text(folder / "text", [30, 1, 40, 8], valid=18)
    test_grid_runs.write_grids(folder / "grids")
    (folder / "chat").mkdir()
    write_rows(folder / "chat", conversations(40))
    tokenizer(folder / "chat", "llama")


def config_file(
    folder: Path,
    data: Path,
    name: str,
    system: str,
    engine: str,
    accumulation: int = 1,
    /,
    steps: int = STEPS,
    **sections: dict[str, Any],
) -> str:
    """Write the config of run ``name`` of a system in ``folder``; ``sections`` hold further keys."""
    of = SYSTEMS[system]
    text = data / "text"
    train: dict[str, Any] = {"steps": steps, "accumulation": accumulation, "eval_every": 0}
    if of.form == "text":  # a budget of tokens: the micro-batches are the same over however many ranks
        file = test_text_runs.config_file(folder, name, engine, text)
        train = {"steps": steps, "epochs": 0, "eval_every": 0}
    elif of.objective == "horizon":
        model = test_horizon_runs.MODELS.get(system, test_horizon_runs.MODEL)
        file = test_horizon_runs.config_file(folder, name, text, of.form, engine, model=model)
        train |= {"batch_size": 16, "batch_tokens": 0, "micro_tokens": 0, "epochs": 0}
    elif of.objective == "span":
        file = test_span_runs.config_file(folder, name, text, of.form, engine)
    elif of.objective == "grid":
        file = test_grid_runs.config_file(folder, name, data / "grids", of.form, engine)
    elif of.form in (*test_two_view_runs.OBJECTIVES, *ON_CHATS):
        form = "upstream" if of.form in ON_CHATS else of.form
        file = test_two_view_runs.config_file(folder, data / "chat", name, form, engine)
    else:
        family = "gpt2" if of.family == "huggingface" else "native"
        file = str(test_runs.config_file(folder, of.form, engine, name=name, backbone=family))
    values = yaml.safe_load(Path(file).read_text())
    values["train"] |= train
    values["optim"] |= {"warmup_steps": WARMUP, "method": of.optimizer}
    values["optim"] |= {"lr_muon": 1e-2} if of.optimizer == "muon" else {}
    if of.optimizer == "adamw":
        values["optim"].pop("lr_muon", None)
    if of.form in ON_CHATS:
        values["objective"] = ON_CHATS[of.form]
        if of.family == "native":
            values["model"] = test_runs.BACKBONES["native"]
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    Path(file).write_text(yaml.safe_dump(values))
    return file


def fact_tolerance(metric: str) -> tuple[None, float]:
    """Tolerance of an evaluation on 11 facts, in which one answer may change."""
    return None, 0.1 if metric == "exact_match" else 2e-2


def tolerances(system: str) -> tuple[Tolerance, Tolerance]:
    """Return name of a metric → relative and absolute tolerance, for the rows of training and for an evaluation."""
    of = SYSTEMS[system]
    module = {"grid": test_grid_runs, "span": test_span_runs}.get(of.objective, test_horizon_runs)
    return module.fit_tolerance, fact_tolerance if of.form in test_runs.OBJECTIVES else module.valid_tolerance


def train_references(folder: Path, data: Path, systems: Iterable[str] = tuple(SYSTEMS), steps: int = STEPS) -> Path:
    """Train the reference run: FSDP2 in one process, fp32, one micro-batch a step unless there is a token budget.

    Returns:
        The folder.
    """
    files = [config_file(folder, data, system, system, "fsdp", steps=steps) for system in systems]
    run_ranks(test_runs.train_runs, 1, [(file, None) for file in files])
    return folder


def assert_as_reference(folder: Path, name: str, reference: Path, system: str, steps: int = STEPS) -> None:
    """Assert that run ``name`` in ``folder`` logs the same metrics as the system's reference."""
    same_run(folder, name, reference, system, steps, *tolerances(system), same_tokens(system))


def same_tokens(system: str) -> bool:
    """Return whether the tokens of a step are independent of its micro-batches; each of them has a concept's name once."""
    return SYSTEMS[system].objective != "concept"
