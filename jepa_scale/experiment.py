"""Turn a config into an experiment: check every section against the options of the class it names.

Nothing is built before all sections are checked.

This module does not import torch. Options are declared in modules of their own, beside the code that they configure,
and a class is imported when it is first needed. So a wrong config is refused within a fraction of a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_scale.config.loading import to_yaml
from jepa_scale.config.metric_keys import check_intervals
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import (
    CheckpointConfig,
    Config,
    EngineConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    Section,
    TrainConfig,
)
from jepa_scale.data import SourceOptions, parse_data
from jepa_scale.evaluation.options import OPTIONS, EvaluationOptions
from jepa_scale.models.options import ModelOptions
from jepa_scale.telemetry.callbacks import callback_class
from jepa_scale.telemetry.records import SUMMARY_FILE
from jepa_scale.telemetry.trackers import check_installed
from jepa_scale.utils.devices import check_fp16
from jepa_scale.utils.errors import InputError, suggestion
from jepa_scale.utils.importing import imported

if TYPE_CHECKING:
    from jepa_scale.models.backbone import Backbone
    from jepa_scale.objectives.base import Objective

OBJECTIVES = {
    "lm": ("jepa_scale.objectives.lm:LanguageModeling", "jepa_scale.objectives.lm_options:LmOptions"),
    "two_view": (
        "jepa_scale.objectives.two_view.objective:TwoView",
        "jepa_scale.objectives.two_view.config:TwoViewOptions",
    ),
    "concept": (
        "jepa_scale.objectives.concept.objective:Concept",
        "jepa_scale.objectives.concept.config:ConceptOptions",
    ),
    "horizon": (
        "jepa_scale.objectives.horizon.objective:Horizon",
        "jepa_scale.objectives.horizon.config:HorizonOptions",
    ),
    "mtp": ("jepa_scale.objectives.mtp.objective:Mtp", "jepa_scale.objectives.mtp.config:MtpOptions"),
    "next_latent": (
        "jepa_scale.objectives.next_latent.objective:NextLatent",
        "jepa_scale.objectives.next_latent.config:NextLatentOptions",
    ),
    "stp": ("jepa_scale.objectives.stp:Stp", "jepa_scale.objectives.stp_options:StpOptions"),
    "span": ("jepa_scale.objectives.span.objective:Span", "jepa_scale.objectives.span.config:SpanOptions"),
    "grid": ("jepa_scale.objectives.grid.objective:Grid", "jepa_scale.objectives.grid.config:GridOptions"),
}
"""Name of an objective → import path of its class, and of that class's ``Options``."""


@dataclass(frozen=True, slots=True)
class ChosenObjective:
    """An objective and its options."""

    name: str
    options: Section

    @property
    def cls(self) -> type[Objective]:
        """Import and return the class that ``objective.name`` names."""
        return objective_class(self.name)

    def build(self, backbone: Backbone, data: Any) -> Objective:
        """Build the objective, with new heads."""
        return self.cls(self.options, backbone, data)

    def resolved(self) -> dict[str, Any]:
        """Return ``objective:`` with its defaults filled in."""
        return {"name": self.name, **self.options.resolved()}


@dataclass(frozen=True, slots=True)
class Experiment:
    """A validated config: the options of every section. Nothing has been built yet.

    It is frozen. To change a value, such as a precision that the devices decide, make a new experiment with
    :func:`dataclasses.replace` and ``section.model_copy(update={...})``.
    """

    run: RunConfig
    engine: EngineConfig
    model: ModelOptions
    data: SourceOptions
    objective: ChosenObjective
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    eval: EvaluationOptions
    log: LogConfig

    def resolved(self) -> dict[str, Any]:
        """Return the config with every default filled in, as plain YAML values that load as the same experiment."""
        sections = {section.name: getattr(self, section.name) for section in fields(self)}
        chosen = {"model", "data", "objective", "eval"}  # their keys depend on others: only those in use are kept
        return {n: s.resolved() if n in chosen else s.model_dump(mode="json") for n, s in sections.items()}

    def to_yaml(self) -> str:
        """Return the text of :meth:`resolved`, as a run saves it."""
        return to_yaml(self.resolved())


def objective_class(name: str) -> type[Objective]:
    """Return the class of an objective: a name in ``OBJECTIVES``, or ``module:Class`` for one outside this package.

    Raises:
        InputError: there is no such name, module or class, or the class is no :class:`Objective`.
    """
    _check_name(name)
    outside = imported(OBJECTIVES[name][0] if name in OBJECTIVES else name, "objective.name")
    from jepa_scale.objectives.base import Objective  # its subclass has imported it already

    if not (isinstance(outside, type) and issubclass(outside, Objective)):
        raise InputError(f"objective.name: {name!r} is no subclass of jepa_scale.objectives.base.Objective")
    return outside


