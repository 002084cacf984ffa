"""JSON Schema of a whole config, with which an editor completes keys, shows their meaning and marks errors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from jepa_scale.config.loading import BASE
from jepa_scale.config.schema import Config, Section
from jepa_scale.data import SOURCES
from jepa_scale.evaluation.options import OPTIONS
from jepa_scale.experiment import OBJECTIVES, objective_options
from jepa_scale.models.options import ModelOptions

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def kinds() -> dict[str, dict[str, type[Section]]]:
    """Return section → value of its deciding key → the section's keys. ``model`` and ``eval`` have no deciding key."""
    return {
        "model": {"": ModelOptions},
        "data": dict(SOURCES),
        "objective": {name: objective_options(name) for name in OBJECTIVES},
        "eval": {name: cls for name, cls in OPTIONS.items()},
    }


CHOSEN_BY = {"data": "source", "objective": "name"}
"""Section → its deciding key, whose value determines the other keys."""


BASE_FILE = {"type": "string", "description": "A config whose keys this one changes."}
OUTSIDE = {"type": "string", "pattern": r"^[\w.]+:\w+$", "description": "module:Class, an objective of one's own."}


def config_schema() -> Schema:
    """Return the schema (draft 2020-12).

    A config that fits it may still be refused, as a schema cannot express every rule, such as keys that exclude each
    other.
    """
    found = kinds()
    classes: list[type[Section]] = list(
        dict.fromkeys([Config, *(cls for by_name in found.values() for cls in by_name.values())])
    )
    references, shared = models_json_schema([(cls, "validation") for cls in classes])
    definitions: Schema = shared["$defs"]

    def of(cls: type[Section]) -> Schema:
        return references[cls, "validation"]

    top = dict(definitions.pop(of(Config)["$ref"].rpartition("/")[2]))
    sections = dict(top["properties"])
    described = {name: sections[name]["description"] for name in found}
    file = {"type": "string", "description": "A file of such keys."}
    sections["model"] = {"description": described["model"], "anyOf": [file, of(ModelOptions)]}
    sections["eval"] = {
        "description": described["eval"],
        "anyOf": [of(cls) for cls in dict.fromkeys(found["eval"].values())],
    }
    for section, key in CHOSEN_BY.items():
        conditions = []
        for name, cls in found[section].items():
            own = definitions[of(cls)["$ref"].rpartition("/")[2]]
            chosen = f"{section}_{name}"
            definitions[chosen] = {**own, "properties": {key: {"const": name}, **own.get("properties", {})}}
            conditions.append(
                {
                    "if": {"properties": {key: {"const": name}}, "required": [key]},
                    "then": {"$ref": f"#/$defs/{chosen}"},
                }
            )
        sections[section] = {
            "description": described[section],
            "type": "object",
            "properties": {
                key: {"enum": list(found[section])}
                if section == "data"
                else {"anyOf": [{"enum": list(found[section])}, OUTSIDE]}
            },
            "required": [key],
            "allOf": conditions,
        }
    return {"$schema": DRAFT, **top, "properties": {BASE: BASE_FILE, **sections}, "$defs": definitions}
