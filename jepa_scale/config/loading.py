"""Read a config from a YAML file and dotted overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jepa_scale.config import yaml12
from jepa_scale.config.foreign import program_of
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config, RunConfig
from jepa_scale.config.values import expand
from jepa_scale.utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY if (REPOSITORY / "configs").is_dir() else Path(__file__).resolve().parents[1]
"""The folder that holds ``configs/``: the repository, or the package if it was installed from a wheel."""


def find_file(path: str | Path, key: str, beside: Path | None = None) -> Path:
    """Find the file of ``path``: as given, beside the config that names it, or among those of jepa_scale
    (:data:`SHIPPED`).

    Raises:
        InputError: no such file in any of these folders, or it is a folder.
    """
    try:
        path = Path(expand(str(path)))
    except ValueError as error:
        raise InputError(f"{key}: {error}") from None
    candidates = (
        [path] if path.is_absolute() else [Path.cwd() / path, *([beside / path] if beside else []), SHIPPED / path]
    )
    for candidate in candidates:
        if os.path.isfile(candidate):  # Path.is_file raises an error for a name that is too long
            return candidate
        if os.path.isdir(candidate):
            raise InputError(f"{key}: {str(candidate)!r} is a folder; give a file")
    raise InputError(f"{key}: no file {str(path)!r} (looked for {', '.join(str(p) for p in candidates)})")


def shipped_configs() -> list[tuple[str, str]]:
    """Return the names for ``--config``, each with the first sentence of the file's opening comment."""
    return [(f"configs/{file.name}", _first_sentence(file)) for file in sorted((SHIPPED / "configs").glob("*.yaml"))]


def _first_sentence(config: Path) -> str:
    prose = []
    for line in config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):  # the comment is at its end, or at a command
            break
        prose.append(line[2:])
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(prose))[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        InputError: it cannot be read, or is no mapping in YAML 1.2; the message names the file and, if it can, the line.
    """
    values = yaml12.parse(read_text(path), str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {'list' if isinstance(values, list) else 'single value'}"
        raise InputError(f"{path}: {found}; it must hold sections with keys, as the files in configs/ do")
    return values


def read_text(path: Path) -> str:
    """Return the text of a file of the user, which must be UTF-8.

    Raises:
        InputError: it cannot be read, or is not UTF-8; the message names the line.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8 text; save it in that encoding") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in place, and build the sections that are missing or null. The value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must have the form section.key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        child = values[parent]
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent!r} is not a section")
        values = child
    values[leaf] = value_of(override)


def value_of(override: str) -> Any:
    """Return the value that ``section.key=value`` gives to its key."""
    text = override.partition("=")[2]
    try:
        return yaml12.parse_argument(text)
    except InputError as error:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value ({error})") from None


BASE = "base"
"""Key of a config that names the file whose keys it changes."""
_CHOSEN_BY = {"model": "family", "data": "source", "objective": "name"}
"""Section → the key whose value decides which other keys the section has."""


def base_of(values: Mapping[str, Any], file: Path) -> Path | None:
    """Return the file that a config names as its base, if any.

    Raises:
        InputError: there is no such file, or it has a base itself.
    """
    if BASE not in values:
        return None
    if not isinstance(values[BASE], str):
        raise InputError(f"{file}: base: must be the name of a config file, not {values[BASE]!r}")
    base = find_file(values[BASE], f"{file}: base", file.parent)
    if BASE in read_yaml(base):
        raise InputError(f"{file}: base: {values[BASE]} has a base itself, and there is one level; name that base")
    return base


def replaces(section: str, child: Any, base: Any) -> bool:
    """Return whether a config's section takes the place of its base's instead of changing single keys of it.

    It does if one of the two is no mapping, or if it chooses another objective, source or family, which has other keys.
    """
    if not isinstance(child, dict) or not isinstance(base, dict):
        return True
    key = _CHOSEN_BY.get(section, "")
    return key in child and child[key] != base.get(key, child[key])


def read_config(file: Path) -> dict[str, Any]:
    """Read a config file and the base that it names, with the files of their sections ``model:``.

    The base's ``run.name`` is left out: two configs are two runs.

    Raises:
        InputError: a file cannot be read, or is no mapping.
    """
    values = read_yaml(file)
    if (program := program_of(values)) is not None:
        raise InputError(
            f"{file}: is a config of {program.name}; jepa-scale config --from {program.flag} {file} writes ours "
            f"({program.page})"
        )
    base = base_of(values, file)
    values.pop(BASE, None)
    if base is None:
        return with_model_file(values, file)
    below = read_config(base)
    if isinstance(below.get("run"), dict):
        below["run"].pop("name", None)
    values = with_model_file(values, file)
    for section, own in values.items():
        below[section] = own if replaces(section, own, below.get(section)) else _merged(below[section], own)
    return below


def with_model_file(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Put the keys of the file that ``model:`` names in its place, if it names one. ``file`` holds the values."""
    if isinstance(values.get("model"), str):
        values["model"] = read_yaml(find_file(values["model"], "model", file.parent))
    return values


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {key: value for key, value in own.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | own | {key: _merged(base[key], value) for key, value in both.items()}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config file, apply the overrides, and check the keys of the common sections.

    ``model:`` may name a file of its own (``model: configs/models/tiny.yaml``); overrides such as ``model.hidden_size=64``
    change that file's keys. ``base:`` names a config whose keys this one changes (:func:`read_config`).

    Raises:
        InputError: with the key or file that is wrong and what to do.
    """
    file = find_file(path, "--config")
    if any(override.partition("=")[0] == BASE for override in overrides):
        raise InputError("base: stands in a config file; on the command line give the other file as --config")
    values = read_config(file)
    if any(o.startswith("model=") for o in overrides):
        apply_override(values, [o for o in overrides if o.startswith("model=")][-1])
    values = with_model_file(values, file)
    for override in overrides:
        if not override.startswith("model="):
            apply_override(values, override)
    config = parse_section(Config, values, "")
    if config.run.name:
        return config
    try:
        run = parse_section(RunConfig, {**config.run.resolved(), "name": file.stem}, "run")
    except InputError as error:
        raise InputError(f"{error} (this is the config's file name; give run.name)") from None
    return config.model_copy(update={"run": run})


def trained_with(config: Config, saved: Mapping[str, Any]) -> Config:
    """Return a run's config with the model and the objective of a checkpoint's config, ``saved``.

    The run may have been resumed with other ones since.
    """
    return config.model_copy(update={key: saved[key] for key in ("model", "objective") if key in saved})


def to_yaml(values: dict[str, Any]) -> str:
    """Return the text of a config file that holds these values."""
    return yaml12.dump(values)
