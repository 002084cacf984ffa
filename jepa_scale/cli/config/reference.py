"""The reference of all config keys with type, default and meaning, as one page of Markdown: docs/config.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jepa_scale.cli.config.schema import CHOSEN_BY, Schema, kinds
from jepa_scale.config.schema import Config
from jepa_scale.data import SOURCES

HEAD = """# Every key of a config

An experiment is one YAML file of these sections. `jepa-scale config C` prints a file with every default filled in, and where
each value is from; `section.key=value` after `--config C` overrides one. `jepa-scale config --schema > schema.json` writes a
JSON Schema: with `# yaml-language-server: $schema=schema.json` as a config's first line an editor completes and checks it.
A name in [brackets] is what the system that the objective comes from calls the key (`docs/migration.md`).

This page is written by `jepa-scale config --reference > docs/config.md`.

## How it is read

- YAML 1.2. A value without quotes is a boolean if it is `true` or `false`, null if it is `null`, `~` or nothing, an integer (`12`, `0x1f`,
  `0o17`) or a float (`1.5`, `1e-4`); anything else is a text, also what YAML 1.1 reads as something else: `yes`, `on`, `1_000`, `12:30`,
  `2024-01-31`. Anchors and merge keys (`<<: *name`) work. The file is UTF-8, and a key may occur once in a section.
- A value has the type of its key. `true` is no number, `1e3` and `"3"` are no integers, an integer is a float too, and no number is infinite.
  A key that wants a text takes a number as it is written: `run.name=007` is the name 007.
- `base: other.yaml` at the top takes all keys of another config, and changes those that stand here. There is one level. A section that chooses
  another `objective.name`, `data.source` or `model.family` replaces the base's. `run.name` is not taken. `jepa-scale config` prints the result.
- `~`, `$NAME` and `${NAME}` are replaced in every path; a variable that is not set is an error. A relative path is below the folder in
  which the command was started; `--config`, `base`, `model`, `engine.deepspeed`, `eval.probe` and the files of `eval.lm_eval` are looked for there first, then
  (`base`, `model`) beside the config, then among the files of jepa_scale.
- `section.key=value` builds a section that is missing or null, and takes the whole value: in `"run.name=try #2"` nothing is a comment.
- `run.name` may have letters, digits, spaces and `. , : ; _ - + = @ # % ! & ( ) [ ] ' ^ ~`, and `/` for folders in between; each part has at most
  250 bytes and does not begin with `.`, `-`, `~` or a space.
- `checkpoint.keep_best` needs evaluations and checkpoints after the same steps: one of `train.eval_every` and `checkpoint.every` is a multiple
  of the other.
"""
COLUMNS = "| key | type | default | meaning |\n|---|---|---|---|\n"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def reference() -> str:
    """Return the page."""
    pages = [HEAD]
    found = kinds()
    for section, field in Config.model_fields.items():
        pages.append(f"\n## {section}\n\n{field.description}\n")
        if section not in found:
            pages.append("\n")
            schema = Config.model_json_schema()
            own = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
            pages.append(_table(own, schema["$defs"]))
            continue
        by_name = found[section]
        common = set.intersection(*(set(cls.model_fields) for cls in by_name.values())) if len(by_name) > 1 else set()
        if common - {CHOSEN_BY.get(section)}:
            one = next(iter(by_name.values())).model_json_schema()
            pages.append(f"\nWith every {CHOSEN_BY.get(section, 'source of data')}:\n\n")
            pages.append(_table(one, one.get("$defs", {}), only=common - {CHOSEN_BY.get(section)}))
        for name, cls in by_name.items():
            own = cls.model_json_schema()
            rest = set(cls.model_fields) - common
            if not name:
                pages.append("\n")
            else:
                key = CHOSEN_BY.get(section)
                pages.append(f"\n### {f'`{section}.{key}: {name}`' if key else _of_sources(name)}\n\n")
            pages.append(_table(own, own.get("$defs", {}), only=rest) if rest else "No further keys.\n")
    return "".join(pages)


def _of_sources(evaluation: str) -> str:
    """Return the heading of an evaluation that several sources share."""
    sources = [f"`{name}`" for name, options in SOURCES.items() if options.evaluation == evaluation]
    return f"With `data.source` {' or '.join(sources)}"


def _table(schema: Schema, definitions: Schema, only: set[str] | None = None) -> str:
    return COLUMNS + "".join(_rows(schema, definitions, "", only))


def _rows(schema: Schema, definitions: Schema, prefix: str, only: set[str] | None = None) -> Iterator[str]:
    for key, value in schema.get("properties", {}).items():
        if only is not None and key not in only:
            continue
        absent = "required" if key in schema.get("required", []) else "empty"
        default = _code(value["default"]) if "default" in value else absent
        section = _section(value, definitions)
        if section and isinstance(value.get("default"), dict):
            default = "as below"
        kind = _type(value, definitions)
        meaning = _cell(value.get("description", section.get("description", "") if section else ""))
        yield f"| `{prefix}{key}` | {kind} | {default} | {meaning} |\n"
        if section:
            listed = "[]" if value.get("type") == "array" else ""
            yield from _rows(section, definitions, f"{prefix}{key}{listed}.")


def _section(value: Schema, definitions: Schema) -> Schema | None:
    """Return the keys below a key whose value is a section, a section or null, or a list of sections."""
    for choice in [value, value.get("items", {}), *value.get("anyOf", [])]:
        if "$ref" in choice:
            return definitions[choice["$ref"].rpartition("/")[2]]
    return None


def _type(value: Schema, definitions: Schema) -> str:
    if "anyOf" in value:
        return " or ".join(_type(choice, definitions) for choice in value["anyOf"])
    if "oneOf" in value:  # a part of a mixture has the keys of its source
        return "mapping"
    if "$ref" in value:
        return "keys below"
    if "enum" in value or "const" in value:
        return ", ".join(_code(choice) for choice in value.get("enum", [value.get("const")]))
    kind = {"boolean": "true, false", "object": "mapping", "array": "list"}.get(
        value.get("type", ""), value.get("type")
    )
    if kind == "list" and "items" in value:
        kind = f"list of {_type(value['items'], definitions)}"
    limits = [f"{sign} {value[name]:g}" for name, sign in LIMITS.items() if name in value]
    return " ".join([kind or "anything", *([", ".join(limits)] if limits else [])])


def _code(value: Any) -> str:
    return f"`{_cell(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or not value else value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
