"""Execution accuracy: compare the rows of a generated SQL query with those of the reference query on an SQLite file.

The file is never written. It is opened read-only, the authorizer (``sqlite3_set_authorizer``) permits only reading, and a
query that takes too long or returns too much is stopped. Execution accuracy is that of Spider (Yu et al., EMNLP 2018,
arXiv 1809.08887). The order of rows counts where the reference sorts (Zhong et al., EMNLP 2020, arXiv 2010.02840).

:func:`upstream_execution` reproduces LLM-JEPA's published evaluation (``spider_eval`` of evaluate.py,
galilai-group/llm-jepa at 1dce9e7), which runs each query with the ``sqlite3`` command and compares the printed text. The
two differ:

===================================================  ==================================================================
upstream                                             corrected, :func:`execution`
===================================================  ==================================================================
a query that fails prints nothing, which is right    wrong, with the error
where the reference returns no rows
an empty answer is right there, too                  wrong
any answer is right if the database is missing       DataError (``sqlite3`` creates an empty file of that name)
any answer without rows is right if the              DataError that names the row
reference fails
rows in another order are wrong                      a multiset, unless the reference sorts at its outermost level
1 and 1.0 differ, NULL and '' are equal              1 and 1.0 are equal, NULL and '' differ
"DROP TABLE …" is run on the data set itself         refused
a query that does not end is not stopped             limits of time, rows and bytes
===================================================  ==================================================================

Neither can distinguish two different queries that both return no rows, or that agree by chance on this database. Neither
can decide which order is meant for rows that tie in the ORDER BY of the reference.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jepa_scale.utils.errors import DataError

Cell = None | int | float | str | bytes
Row = tuple[Cell, ...]

TOLERANCE, NOTHING = 1e-9, 1e-12
"""Relative and absolute difference up to which two numbers are equal: sums in another order differ by rounding."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one query.

    Attributes:
        seconds: wall-clock time. It is checked between steps of SQLite's virtual machine, so one long step (a LIKE with
            many ``%`` on a long text) can exceed it.
        rows: number of rows returned.
        bytes: total size of the texts and blobs returned.
    """

    seconds: float = 5.0
    rows: int = 100_000
    bytes: int = 64 << 20


class Outcome(NamedTuple):
    """Result of a comparison: whether the generated query is right; ``error`` is why it could not be run, else ''."""

    right: bool
    error: str = ""


class Table(NamedTuple):
    """Rows that a query returned, and its number of columns, which is compared even without rows; names are ignored."""

    columns: int
    rows: list[Row]


class _QueryError(Exception):
    """A query that is refused, fails, or is stopped."""


# ---------------------------------------------------------------------------------------------- comparison


def execution(
    database: Path, generated: str, reference: str, *, row: str = "reference", limits: Limits | None = None
) -> Outcome:
    """Run both queries on ``database`` and compare their results.

    The order of the columns counts. The order of the rows counts if the reference sorts (:func:`sorts`).

    Args:
        row: name of this row of the data, for errors.

    Raises:
        DataError: the database or the reference query is broken, or exceeds the limits.
    """
    limits = limits or Limits()
    try:
        wanted = _fetch(database, reference, limits)
    except _QueryError as error:
        raise DataError(f"{row}: the reference query does not run on {database}: {error}") from None
    try:
        found = _fetch(database, generated, limits)
    except _QueryError as error:
        return Outcome(False, str(error))
    return Outcome(same(found, wanted, ordered=sorts(reference)))


def same(a: Table, b: Table, ordered: bool) -> bool:
    """Return whether two tables are equal, as lists of rows if ``ordered``, else as multisets.

    Floats are equal within ``TOLERANCE``. 1 = 1.0 and NULL = NULL, but 1 ≠ '1'.
    """
    if a.columns != b.columns or len(a.rows) != len(b.rows):
        return False
    if ordered:
        return _close(a.rows, b.rows)
    if Counter(a.rows) == Counter(b.rows):  # exact, and the common case
        return True
    # Sort both. Columns with floats come last in the key and are rounded there, as their last digits may differ.
    both = [*a.rows, *b.rows]
    fractions = {i for i in range(a.columns) if any(isinstance(row[i], float) for row in both)}
    order = [i for i in range(a.columns) if i not in fractions] + sorted(fractions)

    def key(row: Row) -> list[tuple[int, Cell]]:
        return [_key(row[i], i in fractions) for i in order]

    return _close(sorted(a.rows, key=key), sorted(b.rows, key=key))


def _key(cell: Cell, rounded: bool) -> tuple[int, Cell]:
    if cell is None:
        return 0, 0
    if isinstance(cell, int | float):
        return 1, (float(f"{cell:.8g}") if abs(cell) > NOTHING else 0.0) if rounded else cell
    return (2, cell) if isinstance(cell, str) else (3, cell)


def _close(a: Sequence[Row], b: Sequence[Row]) -> bool:
    return all(_close_cells(x, y) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


def _close_cells(x: Cell, y: Cell) -> bool:
    if isinstance(x, float) and isinstance(y, int | float) or isinstance(y, float) and isinstance(x, int):
        return math.isclose(x, y, rel_tol=TOLERANCE, abs_tol=NOTHING)
    return x == y


# ---------------------------------------------------------------------------------------------- reading SQL

TOKEN = re.compile(
    r"(?P<space>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))"  # an unclosed comment extends to the end
    r"|(?P<quoted>'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`|\[[^\]]*\])"
    r"|(?P<word>[^\W\d][\w$]*)"
    r"|(?P<other>.)",
    re.DOTALL,
)


def _tokens(query: str) -> Iterator[str]:
    """Yield words in upper case and other characters one by one, without white space, comments and quoted text."""
    for match in TOKEN.finditer(query):
        if match.lastgroup in ("word", "other"):
            yield match[0].upper()


def sorts(query: str) -> bool:
    """Return whether the query has an ORDER BY outside parentheses (subqueries, WITH, windows) and quotes."""
    depth, before = 0, ""
    for token in _tokens(query):
        depth += (token == "(") - (token == ")")
        if depth == 0 and before == "ORDER" and token == "BY":
            return True
        before = token
    return False


# ---------------------------------------------------------------------------------------------- running SQL

READ_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
LONGEST_VALUE = 16 << 20  # bytes of a text, a blob or a row
STEPS = 1000  # of SQLite's virtual machine, between two checks of the time


def _authorize(action: int, argument: str | None, second: str | None, *where: str | None) -> int:
    """Permit only reading: no ATTACH, no PRAGMA (nor ``pragma_…`` tables), no transaction, no change."""
    if action not in READ_ACTIONS or action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


@contextmanager
def _read_only(database: Path, limits: Limits) -> Iterator[sqlite3.Connection]:
    """Open a read-only connection for one query; its time limit starts now. SQLite's errors become ``_QueryError``."""
    uri = f"{database.absolute().as_uri()}?mode=ro"
    # In WAL mode even a reader creates files beside the database. It needs none if there is no log to read.
    if not any(database.with_name(database.name + suffix).exists() for suffix in ("-wal", "-journal")):
        uri += "&immutable=1"
    stop = time.monotonic() + limits.seconds
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.execute("PRAGMA query_only = ON")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
            connection.set_authorizer(_authorize)
            connection.set_progress_handler(lambda: int(time.monotonic() > stop), STEPS)
            yield connection
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        # Warning: a second statement; ValueError: NUL or a lone surrogate in the query; MemoryError: SQLite's own
        late = isinstance(error, sqlite3.OperationalError) and str(error) == "interrupted"
        raise _QueryError(f"stopped after {limits.seconds:g} s" if late else " ".join(str(error).split())) from None


