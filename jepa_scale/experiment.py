"""A config becomes a plan: every section is checked against the options of what it names, before anything is built.

Nothing here takes torch: options are declared in modules of their own, beside the code that they are for, and a class is
imported when somebody asks for it. So whatever can be said of a config alone is said within a fraction of a second.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jepa_scale.config.schema import Config, Section, parse_section
from jepa_scale.data import DataOptions, parse_data
from jepa_scale.evaluation.options import OPTIONS
from jepa_scale.models.options import ModelOptions
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
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
    "stp": ("jepa_scale.objectives.stp:Stp", "jepa_scale.objectives.stp_options:StpOptions"),
    "span": ("jepa_scale.objectives.span.objective:Span", "jepa_scale.objectives.span.config:SpanOptions"),
    "grid": ("jepa_scale.objectives.grid.objective:Grid", "jepa_scale.objectives.grid.config:GridOptions"),
}
"""Name of an objective → where its class is, and where that class's ``Options`` are declared."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A config whose every section has been validated; nothing has been built yet."""

    config: Config
    data: DataOptions
    model: ModelOptions
    objective: Section
    evaluation: Section

    @property
    def objective_class(self) -> type[Objective]:
        """The class that ``objective.name`` names."""
        return objective_class(self.config.objective["name"])


def objective_class(name: str) -> type[Objective]:
    """The objective of a name in ``OBJECTIVES``, or of ``module:Class`` for one that lives outside of this package.

    Raises:
        InputError: there is no such name, module or class, or the class is no :class:`Objective`.
    """
    _check_name(name)
    if name in OBJECTIVES:
        found: type[Objective] = _named(OBJECTIVES[name][0])
        return found
    try:
        outside = _named(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"objective.name: {name!r} cannot be imported ({error}); is its folder in PYTHONPATH?"
        ) from error
    from jepa_scale.objectives.base import Objective  # its subclass has imported it already

    if not (isinstance(outside, type) and issubclass(outside, Objective)):
        raise InputError(f"objective.name: {name!r} is no subclass of jepa_scale.objectives.base.Objective")
    return outside


def objective_options(name: str) -> type[Section]:
    """``Options`` of the objective of that name. Those of an objective outside of this package are its class's, which is
    imported.

    Raises:
        InputError: as :func:`objective_class`.
    """
    _check_name(name)
    options: type[Section] = _named(OBJECTIVES[name][1]) if name in OBJECTIVES else objective_class(name).Options
    return options


def _check_name(name: str) -> None:
    if name not in OBJECTIVES and ":" not in name:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OBJECTIVES)}, or module:Class of your own"
        raise InputError(f"objective.name: unknown objective {name!r}; {hint}")


def _named(place: str) -> Any:
    """What ``module:name`` is."""
    module, _, attribute = place.partition(":")
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
    objective = parse_section(objective_options(name), options, "objective")
    data = parse_data(config.data)
    model = parse_section(ModelOptions, config.model, "model")
    evaluation = parse_section(OPTIONS[data.evaluation], config.eval, "eval")
    config.objective = {"name": name, **objective.resolved()}
    config.data, config.model, config.eval = data.resolved(), model.resolved(), evaluation.resolved()
    return Plan(config, data, model, objective, evaluation)
