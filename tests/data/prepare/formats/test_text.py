from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.text import cut_at_line, is_title, read_piece, read_text, split_documents
from jepa_scale.utils.errors import InputError


def read(tmp_path: Path, data: bytes, documents: str) -> list[Record | BadRecord]:
    (tmp_path / "a.txt").write_bytes(data)
    return list(read_text(tmp_path / "a.txt", documents))


def shown(items: list[Record | BadRecord], tmp_path: Path) -> list[tuple[str, str]]:
    return [(i.where.removeprefix(f"{tmp_path}/"), i.value if isinstance(i, Record) else f"!{i.reason}") for i in items]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [("a.txt", " = A = \n\nx é\ny\n\n\n= = S = =\nz")]),
        (
            "line",
            [("a.txt:1", " = A = "), ("a.txt:3", "x é"), ("a.txt:4", "y"), ("a.txt:7", "= = S = ="), ("a.txt:8", "z")],
        ),
        ("paragraph", [("a.txt:1", " = A = "), ("a.txt:3", "x é\ny"), ("a.txt:7", "= = S = =\nz")]),
        ("heading", [("a.txt:1", " = A = \n\nx é\ny\n\n\n= = S = =\nz")]),
    ],
)
def test_documents_of_a_file(tmp_path, documents, expected):
    data = "\ufeff = A = \n\nx é\ny\n\n\n= = S = =\nz".encode()  # the byte order mark is no text
    assert shown(read(tmp_path, data, documents), tmp_path) == expected


def test_headings_of_level_one_begin_articles(tmp_path):
    data = b" \n = A = \n a \n\n = = B = = \n b \n = C = D = \n c \n = = = E = = = \n"
    assert shown(read(tmp_path, data, "heading"), tmp_path) == [
        ("a.txt:2", " = A = \n a \n\n = = B = = \n b \n"),
        ("a.txt:7", " = C = D = \n c \n = = = E = = = \n"),
    ]
    assert not any(
        map(
            is_title,
            (
                b" = = B = = \n",
                b" = = B = \n",
                b" = B = = \n",
                b" = A \n",
                b"A = \n",
                b" a = b = \n",
                b" = \n",
                b"==\n",
            ),
        )
    )


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [("a.txt:3", "!invalid UTF-8")]),
        ("line", [("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:3", "!invalid UTF-8"), ("a.txt:5", "four")]),
        ("paragraph", [("a.txt:3", "!invalid UTF-8"), ("a.txt:5", "four")]),
        ("heading", [("a.txt:3", "!invalid UTF-8")]),
    ],
)
def test_invalid_utf8_names_its_line_and_the_next_document_follows(tmp_path, documents, expected):
    assert shown(read(tmp_path, b"one\ntwo\nth\xffree\n\nfour\n", documents), tmp_path) == expected


@pytest.mark.parametrize("data", [b"", b" \n\t\n", "\u00a0\n".encode()])
def test_a_file_of_white_space_is_an_empty_document(tmp_path, data):
    assert shown(read(tmp_path, data, "file"), tmp_path) == [("a.txt", "!empty document")]


def test_a_line_of_unicode_space_is_an_empty_document(tmp_path):
    assert shown(read(tmp_path, "a\n\u2003\nb".encode(), "line"), tmp_path) == [
        ("a.txt:1", "a"),
        ("a.txt:2", "!empty document"),
        ("a.txt:3", "b"),
    ]


@given(
    st.lists(st.sampled_from([b"a\n", b"\n", b" \n", b" = T = \n", b" = = S = = \n", b"b b\r\n"])),
    st.sampled_from(["line", "paragraph", "heading"]),
)
def test_documents_hold_every_line_that_is_not_blank_once(lines, documents):
    items = list(split_documents(lines, documents, str))
    assert all(isinstance(i, Record) for i in items)
    kept = [line for i in items for line in i.value.splitlines() if line.strip()]
    assert kept == [line.decode().strip("\r\n") for line in lines if line.strip()]
    starts = [int(i.where) for i in items]
    assert starts == sorted(set(starts))
    for item in items:  # each is named by the line it begins with
        assert item.value.splitlines()[0].encode() == lines[int(item.where) - 1].rstrip(b"\r\n")


def test_a_missing_file_is_the_users_error(tmp_path):
    for documents in ("file", "line"):
        with pytest.raises(InputError, match=r"none\.txt: cannot be read: No such file"):
            list(read_text(tmp_path / "none.txt", documents))


@given(st.text("ab \n", min_size=1), st.floats(0.01, 0.99))
def test_a_cut_loses_nothing_and_lies_at_a_line_end_where_there_is_one(tmp_path_factory, text, fraction):
    file = tmp_path_factory.mktemp("cut") / "a.txt"
    file.write_text(text)
    at = cut_at_line(file, fraction)
    assert 0 <= at <= len(text)
    if "\n" in text[:-1]:
        assert text[at - 1] == "\n"
        assert at < len(text)
    pieces = [item for start, stop in ((0, at), (at, None)) for item in read_piece(file, start, stop)]
    assert "".join(i.value for i in pieces if isinstance(i, Record)).strip() == text.strip()


def test_a_cut_is_near_the_fraction_and_bad_bytes_keep_their_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"0123456789\n" * 100)
    assert cut_at_line(file, 0.9) == 990
    file.write_bytes(b"0123456789\n" * 95 + b"\xff\n" * 5)
    (item,) = read_piece(file, 990, None)
    assert str(item).startswith(f"{file}:96: invalid UTF-8")
    assert "\n" not in str(item)
