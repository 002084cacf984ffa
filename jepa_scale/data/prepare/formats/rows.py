"""Rows with named columns: detection of their kind, and the fields taken from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from jepa_scale.data.base import Kind
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.formats.grids import (
    looks_like_grid,
    looks_like_grids,
    pair,
    refuse_windows,
    window_of,
    windows,
)
from jepa_scale.data.prepare.formats.source import Items, Part
from jepa_scale.utils.errors import InputError

TEXT = ("text", "content", "document")
MESSAGES = ("messages", "conversations")
INPUT = ("question", "input", "instruction", "prompt")
OUTPUT = ("response", "output", "completion", "answer")
SYSTEM = ("system", "system_prompt")
ROLES = ("text", "messages", "input", "output", "system")
OPTIONAL = ("system", "more")
_DETECTION_ROWS = 100  # the schema must be recognisable from one of the first rows


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema of rows: their kind, its form, role → column, and for frames the context and offset of their windows."""

    kind: Kind
    form: str
    columns: Mapping[str, str]
    window: tuple[int, int] = (0, 0)

    def expand(self, item: Record | BadRecord) -> Items:
        """Return the records of a row. A row whose needed field is missing or has another type is a bad record."""
        if isinstance(item, BadRecord):
            yield item
            return
        row, names = item.value, self.columns
        for role, name in names.items():
            if role not in OPTIONAL and row.get(name) is None:
                has = ", ".join(map(repr, row)) or "none"
                yield BadRecord(item.where, f"no field {name!r}", f"the row has {has}")
                return
        if self.form == "frames":
            yield from windows(item.where, row[names["frames"]], names["frames"], *self.window)
        elif self.form == "context":
            yield pair(item.where, row[names["context"]], row[names["target"]], (names["context"], names["target"]))
        elif self.form == "grids":
            yield pair(item.where, [row[names["input"]]], row[names["output"]], (names["input"], names["output"]))
        elif self.form == "messages":
            yield Record(item.where, {"messages": row[names["messages"]]})
        elif self.form == "pair":
            yield self._conversation(item.where, row)
        else:
            yield self._text(item.where, row[names["text"]])

    def _text(self, where: str, text: Any) -> Record | BadRecord:
        fault = _text_fault(text)
        if fault:
            return BadRecord(where, fault, f"field {self.columns['text']!r}")
        return Record(where, text) if text.strip() else BadRecord(where, "empty document")

    def _conversation(self, where: str, row: Mapping[str, Any]) -> Record | BadRecord:
        texts = {}
        for role in ("system", "input", "more", "output"):
            value = row.get(self.columns.get(role, ""))
            if value is None:
                continue
            value = str(value) if type(value) is int else value  # the answer to a sum
            fault = _text_fault(value)
            if fault:
                return BadRecord(where, fault, f"field {self.columns[role]!r}")
            texts[role] = value
        question = "\n\n".join(x for x in (texts["input"], texts.get("more", "")) if x.strip())
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
        if texts.get("system", "").strip():
            messages.insert(0, {"role": "system", "content": texts["system"]})
        return Record(where, {"messages": messages})


def _text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return "not text"
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but no character
        return "invalid UTF-8"
    return None


def expanded(part: Part, schema: Schema) -> Part:
    """Return a part of raw rows as a part of records."""
    one_each = schema.form != "frames"
    return Part(partial(_expand, part, schema), part.count if one_each else None)


def _expand(part: Part, schema: Schema) -> Items:
    for item in part.read():
        yield from schema.expand(item)


def find_schema(rows: Iterator[Record | BadRecord], options: PrepareOptions, what: str) -> Schema:
    """Detect the schema of rows from the first one that has the needed columns.

    Args:
        rows: from the start of ``what``.

    Raises:
        InputError: there is no such row among the first.
    """
    unknown = sorted(set(options.columns) - set(ROLES))
    if unknown:
        raise InputError(f"data.columns.{unknown[0]}: unknown role; known roles: {', '.join(ROLES)}")
    first: Record | BadRecord | None = None
    for item in islice(rows, _DETECTION_ROWS):
        if isinstance(item, Record):
            schema = match(item.value, options)
            if schema:
                if schema.form != "frames":
                    refuse_windows(options, what)
                return schema
        if first is None or (isinstance(first, BadRecord) and isinstance(item, Record)):
            first = item
    if first is None:
        raise InputError(f"{what}: holds no rows")
    if isinstance(first, BadRecord):
        raise InputError(f"{what}: the first {_DETECTION_ROWS} rows are all unreadable; {first}")
    has = ", ".join(map(repr, first.value)) or "no fields"
    raise InputError(
        f"{first.where}: the kind of the row is not recognised (kind {options.kind}); it has {has}; name its columns with "
        f"data.columns ({', '.join(ROLES)})"
    )


def match(row: Mapping[str, Any], options: PrepareOptions) -> Schema | None:
    """Return the schema of a row; None when it lacks the columns of every kind that ``options`` allow."""
    named = options.columns
    primary = set(named) & {"text", "messages", "input", "output"}
    if primary & {"input", "output"}:
        primary |= {"input", "output"}

    def column(role: str, names: tuple[str, ...]) -> str | None:
        if role in named:
            return named[role] if named[role] in row else None
        if primary and role not in primary:
            return None
        return next((name for name in names if row.get(name) is not None), None)

    def allowed(kind: str) -> bool:
        return options.kind in ("auto", kind)

    question, answer = column("input", INPUT), column("output", OUTPUT)
    if allowed("grids"):
        if not primary and looks_like_grids(row.get("frames")):
            return Schema("grids", "frames", {"frames": "frames"}, window_of(options))
        if not primary and looks_like_grids(row.get("context")) and looks_like_grid(row.get("target")):
            return Schema("grids", "context", {"context": "context", "target": "target"})
        if question and answer and looks_like_grid(row[question]) and looks_like_grid(row[answer]):
            return Schema("grids", "grids", {"input": question, "output": answer})
    if allowed("chat"):
        messages = column("messages", MESSAGES)
        if messages:
            return Schema("chat", "messages", {"messages": messages})
        if question and answer:
            columns = {"input": question, "output": answer}
            columns["system"] = named.get("system") or next((name for name in SYSTEM if name in row), SYSTEM[0])
            if "input" not in named and question in ("input", "instruction") and "instruction" in row:
                columns |= {"input": "instruction", "more": "input"}  # Alpaca's form: a task and its input
            return Schema("chat", "pair", columns)
    text = column("text", TEXT)
    return Schema("text", "text", {"text": text}) if text and allowed("text") else None
