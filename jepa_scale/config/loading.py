"""Read a config from a YAML file and dotted overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config
from jepa_scale.utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY if (REPOSITORY / "configs").is_dir() else Path(__file__).resolve().parents[1]
"""The folder that holds ``configs/``: the repository, or the package if it was installed from a wheel."""


def find_file(path: str | Path, key: str, beside: Path | None = None) -> Path:
    """Find the file of ``path``: as given, beside the config that names it, or among those of jepa_scale
    (:data:`SHIPPED`).

    Raises:
        InputError: no such file in any of these folders.
    """
    path = Path(path).expanduser()
    candidates = (
        [path] if path.is_absolute() else [Path.cwd() / path, *([beside / path] if beside else []), SHIPPED / path]
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(f"{key}: no file {str(path)!r} (looked for {', '.join(str(p) for p in candidates)})")


def shipped_configs() -> list[tuple[str, str]]:
    """Return the names for ``--config``, each with the first line of the file's opening comment."""
    files = sorted((SHIPPED / "configs").glob("*.yaml"))
    return [
        (f"configs/{file.name}", file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for file in files
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file. The error for a damaged file names the file and the line."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a mapping of keys, not {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in place; the value is read as YAML (``1e-3`` as a number too)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must have the form section.key=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent!r} is not a section")
        values = child
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value") from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a config file, apply the overrides, and check the keys of the common sections.

    ``model:`` may name a file of its own (``model: configs/models/tiny.yaml``); overrides such as ``model.hidden_size=64``
    change that file's keys.

    Raises:
        InputError: with the key or file that is wrong and what to do.
    """
    file = find_file(path, "--config")
    values = read_yaml(file)
    if any(o.startswith("model=") for o in overrides):
        apply_override(values, [o for o in overrides if o.startswith("model=")][-1])
    if isinstance(values.get("model"), str):
        values["model"] = read_yaml(find_file(values["model"], "model", file.parent))
    for override in overrides:
        if not override.startswith("model="):
            apply_override(values, override)
    config = parse_section(Config, values, "")
    if config.run.name:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"name": file.stem})})


def to_yaml(values: dict[str, Any]) -> str:
    """Return the text of a config file that holds these values."""
    return yaml.safe_dump(values, sort_keys=False, width=100)
