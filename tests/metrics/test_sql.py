"""Execution accuracy on real SQLite files: equal tables, refused and stopped queries, and that nothing is written."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.metrics import sql
from jepa_scale.metrics.sql import Limits, Outcome, Table, execution, same, sorts, upstream_execution
from jepa_scale.utils.errors import DataError

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / "shop of 100 % #1?.sqlite"  # characters that mean something in a URI
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER);"
        "INSERT INTO item VALUES (1, 'pen', 1.5, 10), (2, 'cup', 4.0, NULL), (3, 'cap', 4.0, 0), (4, '', 0.1, 3);"
        "CREATE TABLE latin (word TEXT); INSERT INTO latin VALUES (CAST(x'4de97869636f' AS TEXT));"
    )
    connection.close()
    return path


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# (generated, reference, right, right upstream)
PAIRS = [
    ("SELECT name FROM item", "SELECT name FROM item", True, True),
    ("select NAME as n from ITEM;", "SELECT name FROM item", True, True),
    ("/* a comment ( */SELECT name FROM item /* ; */ ; ", "SELECT name FROM item", True, True),
    ("-- a comment (\nSELECT name FROM item", "SELECT name FROM item", True, False),
    ("WITH x AS (SELECT id FROM item) SELECT id FROM x", "SELECT id FROM item", True, True),
    # order of rows: counts where the reference sorts, and there alone
    ("SELECT id FROM item ORDER BY id DESC", "SELECT id FROM item", True, False),
    ("SELECT id FROM item ORDER BY id DESC", "SELECT id FROM item ORDER BY id", False, False),
    ("SELECT id FROM item", "SELECT id FROM item ORDER BY id", True, True),
    ("SELECT id FROM item ORDER BY id DESC", "SELECT id FROM (SELECT id FROM item ORDER BY id)", True, False),
    # a multiset, not a set
    ("SELECT DISTINCT price FROM item", "SELECT price FROM item", False, False),
    ("SELECT price FROM item UNION ALL SELECT 4.0", "SELECT price FROM item UNION ALL SELECT 1.5", False, False),
    # columns
    ("SELECT id, name FROM item", "SELECT name, id FROM item", False, False),
    ("SELECT id, name FROM item", "SELECT id FROM item", False, False),
    ("SELECT id, name FROM item WHERE 0", "SELECT id FROM item WHERE 0", False, True),
    ("SELECT name FROM item WHERE id = 9", "SELECT name FROM item WHERE id = 8", True, True),  # nobody can tell
    # values
    ("SELECT price FROM item WHERE id = 2", "SELECT 4", True, False),
    ("SELECT 0.1 + 0.2", "SELECT 0.3", True, True),
    ("SELECT 0.1 + 0.2 - 0.3", "SELECT 0", True, False),
    ("SELECT 0.30001", "SELECT 0.3", False, False),
    ("SELECT 9007199254740993", "SELECT 9007199254740992", False, False),  # equal as doubles
    ("SELECT '4'", "SELECT 4", False, True),
    ("SELECT NULL", "SELECT ''", False, True),
    ("SELECT NULL", "SELECT 0", False, False),
    ("SELECT x'41'", "SELECT 'A'", False, True),
    ("SELECT 9e999", "SELECT 9e999", True, True),
    ("SELECT stock, id FROM item ORDER BY 2 DESC", "SELECT stock, id FROM item", True, False),  # NULL among numbers
    ("SELECT word FROM latin", "SELECT word FROM latin", True, False),  # not UTF-8: upstream's exception is "wrong"
    # broken
    ("", "SELECT id FROM item WHERE 0", False, True),
    ("  \n-- nothing", "SELECT id FROM item WHERE 0", False, True),
    ("SELECT nonsense FROM item", "SELECT id FROM item WHERE 0", False, True),
    ("SELECT nonsense FROM item", "SELECT id FROM item", False, False),
    ("SELECT 1; SELECT 2", "SELECT 1", False, False),
    ("SELECT 1; SELECT 2", "SELECT 1 UNION ALL SELECT 2", False, True),
    ("SELECT id FROM item WHERE name = ?", "SELECT id FROM item WHERE 0", False, True),
]


@pytest.mark.parametrize(("generated", "reference", "right", "upstream"), PAIRS)
def test_verdicts(shop, generated, reference, right, upstream):
    assert execution(shop, generated, reference).right is right
    assert upstream_execution(shop, generated, reference) is upstream


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="upstream's verdict is that of the sqlite3 command")
def test_upstream_is_what_the_command_line_says(shop):
    def printed(query):
        return subprocess.run(["sqlite3", str(shop), query], capture_output=True, text=True).stdout

    for generated, reference, _, upstream in PAIRS:
        if "?" in generated:  # the command binds NULL
            continue
        try:
            expected = printed(generated) == printed(reference)
        except UnicodeDecodeError:
            expected = False
        assert upstream == expected, (generated, reference)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "empty"),
        ("DROP TABLE item", "'DROP'"),
        ("EXPLAIN SELECT 1", "'EXPLAIN'"),
        ("VALUES (1)", "'VALUES'"),
        ("SELECT nonsense FROM item", "no such column: nonsense"),
        ("SELECT FROM", "syntax error"),
        ("SELECT 1; DROP TABLE item", "one statement"),
        ("SELECT 'a\0b'", "null character"),
        ("SELECT '\ud800'", "surrogates"),
        ("SELECT zeroblob(1000000000)", "too big"),
        ("SELECT a.id FROM item a, item b, item c, item d, item e", "more than 1000 rows"),
        ("SELECT zeroblob(600000) FROM item", "more than 2000000 bytes"),
    ],
)
def test_a_query_that_does_not_run_is_wrong_and_says_why(shop, query, says):
    limits = Limits(rows=1000, bytes=2_000_000)
    right, error = execution(shop, query, "SELECT id FROM item WHERE 0", limits=limits)
    assert not right
    assert says in error and "\n" not in error


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM item",
        "WITH x AS (SELECT 1) DELETE FROM item",
        "WITH x AS (SELECT 1) INSERT INTO item (id) SELECT * FROM x",
        "WITH x AS (SELECT 1) UPDATE item SET stock = 9 RETURNING id",
        "SELECT 1; DELETE FROM item",
        "/* SELECT */ DROP TABLE item",
        "ATTACH DATABASE '{folder}/new.sqlite' AS other",
        "ATTACH 'file:{folder}/new.sqlite?mode=rwc' AS other",
        "VACUUM INTO '{folder}/new.sqlite'",
        "VACUUM",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL",
        "PRAGMA writable_schema = ON",
        "PRAGMA user_version = 7",
        "SELECT * FROM pragma_journal_mode('wal')",
        "SELECT * FROM pragma_table_info('item')",
        "CREATE TEMP TABLE t AS SELECT 1",
        "CREATE TEMP TRIGGER t AFTER INSERT ON item BEGIN SELECT 1; END",
        "BEGIN EXCLUSIVE",
        "REINDEX",
        "SELECT load_extension('x')",
        "SELECT writefile('{folder}/new.sqlite', 'x')",
        "SELECT fts3_tokenizer('simple')",
        ".shell touch {folder}/new.sqlite",
        "-cmd",
    ],
)
def test_nothing_is_written(shop, query):
    query = query.format(folder=shop.parent)
    before = digest(shop.parent)
    outcome = execution(shop, query, "SELECT id FROM item WHERE 0")
    upstream_execution(shop, query, "SELECT id FROM item")
    assert not outcome.right and outcome.error
    assert digest(shop.parent) == before


def test_every_lock_holds_alone(shop, monkeypatch):
    with sql._read_only(shop, Limits()) as connection, pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        connection.execute("PRAGMA query_only = OFF")
    monkeypatch.setattr(sql, "_authorize", None)
    with sql._read_only(shop, Limits()) as connection:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("CREATE TEMP TABLE t (a)")  # no file: query_only alone
        connection.execute("PRAGMA query_only = OFF")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM item")


def test_the_file_is_read_only_also_in_wal_mode(tmp_path, monkeypatch):
    path = tmp_path / "w.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (a); INSERT INTO t VALUES (1);")
        monkeypatch.setattr(sql, "_authorize", None)
        with sql._read_only(path, Limits()) as connection:
            connection.execute("PRAGMA query_only = OFF")
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                connection.execute("DELETE FROM t")


@pytest.mark.parametrize("left", [False, True])
def test_wal_mode(tmp_path, left):
    """Reading a file in WAL mode creates no files beside it, and an existing log is read."""
    path = tmp_path / "w.sqlite"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.executescript("PRAGMA journal_mode = WAL; CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    if not left:
        writer.close()
    before = set(digest(tmp_path))
    assert execution(path, "SELECT a FROM t", "SELECT 1") == Outcome(True)
    assert set(digest(tmp_path)) == before
    assert len(before) == (3 if left else 1)
    writer.close()


@pytest.mark.parametrize(
    "query",
    [FOREVER, FOREVER.replace("count(*)", "i"), "SELECT max(i) FROM (" + FOREVER.replace("count(*)", "i") + ")"],
)
def test_a_query_without_end_is_stopped(shop, query):
    outcome = execution(shop, query, "SELECT 1", limits=Limits(seconds=0.2, rows=10**9))
    assert outcome == Outcome(False, "stopped after 0.2 s")
    assert not upstream_execution(shop, query, "SELECT -1", limits=Limits(seconds=0.1, rows=10**9))


def test_a_slow_query_within_the_limit_is_not_stopped(shop):
    query = FOREVER.replace("FROM n)", "FROM n WHERE i < 100000)")
    assert execution(shop, query, "SELECT 100000", limits=Limits(seconds=300)) == Outcome(True)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("SELECT nonsense FROM item", "no such column: nonsense"),
        ("", "empty"),
        ("DELETE FROM item", "not a SELECT"),
        (FOREVER, "stopped after 0.1 s"),
    ],
)
def test_a_broken_reference_names_the_row(shop, reference, says):
    with pytest.raises(DataError, match=f"^spider row 7: the reference query .*{says}"):
        execution(shop, "SELECT 1", reference, row="spider row 7", limits=Limits(seconds=0.1))


def test_a_broken_database_names_the_row_and_the_file(tmp_path):
    with pytest.raises(DataError, match=r"^row 3: .*none\.sqlite.*unable to open"):
        execution(tmp_path / "none.sqlite", "SELECT 1", "SELECT 1", row="row 3")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.sqlite").write_text("no database, but long enough to have a header " * 99)
    with pytest.raises(DataError, match=r"^row 3: .*text\.sqlite.*not a database"):
        execution(tmp_path / "text.sqlite", "SELECT * FROM t", "SELECT * FROM t", row="row 3")


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n\tby a limit 3", True),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH x AS (SELECT 1) SELECT * FROM x ORDER BY 1", True),
        ("SELECT ')' FROM t ORDER BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT * FROM x", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT rank() OVER w FROM t WINDOW w AS (ORDER BY a)", False),
        ("SELECT 'x ORDER BY a' FROM t", False),
        ("SELECT 'it''s ( ORDER BY a' FROM t", False),
        ('SELECT "order by" FROM t', False),
        ("SELECT [order by], `order by` FROM t", False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ORDER BY a", False),
        ("SELECT a FROM t GROUP BY a", False),
        ("SELECT reorder, by_ FROM t", False),
    ],
)
def test_sorts(query, answer):
    assert sorts(query) is answer
    connection = sqlite3.connect(":memory:")
    connection.executescript("CREATE TABLE t (a, reorder, by_, 'order by'); CREATE TABLE u (b)")
    connection.execute(query)  # the case is SQL, not a mistake of the test


cells = st.one_of(
    st.none(), st.integers(-3, 3), st.sampled_from([0.1, 0.1 + 0.2, 0.3, 2.0]), st.sampled_from(["", "a", "1"])
)
tables = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.tuples(*[cells] * n), max_size=6).map(lambda rows: Table(n, rows))
)


@given(tables, st.randoms(use_true_random=False))
def test_multisets_have_no_order(table, rng: random.Random):
    shuffled = Table(table.columns, rng.sample(table.rows, len(table.rows)))
    assert same(table, table, ordered=True)
    assert same(shuffled, table, ordered=False) and same(table, shuffled, ordered=False)
    if same(shuffled, table, ordered=True):
        assert all(repr(a) == repr(b) or a == pytest.approx(b) for a, b in zip(shuffled.rows, table.rows, strict=True))
    if table.rows:
        fewer = Table(table.columns, shuffled.rows[1:])
        assert not same(fewer, table, ordered=False)
        changed = Table(table.columns, [("another", *shuffled.rows[0][1:]), *shuffled.rows[1:]])
        assert not same(changed, table, ordered=False)


near = st.sampled_from([0.3, 1 / 3, 1e9 / 7, 0.0])
BORDER = 0.123456785  # its eighth digit is rounded up or down by the sixteenth


@given(
    st.lists(st.tuples(near, st.sampled_from("ab"), near))
    | st.lists(st.tuples(st.just(BORDER), st.sampled_from("ab"), st.integers(0, 2))),
    st.data(),
)
def test_rounding_does_not_part_rows(rows, data):
    """The last digits of floats must not decide which rows are compared with each other."""
    rng = data.draw(st.randoms(use_true_random=False))

    def moved(x: float | int) -> float | int:
        return x * (1 + rng.choice([-1, 0, 1]) * 1e-14) + rng.choice([0, 1e-17]) if isinstance(x, float) else x

    b = Table(3, [(moved(x), s, moved(y)) for x, s, y in reversed(rows)])
    assert same(Table(3, rows), b, ordered=False)


def test_almost_nothing_is_nothing():
    a = Table(2, [(0.0, 0.3), (0.0, 0.5)])
    b = Table(2, [(1e-17, 0.3), (0.0, 0.5)])
    assert same(a, b, ordered=False) and same(a, b, ordered=True)
    assert not same(a, Table(2, [(1e-3, 0.3), (0.0, 0.5)]), ordered=False)
