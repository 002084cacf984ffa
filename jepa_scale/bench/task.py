"""A task of the bench: one file that says which data, which configs and which measures are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jepa_scale.config.loading import read_yaml
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Section
from jepa_scale.config.values import Text
from jepa_scale.utils.errors import InputError, suggestion

BUILT_IN = Path(__file__).parent / "tasks"
BASELINE = "lm"
"""Name of the arm that every other one is compared with."""
ONLY = "all"
"""Name of the case of a task that has no variants."""
DERIVED = "derived"
"""First part of the name of a figure that is derived from all cases."""


class Measure(Section):
    """What is read off a run."""

    of: Text = Field(
        description="Where it stands: eval/<split>/<metric> of the run's summary, or <function>/<metric> of a function of "
        "`measured_by`."
    )
    better: Literal["higher", "lower"] = Field(description="Which values are better.")


class Arm(Section):
    """An objective that takes part, with what its runs need beside it."""

    objective: dict[str, Any] = Field(description="The section objective: of its runs, `name` and options.")
    config: dict[str, Any] = Field(default_factory=dict, description="Keys of the config that differ for this arm.")
    control: dict[str, Any] | Text | None = Field(
        None,
        description="Options that make its control, {} = none; or the name of an arm whose control is its own, too. null = "
        "`detach: true` where the objective has that option, else none.",
    )


class Case(Section):
    """A variant of a task, such as another size of its data."""

    data: dict[str, Any] = Field(default_factory=dict, description="Options of the generator that differ.")
    config: dict[str, Any] = Field(default_factory=dict, description="Keys of the config that differ.")


class Quick(Section):
    """What --quick changes."""

    seeds: int = Field(3, ge=1, le=100, description="Number of seeds.")
    arms: list[Text] = Field(default_factory=list, description="Arms that take part; empty = all.")
    cases: list[Text] = Field(default_factory=list, description="Cases that take part; empty = all.")
    config: dict[str, Any] = Field(default_factory=dict, description="Keys of the config that differ.")


class Task(Section):
    """The keys of a task's file.

    In a config's texts ``{data}`` stands for the folder that the generator wrote, ``{vocabulary}`` for the number of its token ids and
    ``{seed}`` for the run's seed.
    """

    title: Text = Field(description="Heading on the page.")
    about: Text = Field(description="What is asked, and why latent prediction should help; Markdown.")
    generator: Text | None = Field(
        None,
        description="Generator of the data: a module of jepa_scale.bench.generators, or module:function; null = none.",
    )
    data: dict[str, Any] = Field(default_factory=dict, description="Options of the generator.")
    data_seed: int | None = Field(0, ge=0, description="Seed of the generator; null = the run's seed.")
    config: dict[str, Any] = Field(description="Config of every run, without its objective.")
    measures: dict[str, Measure] = Field(min_length=1, description="Name on the page → what is compared.")
    measured_by: list[Text] = Field(
        default_factory=list,
        description="Functions that measure a finished run: modules of jepa_scale.bench.measures, or module:function.",
    )
    derived_by: Text | None = Field(
        None,
        description="Function that derives figures from all cases of an arm and seed, such as a slope: the `derive` of a module of "
        f"jepa_scale.bench.measures, or module:function; measures read them as `{DERIVED}/<metric>`.",
    )
    arms: dict[str, Arm] = Field(description=f"Name → objective; one is `{BASELINE}`, the baseline.")
    cases: Annotated[dict[str, Case], Field(min_length=1)] = Field(
        default_factory=lambda: {ONLY: Case()}, description="Variants of the task."
    )
    seeds: int = Field(5, ge=1, le=100, description="Number of seeds.")
    quick: Quick = Field(Quick(), description="What --quick changes.")

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if BASELINE not in self.arms:
            raise ValueError(f"arms: has no arm {BASELINE!r}, the baseline of the others; add one")
        for key, known in (("arms", self.arms), ("cases", self.cases)):
            for name in getattr(self.quick, key):
                if name not in known:
                    raise ValueError(f"quick.{key}: there is no {name!r}; there are {', '.join(known)}")
        for name, arm in self.arms.items():
            if isinstance(arm.control, str):
                other = self.arms.get(arm.control)
                if other is None or isinstance(other.control, str):
                    raise ValueError(f"arms.{name}.control: {arm.control!r} is no arm with a control of its own")
        functions = [function_name(function) for function in self.measured_by]
        if twice := next((name for name in functions if functions.count(name) > 1 or name in ("eval", DERIVED)), None):
            raise ValueError(
                f"measured_by: {twice!r} is the name of two of the things that are measured; rename the function"
            )
        for name, measure in self.measures.items():
            if measure.of.partition("/")[0] not in {"eval", DERIVED, *functions}:
                raise ValueError(
                    f"measures.{name}.of: {measure.of!r} begins neither with eval/, derived/ nor a function of measured_by"
                )
        return self


def function_name(function: str) -> str:
    """Return the name of a module of ours, or of the function in ``module:function``."""
    return function.rpartition(":")[2]


def built_in() -> list[str]:
    """Return the names of the tasks that come with jepa_scale."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def read_task(name: str) -> tuple[str, Task]:
    """Return the name and the task of a file, or of a built-in task by its name.

    Raises:
        InputError: there is no such task or file, or a key is wrong; the message names the key.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = BUILT_IN / f"{name}.yaml"
        if name not in built_in():
            hint = suggestion(name, built_in(), f"tasks: {', '.join(built_in())}, or a file of your own, my_task.yaml")
            raise InputError(f"task {name!r}: there is none of that name; {hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path.stem, parse_section(Task, read_yaml(path), str(path))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes``; mappings within are merged key by key."""
    found = dict(values)
    for key, change in changes.items():
        old = found.get(key)
        found[key] = merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return found


def filled(value: Any, **texts: str) -> Any:
    """Return a value with ``{name}`` in its texts replaced. A text that is nothing but ``{seed}``, or another number, becomes one."""
    if isinstance(value, dict):
        return {key: filled(inner, **texts) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, **texts) for inner in value]
    if isinstance(value, str):
        for name, text in texts.items():
            if value == "{" + name + "}" and text.isdecimal():
                return int(text)
            value = value.replace("{" + name + "}", text)
    return value
