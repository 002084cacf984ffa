"""Find the origin of each value of a resolved config: a line of a file, the command line, or the default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from jepa_scale.config import yaml12
from jepa_scale.config.loading import (
    base_of,
    find_file,
    read_config,
    read_text,
    read_yaml,
    replaces,
    value_of,
    with_model_file,
)
from jepa_scale.config.schema import Section
from jepa_scale.experiment import Experiment

FOLLOWS = "follows from other keys"


def annotate(experiment: Experiment, path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return the experiment as YAML, each value with its origin as a comment; it loads again as the same experiment.

    Args:
        experiment: the result of resolving ``path`` and ``overrides``.
    """
    given = _given(find_file(path, "--config"), overrides)
    text = experiment.to_yaml()
    lines = text.splitlines()
    comments: dict[int, str] = {}
    for keys, line in _leaves(yaml12.compose(text, "")):
        comments[line] = _origin(experiment, keys, given)
    column = max(min(len(lines[line]), 48) for line in comments) + 2
    return "".join(
        f"{line:{column - 2}}  # {comments[number]}\n" if number in comments else f"{line}\n"
        for number, line in enumerate(lines)
    )


def _given(file: Path, overrides: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Return key → origin for the keys that the user gave; of several origins the last one counts."""
    given = _lines_of_config(file)
    if base := base_of(read_yaml(file), file):
        own, below = with_model_file(read_yaml(file), file), read_config(base)
        replaced = {section for section in own if replaces(section, own[section], below.get(section))}
        inherited = {
            keys: where
            for keys, where in _lines_of_config(base).items()
            if keys[0] not in replaced and keys != ("run", "name")
        }
        given = inherited | given
    models = [override for override in overrides if override.startswith("model=")]
    model = value_of(models[-1]) if models else None
    if isinstance(model, str):
        given = {keys: where for keys, where in given.items() if keys[0] != "model"}
        given |= _lines_of(find_file(model, "model", file.parent), ("model",))
    for override in overrides:
        keys = tuple(override.partition("=")[0].split("."))
        if keys == ("model",) and isinstance(model, str):
            continue  # its keys are in that file
        given = {other: where for other, where in given.items() if other[: len(keys)] != keys}
        given[keys] = "command line"
    return given


def _lines_of_config(file: Path) -> dict[tuple[str, ...], str]:
    """Return key → line of one file, with the lines of the file that its ``model:`` names."""
    given, model = _lines_of(file, ()), read_yaml(file).get("model")
    if isinstance(model, str):
        given = {keys: where for keys, where in given.items() if keys[0] != "model"}
        given |= _lines_of(find_file(model, "model", file.parent), ("model",))
    return given


def _lines_of(file: Path, prefix: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    root = yaml12.compose(read_text(file), str(file))
    return {(*prefix, *keys): f"{shown}, line {line + 1}" for keys, line in _leaves(root, at_key=True)}


def _leaves(
    node: yaml.Node | None, keys: tuple[str, ...] = (), at_key: bool = False
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield path and line of each leaf value: the line of its key, or the line that a comment may follow."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in yaml12.pairs(node, ""):
        path = (*keys, key.value)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, path, at_key)
        else:  # a list begins in the next line, a text may end lines later
            ends = not at_key and not (isinstance(value, yaml.SequenceNode) and not value.flow_style)
            yield path, (value.end_mark if ends else key.start_mark).line


def _origin(experiment: Experiment, keys: tuple[str, ...], given: dict[tuple[str, ...], str]) -> str:
    for length in range(len(keys), 0, -1):  # a list or mapping may have been given whole
        if where := given.get(keys[:length]):
            return where
    if keys == ("run", "name"):
        return "name of the file"
    section: Any = getattr(experiment, keys[0])
    if isinstance(section, Section) and len(keys) == 2:
        default = type(section).model_fields[keys[1]].get_default(call_default_factory=True)
        if getattr(section, keys[1]) != default:
            return FOLLOWS
    return "default"