def objective_options(name: str) -> type[Section]:
    """Return the ``Options`` of an objective by name. For one outside this package, its class is imported.

    Raises:
        InputError: as :func:`objective_class`.
    """
    _check_name(name)
    if name not in OBJECTIVES:
        return objective_class(name).Options
    options: type[Section] = imported(OBJECTIVES[name][1], "objective.name")  # without torch, which its class needs
    return options


def _check_name(name: str) -> None:
    if name not in OBJECTIVES and ":" not in name:
        hint = suggestion(name, OBJECTIVES, f"known: {', '.join(OBJECTIVES)}, or module:Class of your own")
        raise InputError(f"objective.name: unknown objective {name!r}; {hint}")


def parse_objective(section: Mapping[str, Any]) -> ChosenObjective:
    """Check the section ``objective:`` against the options of the objective that it names.

    Raises:
        InputError: names the key.
    """
    options = dict(section)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"objective.name: required key is missing; one of {', '.join(OBJECTIVES)}")
    return ChosenObjective(name, parse_section(objective_options(name), options, "objective"))


def validate(config: Config) -> Experiment:
    """Check every section against the options of the class it names.

    Raises:
        InputError: names the key.
    """
    objective = parse_objective(config.objective)
    data = parse_data(config.data)
    data = parse_data(data.resolved())  # as in a saved config: without keys that the others make meaningless
    return Experiment(
        run=config.run,
        engine=config.engine,
        model=parse_section(ModelOptions, config.model, "model"),
        data=data,
        objective=objective,
        optim=config.optim,
        train=_with_flops(config.train),
        checkpoint=config.checkpoint,
        eval=parse_section(OPTIONS[data.evaluation], config.eval, "eval"),
        log=config.log,
    )


def check_trainable(experiment: Experiment) -> None:
    """Check what only training asks of a config, before anything is built.

    Raises:
        InputError: ``checkpoint.keep_best`` has nothing to choose from, this machine cannot compute in ``engine.precision``, there is
            no such callback, a package of ``log.trackers`` is not installed, or ``log.profile`` is beyond the last step.
    """
    for name in experiment.train.callbacks:
        callback_class(name)
    check_intervals(experiment.train, experiment.checkpoint)
    check_installed(experiment.log.trackers)
    if experiment.train.steps:
        check_profile(experiment.log, experiment.train.steps)
    if experiment.engine.precision == "fp16":
        check_fp16()


def check_profile(log: LogConfig, last: int) -> None:
    """Check ``log.profile`` against the run's last step. Of epochs and FLOPs this is known when the data have been read.

    Raises:
        InputError: the run ends before the last step that is to be profiled.
    """
    if log.profile and log.profile[1] > last:
        raise InputError(f"log.profile: {log.profile}: the run has {last:,} steps; choose steps up to {last}")


def _with_flops(train: TrainConfig) -> TrainConfig:
    """Set ``train.flops`` to the FLOPs that the run of ``train.same_flops_as`` took.

    Raises:
        InputError: that run's summary does not give its FLOPs.
    """
    if not train.same_flops_as:
        return train
    return train.model_copy(update={"flops": _flops_of(train.same_flops_as, train.flops)})


def _flops_of(run: str, known: float) -> float:
    """Return the FLOPs of a run, from its summary. A resolved config holds the number and does not need the run."""
    problem, flops = "", None
    try:
        summary = json.loads((Path(run).expanduser() / SUMMARY_FILE).read_text(encoding="utf-8"))
        flops = summary.get("flops") if isinstance(summary, dict) else None
    except OSError:
        problem = f"{run!r} is no run directory with a summary.json; give one of a run that has ended"
    except ValueError:
        problem = f"the summary.json of {run!r} is damaged; give another run"
    if not problem and not (isinstance(flops, int | float) and math.isfinite(flops) and flops > 0):
        problem = f"the summary.json of {run!r} has no flops; train that run again, or give train.flops"
    if not problem and known and flops != known:
        problem = f"{run!r} took {flops:.4g} FLOPs, and train.flops is {known:.4g}; remove one"
    if not problem:
        assert flops is not None
        return float(flops)
    if known and flops is None:
        return known
    raise InputError(f"train.same_flops_as: {problem}")
