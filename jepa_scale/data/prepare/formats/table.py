"""Files of rows (JSON lines, JSON, parquet). A record's value is a row as a ``dict``."""

from __future__ import annotations

import json
from typing import Any

from jepa_scale.data.files.raw import RawFile, open_raw, read_raw
from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.source import Items
from jepa_scale.utils.errors import InputError

_BATCH = 1024  # rows of a parquet file converted to Python objects at a time


_FREE = ("arguments", "parameters", "properties")  # objects that may be empty


def read_jsonl(path: RawFile) -> Items:
    """Read one row a line, skipping blank lines. A row is named ``file:line``."""
    try:
        with open_raw(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_row(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: RawFile) -> Items:
    """Read the rows of a JSON file. The names of the rows depend on its content:

    - a list of rows: ``file#n``, from 0;
    - a single row: ``file``;
    - JSON lines with the wrong suffix: ``file:line``;
    - an ARC task, whose rows are its pairs: ``file#train[n]``, ``file#test[n]``.
    """
    if _is_lines(path):
        yield from read_jsonl(path)
        return
    try:
        data = read_raw(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    content = parse(data, str(path))
    if isinstance(content, BadRecord):
        yield content
    elif isinstance(content, list):
        yield from (_row(row, f"{path}#{n}") for n, row in enumerate(content))
    elif isinstance(content, dict) and isinstance(content.get("train", content.get("test")), list):
        for part in ("train", "test"):
            pairs = content.get(part, [])
            if not isinstance(pairs, list):
                yield BadRecord(f"{path}#{part}", "not a list of pairs")
                continue
            yield from (_row(pair, f"{path}#{part}[{n}]") for n, pair in enumerate(pairs))
    else:
        yield _row(content, str(path))


def _is_lines(path: RawFile) -> bool:
    """Return whether the first line is a complete object and another line follows."""
    try:
        with open_raw(path) as file:
            lines = (line for line in file if line.strip())
            first, second = next(lines, b""), next(lines, b"")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return bool(second) and isinstance(parse(first, ""), dict)


def parse(data: bytes, where: str) -> Any:
    """Parse a JSON value; returns a ``BadRecord`` if it is invalid."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(where, "invalid UTF-8", f"byte {data[error.start]:#04x} at position {error.start}")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return BadRecord(where, "invalid JSON", f"{error.msg} at {place}")
    except (ValueError, RecursionError) as error:  # e.g. thousands of digits or of brackets
        return BadRecord(where, "invalid JSON", str(error))


def parse_row(data: bytes, where: str) -> Record | BadRecord:
    value = parse(data, where)
    return value if isinstance(value, BadRecord) else _row(value, where)


def _row(value: Any, where: str) -> Record | BadRecord:
    if isinstance(value, dict):
        return Record(where, value)
    return BadRecord(where, "not a row", f"must be an object with named fields, not {type(value).__name__}")


def read_parquet(path: RawFile) -> Items:
    """Read the rows of a parquet file, named ``file#n``, from 0. Rows after a damaged part of the file are lost."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with open_raw(path) as content, ParquetFile(content) as file:
            for batch in file.iter_batches(_BATCH):
                for value in batch.to_pylist():
                    yield Record(f"{path}#{row}", without_fill(value))
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield BadRecord(f"{path}#{row}", "damaged parquet", str(error).splitlines()[0])


def without_fill(value: Any) -> Any:
    """Return a value of a columnar file without what such a file fills in.

    All rows of a column of objects have the same fields there, as null where a row has none. An object of nulls alone is an
    absent one, but for the objects whose fields are free, such as the arguments of a call without arguments.
    """
    if isinstance(value, dict):
        kept = {name: without_fill(inner) for name, inner in value.items() if inner is not None}
        return {name: v for name, v in kept.items() if v != {} or name in _FREE}
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [without_fill(inner) for inner in value]
    return value


def count_parquet(path: RawFile) -> int | None:
    """Return the number of rows in the file's footer; None if it is damaged."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_raw(path) as content, ParquetFile(content) as file:
            return file.metadata.num_rows
    except (pyarrow.ArrowException, OSError):
        return None