def _fetch(database: Path, query: str, limits: Limits) -> Table:
    """Run one SELECT."""
    first = next(_tokens(query), "")
    if first not in ("SELECT", "WITH"):
        raise _QueryError(f"not a SELECT or WITH: it begins with {first!r}" if first else "empty")
    with _read_only(database, limits) as connection:
        # some of Spider's databases hold Latin-1
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        cursor = connection.execute(query)
        rows = list(_limited(cursor, limits))
        assert cursor.description is not None
        return Table(len(cursor.description), rows)


def _limited(cursor: sqlite3.Cursor, limits: Limits) -> Iterator[Row]:
    size = 0
    for count, row in enumerate(cursor, start=1):
        size += sum(len(cell) for cell in row if isinstance(cell, str | bytes))
        if count > limits.rows:
            raise _QueryError(f"more than {limits.rows} rows")
        if size > limits.bytes:
            raise _QueryError(f"more than {limits.bytes} bytes")
        yield row


# ---------------------------------------------------------------------------------------------- upstream


def upstream_execution(database: Path, generated: str, reference: str, *, limits: Limits | None = None) -> bool:
    """Return upstream's verdict: whether the ``sqlite3`` command prints the same for both queries (see the table above).

    Some queries are not reproduced, because they would do harm or never end: statements that write, dot commands (``.shell``
    runs programs), and queries beyond the limits. ``?``, which the command fills with NULL, is not reproduced either. Such
    queries print here only the rows that they returned until they were stopped.
    """
    limits = limits or Limits()
    try:
        return _printed(database, generated, limits) == _printed(database, reference, limits)
    except UnicodeDecodeError:  # upstream reads the output as UTF-8 and takes any exception for a wrong answer
        return False


def _printed(database: Path, script: str, limits: Limits) -> str:
    """Standard output of ``sqlite3 database script``: the rows of each statement, up to the first error."""
    if script.startswith("-"):  # "-- comment …": the command reads it as an option and fails
        return ""
    lines: list[bytes] = []
    try:
        with _read_only(database, limits) as connection, closing(sqlite3.connect(":memory:")) as formatter:
            connection.text_factory = bytes
            for statement in _statements(script):
                for row in _limited(connection.execute(statement), limits):
                    lines.append(b"|".join(_shown(cell, formatter) for cell in row) + b"\n")
    except _QueryError:
        pass
    return b"".join(lines).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _shown(cell: Cell, formatter: sqlite3.Connection) -> bytes:
    if isinstance(cell, bytes):
        return cell.partition(b"\0")[0]  # printed as a C string
    if cell is None:
        return b""
    return formatter.execute("SELECT CAST(? AS TEXT)", (cell,)).fetchone()[0].encode()


def _statements(script: str) -> Iterator[str]:
    start = 0
    for i, character in enumerate(script):
        if character == ";" and sqlite3.complete_statement(script[start : i + 1]):
            yield script[start : i + 1]
            start = i + 1
    yield script[start:]
