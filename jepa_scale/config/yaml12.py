"""Read YAML 1.2 strictly, and write YAML that reads back as the same values.

A value without quotes means what the core schema of YAML 1.2 says (https://yaml.org/spec/1.2.2/#103-core-schema): ``true``
and ``false`` are the booleans; ``null``, ``~`` and nothing at all are null; ``12``, ``0x1f`` and ``0o17`` are integers; ``1.5``,
``1e-4`` and ``.inf`` are floats; anything else is a text, also ``yes``, ``on``, ``1_000``, ``12:30`` and ``2024-01-31``, which
YAML 1.1 reads as something else. Merge keys (``<<``) are read. A key is always a text, and may occur once in a mapping.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from jepa_scale.utils.errors import InputError

TAG = "tag:yaml.org,2002:"
_UNQUOTED = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15}",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": "<<",
}
"""Kind of a scalar → the unquoted forms of it. A form of none of these is a text."""


class WrittenInt(int):
    """An integer with its text in the file: a key that wants a text takes ``007`` as it is written."""

    text: str


class WrittenFloat(float):
    """A float with its text in the file."""

    text: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # not those of YAML 1.1


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as a text."""


for _kind, _form in _UNQUOTED.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_form})\Z"), None)
_Dumper.add_multi_representer(int, lambda dumper, value: dumper.represent_int(int(value)))
_Dumper.add_multi_representer(float, lambda dumper, value: dumper.represent_float(float(value)))


def dump(values: Any) -> str:
    """Return the YAML of plain values; :func:`parse` and readers of YAML 1.1 read the same values from it."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def parse(text: str, where: str) -> Any:
    """Return the value of a YAML document: mappings, lists, texts, booleans, numbers and None.

    Args:
        where: name of the file, for messages.

    Raises:
        InputError: the text is no YAML, has a key twice, or a tag of another language; the message names the line.
    """
    node = compose(text, where)
    try:
        return None if node is None else _value(node, where)
    except RecursionError:
        raise InputError(f"{_at(where, 0)}is nested too deeply for a config") from None


def parse_argument(text: str) -> Any:
    """Return the value of one argument of the command line, where nothing is a comment: ``try #2`` is a text.

    Raises:
        InputError: the text is no YAML, or is followed by something else.
    """
    text = text.strip()
    node = compose(text, "")
    dropped = "" if not text else text if node is None else text[node.end_mark.index :].strip()
    if not dropped:
        return parse(text, "")
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None and text.startswith(node.value)):
        return text  # without quotes; the rest of it looks like a comment
    raise InputError(f"{dropped!r} after the value would be a comment; remove it, or put the whole value in quotes")


def compose(text: str, where: str) -> yaml.Node | None:
    """Return the nodes of a YAML document, None if it is empty.

    Raises:
        InputError: the text is no YAML; the message names the line.
    """
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
        return node
    except RecursionError:
        raise InputError(f"{_at(where, 0)}is nested too deeply for a config") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", None)  # of a character that no text may have
        line = mark.line if mark else text.count("\n", 0, position or 0)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise InputError(f"{_at(where, line)}not valid YAML: {problem}") from None


def pairs(
    node: yaml.MappingNode, where: str, above: tuple[yaml.Node, ...] = ()
) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Return the keys of a mapping with their values. Keys that are merged into it (``<<``) come first, without those that it
    has itself.

    Args:
        above: the mappings that this one is part of.
    """
    own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
    merged: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in node.value:
        at = _at(where, key.start_mark.line)
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{at}a key must be a text; is a quote missing?")
        if key.value in own:
            first = own[key.value][0].start_mark.line + 1
            raise InputError(
                f"{at}the key {key.value!r} is there a second time, after line {first}; remove one of them"
            )
        own[key.value] = (key, value)
        if key.tag != TAG + "merge":
            continue
        for source in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
            if not isinstance(source, yaml.MappingNode) or source in (*above, node):
                raise InputError(f"{at}<< must name another mapping, or a list of them")
            merged |= {k.value: (k, v) for k, v in pairs(source, where, (*above, node))}
    own = {name: pair for name, pair in own.items() if pair[0].tag != TAG + "merge"}
    return [*(pair for name, pair in merged.items() if name not in own), *own.values()]


def _value(node: yaml.Node, where: str, above: tuple[yaml.Node, ...] = ()) -> Any:
    kind, at = node.tag.removeprefix(TAG), _at(where, node.start_mark.line)
    if node in above:
        raise InputError(f"{at}an alias stands for a value that it is part of; write the value out")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return {key.value: _value(value, where, (*above, node)) for key, value in pairs(node, where, above)}
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item, where, (*above, node)) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "merge"):
        return node.value
    if not isinstance(node, yaml.ScalarNode) or kind not in _UNQUOTED:
        raise InputError(f"{at}the tag {node.tag} has no meaning in a config; remove it")
    if not re.fullmatch(_UNQUOTED[kind], node.value):
        raise InputError(f"{at}{node.value!r} is no {kind}; correct it, or remove its tag")
    return _scalar(kind, node.value)


def _scalar(kind: str, text: str) -> Any:
    if kind in ("null", "bool"):
        return None if kind == "null" else text.lower() == "true"
    if kind == "int" and len(text) < 64:
        whole = WrittenInt(int(text, 0 if text[:2] in ("0o", "0x") else 10))
        whole.text = text
        if abs(whole) < 2**63:
            return whole
    number = WrittenFloat(
        text.lower().replace(".inf", "inf").replace(".nan", "nan")
    )  # or an integer of more than 64 bits
    number.text = text
    return number


def _at(where: str, line: int) -> str:
    return f"{where}, line {line + 1}: " if where else ""
