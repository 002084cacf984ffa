"""Config → model, objective, engine, data, evaluation: the one place that knows every part."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jepa_scale.config import Config, Section, parse_section
from jepa_scale.data import DataOptions, load_data, parse_data
from jepa_scale.data.loader import Loader
from jepa_scale.data.stream import SampleStream
from jepa_scale.distributed import Ranks
from jepa_scale.engines import check_engine, create_engine, resolve
from jepa_scale.engines.base import Engine, EngineOptions
from jepa_scale.errors import InputError
from jepa_scale.evaluate.reversal import EvalOptions, evaluate
from jepa_scale.models.backbone import ModelOptions, build_backbone
from jepa_scale.objectives.base import JepaModel, Objective
from jepa_scale.optim import parameter_groups

OBJECTIVES = {
    "lm": "jepa_scale.objectives.lm:LanguageModeling",
    "two_view": "jepa_scale.objectives.two_view:TwoView",
    "concept": "jepa_scale.objectives.concept:Concept",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A config whose every section has been validated; nothing has been built yet."""

    config: Config
    data: DataOptions
    model: ModelOptions
    objective_class: type[Objective]
    objective: Section
    evaluation: EvalOptions


@dataclass(slots=True)
class Run:
    """Everything a training loop needs."""

    config: Config
    engine: Engine
    objective: Objective
    data: Any
    stream: SampleStream
    batches: Callable[[int], Loader]  # start step → the steps' micro-batches of this rank
    evaluate: Callable[[], dict[str, dict[str, float]]]


def objective_class(name: str) -> type[Objective]:
    if name not in OBJECTIVES:
        raise InputError(f"objective.name: unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def validate(config: Config) -> Plan:
    """Check every section and write its defaults back into the config, so that the saved config is complete.

    Raises:
        InputError: names the key.
    """
    options = dict(config.objective)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"objective.name: required key is missing; one of {', '.join(OBJECTIVES)}")
    cls = objective_class(name)
    objective = parse_section(cls.Options, options, "objective")
    data = parse_data(config.data)
    model = parse_section(ModelOptions, config.model, "model")
    evaluation = parse_section(EvalOptions, config.eval, "eval")
    config.objective = {"name": name, **objective.resolved()}
    config.data, config.model, config.eval = data.resolved(), model.resolved(), evaluation.resolved()
    return Plan(config, data, model, cls, objective, evaluation)


def set_threads(config: Config, ranks: Ranks) -> None:
    """Share the host's cores among its ranks; BLAS threads that outnumber the cores fight each other."""
    if ranks.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(config.engine.threads or max(1, len(os.sched_getaffinity(0)) // local))


def build(plan: Plan, ranks: Ranks) -> Run:
    """Build all parts, identically on every rank; the engine shards them last."""
    config = plan.config
    set_threads(config, ranks)
    engine_name = resolve(config.engine.name, ranks)
    check_engine(engine_name, config.engine.deepspeed)  # before the data is read and the model made

    data = load_data(config.data)
    stream = SampleStream(
        n=len(data.train),
        seed=config.run.seed,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        fingerprint=data.fingerprint,
        order=data.order,
    )
    torch.manual_seed(config.run.seed)  # the backbone first: its weights do not depend on the objective
    backbone = build_backbone(plan.model, data.vocab_size)
    objective = plan.objective_class(plan.objective, backbone, data)
    module = JepaModel(backbone, objective)

    engine = create_engine(
        engine_name,
        module.to(ranks.device),
        shard=list(backbone.layers),
        groups=parameter_groups(module, config.optim, head_prefixes=("objective.",)),
        optim_options=config.optim,
        engine_options=EngineOptions(
            precision=config.engine.precision,
            clip_norm=config.optim.clip_norm,
            accumulation=config.train.accumulation,
            deepspeed=Path(config.engine.deepspeed),
        ),
        ranks=ranks,
    )

    def batches(start_step: int) -> Loader:
        return Loader(
            data.train,
            stream,
            objective.view_maker(),
            streams=objective.streams,
            start_step=start_step,
            steps=config.train.steps,
            seed=config.run.seed,
            workers=plan.data.workers,
        )

    def run_evaluation() -> dict[str, dict[str, float]]:
        engine.eval()
        with torch.no_grad():
            answerer = objective.answerer(
                lambda task, batch, *args: engine.forward(task, batch.to(ranks.device), *args)
            )
            results = evaluate(answerer, data.splits, data.names, plan.evaluation, ranks.device)
        engine.train()
        return results

    return Run(config, engine, objective, data, stream, batches, run_evaluation)
