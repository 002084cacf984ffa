"""Turn values into a section, or into a one-line error that names the wrong key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from jepa_scale.config.foreign import meant
from jepa_scale.config.schema import Config, Section
from jepa_scale.config.yaml12 import WrittenFloat, WrittenInt
from jepa_scale.utils.errors import InputError, suggestion

S = TypeVar("S", bound=Section)
_OF_PYDANTIC = re.compile(r"function-|constrained-|list\[|(str|int|float|bool|none)$")
"""Parts of an error's location that are no keys: types of which a value may have one."""
_REMEDY = {
    "string_type": "; put it in quotes",
    "bool_type": "; write true or false",
    "int_type": "; write a whole number in digits",
}
"""Type of an error → what to do, where the message does not say it."""


def common_sections() -> dict[str, dict[str, Any]]:
    """Return section → its keys, of the sections that have the same keys in every config."""
    fields = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        name: cls.model_fields for name, cls in fields.items() if isinstance(cls, type) and issubclass(cls, Section)
    }


def parse_section(cls: type[S], values: Any, prefix: str) -> S:
    """Validate ``values`` as ``cls``.

    Raises:
        InputError: one line naming ``prefix.key``, what is wrong with it and, for an unknown key, the nearest known one.
    """
    if not isinstance(values, dict):
        raise InputError(f"{prefix or 'config'}: must be a mapping of keys, not {type(values).__name__}")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(cls, error, prefix)) from None


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Return the sections that a value of this type may hold, also as an item of a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _explain(cls: type[Section], error: ValidationError, prefix: str) -> str:
    errors = [([str(p) for p in e["loc"] if not _OF_PYDANTIC.match(str(p))], e) for e in error.errors()]
    # of a value that may have several types each type has its errors: the deepest is of the type that was meant
    path, first = max((e for e in errors if e[0][: len(errors[0][0])] == errors[0][0]), key=lambda e: len(e[0]))
    name = ".".join([prefix, *path] if prefix else path)
    if first["type"] == "extra_forbidden":
        owner: Any = cls
        for part in path[:-1]:
            if part in owner.model_fields:  # else a number in a list, or a name in a mapping
                owner = next(_sections_in(owner.model_fields[part].annotation), owner)
        fields = owner.model_fields
        if hint := meant(name, common_sections()):
            return f"{name}: unknown key; {hint}"
        known = f"known keys: {', '.join(sorted(fields))}" if fields else "there are no keys here"
        return f"{name}: unknown key; {suggestion(path[-1], fields, known)}"
    if first["type"] == "missing":
        return f"{name}: required key is missing"
    if first["type"] == "value_error":  # raised by a validator of ours, whose message is complete
        message = str(first["ctx"]["error"])
        key = message.partition(":")[0]
        return (
            ".".join(filter(None, [prefix, message])) if not path and key in cls.model_fields else f"{name}: {message}"
        )
    given = first["input"]
    shown = given.text if isinstance(given, WrittenInt | WrittenFloat) else repr(given)
    shown = shown if len(shown) <= 200 else shown[:199] + "…"
    return f"{name}: {first['msg'][0].lower() + first['msg'][1:]}, got {shown}{_REMEDY.get(first['type'], '')}"
