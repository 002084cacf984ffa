import json

import pyarrow
import pyarrow.parquet
import pytest

from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.table import count_parquet, read_json, read_jsonl, read_parquet
from jepa_scale.utils.errors import InputError


def shown(items, path):
    return [(i.where.removeprefix(str(path)), i.value if isinstance(i, Record) else f"!{i.reason}") for i in items]


def test_every_fault_of_json_lines_is_named_and_the_rest_follows(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 1}', b"", b'{"a": 2', b"[1]", b'{"a": "\xff"}', b"[" * 20000, b"1" * 9999, b'{"a": 3}']
    path.write_bytes(b"\n".join(lines))
    assert shown(read_jsonl(path), path) == [
        (":1", {"a": 1}),
        (":3", "!invalid JSON"),
        (":4", "!not a row"),
        (":5", "!invalid UTF-8"),
        (":6", "!invalid JSON"),
        (":7", "!invalid JSON"),
        (":8", {"a": 3}),
    ]
    assert all("\n" not in str(i) for i in read_jsonl(path) if isinstance(i, BadRecord))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, 2]', [("#0", {"a": 1}), ("#1", "!not a row")]),
        ('{"a": 1}', [("", {"a": 1})]),
        ('{\n"a": 1\n}', [("", {"a": 1})]),
        ('{"a": 1}\n{"a": 2}\n', [(":1", {"a": 1}), (":2", {"a": 2})]),
        (
            '{"train": [{"a": 1}], "test": [{"a": 2}, 3]}',
            [("#train[0]", {"a": 1}), ("#test[0]", {"a": 2}), ("#test[1]", "!not a row")],
        ),
        ('{"train": [], "test": 1}', [("#test", "!not a list of pairs")]),
        ('{"test": [{"a": 2}]}', [("#test[0]", {"a": 2})]),
        ('[{"a": 1}', [("", "!invalid JSON")]),
        ("", [("", "!invalid JSON")]),
        ("7", [("", "!not a row")]),
    ],
)
def test_json_files_of_every_form(tmp_path, text, expected):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert shown(read_json(path), path) == expected


def test_parquet_rows_and_damage(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"a": n, "b": None if n % 2 else "x"} for n in range(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    items = list(read_parquet(path))
    assert items[2999].where == f"{path}#2999"
    assert [i.value for i in items[:2]] == [{"a": 0, "b": "x"}, {"a": 1}]  # a null is no field
    assert len(items) == count_parquet(path) == 3000
    path.write_bytes(path.read_bytes()[:-20])
    (bad,) = read_parquet(path)
    assert (bad.where, bad.reason) == (f"{path}#0", "damaged parquet")
    assert count_parquet(path) is None


def test_parquet_damaged_in_the_middle_keeps_what_was_before(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"a": [f"text {n} " * 20 for n in range(4096)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1024, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 400] = b"\xff" * 400
    path.write_bytes(data)
    *rows, bad = read_parquet(path)
    assert [r.value["a"][:8].strip() for r in rows[:2]] == ["text 0 t", "text 1 t"]
    assert isinstance(bad, BadRecord)
    assert 1024 <= len(rows) <= 2048


@pytest.mark.parametrize("read", [read_jsonl, read_json])
def test_a_missing_file_is_the_users_error(tmp_path, read):
    with pytest.raises(InputError, match="cannot be read"):
        list(read(tmp_path / "none.json"))


def test_large_numbers_and_unicode_survive(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"text": "é\u2028\U0001f600", "n": 2**70}
    path.write_text(json.dumps(row, ensure_ascii=False))  # U+2028 is no line end
    assert shown(read_jsonl(path), path) == [(":1", row)]


def test_what_a_columnar_file_fills_in_is_no_value(tmp_path):
    calls = [
        {"function": {"name": "f", "arguments": {"city": "x"}}},
        {"function": {"name": "g", "arguments": {"day": 1, "place": {"at": "y"}}}},
        {"function": {"name": "h", "arguments": {"city": None}}},
    ]
    rows = [{"n": n, "calls": [call], "other": None if n else [{"a": 1}]} for n, call in enumerate(calls)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [item.value for item in read_parquet(tmp_path / "a.parquet")]
    assert [row["calls"][0] for row in found] == [*calls[:2], {"function": {"name": "h", "arguments": {}}}]
    assert ["other" in row for row in found] == [True, False, False]
