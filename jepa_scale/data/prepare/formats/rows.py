"""Rows with named columns: detection of their kind, and the fields taken from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from jepa_scale.data.base import Kind
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.formats.chat_rows import conversation, text_fault, unused_columns
from jepa_scale.data.prepare.formats.grids import (
    looks_like_grid,
    looks_like_grids,
    pair,
    refuse_windows,
    window_of,
    windows,
)
from jepa_scale.data.prepare.formats.source import Items, Part
from jepa_scale.data.prepare.formats.token_rows import IDS, looks_like_tokens, token_record
from jepa_scale.utils.errors import InputError

TEXT = ("text", "content", "document")
MESSAGES = ("messages", "conversations")
INPUT = ("question", "input", "instruction", "prompt")
OUTPUT = ("response", "output", "completion", "answer")
ROLES = ("text", "messages", "input", "output", "system")
OPTIONAL = ("system", "more")
CHAT_VERSION = 2
"""Version of how rows become conversations; it is part of the data's fingerprint."""
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
        for record in self._records(item):
            if isinstance(record, Record) and item.unused:
                record = replace(record, unused=(*item.unused, *record.unused))
            yield record

    def _records(self, item: Record) -> Items:
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
        elif self.kind == "chat":
            try:
                yield conversation(item.where, row, names, self.form)
            except BadRecord as bad:
                yield bad
        elif self.kind == "tokens":
            try:
                yield token_record(item.where, row)
            except BadRecord as bad:
                yield bad
        else:
            yield self._text(item.where, row)

    def _text(self, where: str, row: Mapping[str, Any]) -> Record | BadRecord:
        text = row[self.columns["text"]]
        fault = text_fault(text)
        if fault:
            return BadRecord(where, fault, f"field {self.columns['text']!r}")
        if not text.strip():
            return BadRecord(where, "empty document")
        return Record(where, text, tuple(unused_columns(row, {self.columns["text"]})))


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
    if "chosen" in first.value and "rejected" in first.value:
        raise InputError(
            f"{first.where}: holds preferences (chosen, rejected), for which there is no loss; to train on the chosen answers, "
            "name them with data.columns, output=chosen for texts or messages=chosen for lists of messages"
        )
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
    system = {"system": named["system"]} if "system" in named else {}
    if allowed("chat"):
        messages = column("messages", MESSAGES)
        if messages:
            return Schema("chat", "messages", {"messages": messages, **system})
        if question and answer:
            columns = {"input": question, "output": answer, **system}
            if "input" not in named and question in ("input", "instruction") and "instruction" in row:
                columns |= {"input": "instruction", "more": "input"}  # Alpaca's form: a task and its input
            return Schema("chat", "pair", columns)
    text = column("text", TEXT)
    if text and allowed("text"):
        return Schema("text", "text", {"text": text})
    if allowed("tokens") and not primary and looks_like_tokens(row.get(IDS)):
        return Schema("tokens", "tokens", {"tokens": IDS})
    return None
