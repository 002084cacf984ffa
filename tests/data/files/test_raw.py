"""Compressed files are read as what is in them, and what is damaged or cut off is noticed."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pyarrow
import pytest

from jepa_scale.data.files.raw import Damaged, open_raw, read_raw
from jepa_scale.data.files.suffixes import COMPRESSIONS, is_raw_name, split_name
from jepa_scale.data.labelled import read_labelled
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.texts import read_texts
from jepa_scale.utils.errors import InputError

ROWS = [{"text": f"text {n} " * 40} for n in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def values(path: Path | str, **options) -> list:
    reader = open_reader(str(path), PrepareOptions(**options))
    return [i.value if isinstance(i, Record) else f"!{i.reason}" for i in reader.records("train")]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_every_compression_is_tried_here():
    assert set(COMPRESSIONS) == COMPRESS.keys()


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_rows_and_texts(tmp_path, suffix):
    compress = COMPRESS[suffix]
    texts = [row["text"] for row in ROWS]
    assert values(write(tmp_path / f"a.jsonl{suffix}", compress(LINES))) == texts
    assert values(write(tmp_path / f"a.json{suffix}", compress(json.dumps(ROWS).encode()))) == texts
    assert values(write(tmp_path / f"a.txt{suffix}", compress(b"one\ntwo\n")), documents="line") == ["one", "two"]
    assert values(write(tmp_path / f"b{suffix}", compress(b"one\ntwo\n"))) == ["one\ntwo\n"]
    halves = open_reader(str(tmp_path / f"a.jsonl{suffix}"), PrepareOptions(valid_fraction=0.5))
    assert halves.splits == ("train", "valid")


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_parts_that_were_joined_are_all_read(tmp_path, suffix):
    """`cat a.gz b.gz` and parallel compressors make such files."""
    compress = COMPRESS[suffix]
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    file = write(tmp_path / f"a.jsonl{suffix}", compress(LINES[:half]) + compress(LINES[half:]))
    assert len(values(file)) == len(ROWS)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_what_is_cut_off_is_noticed(tmp_path, suffix):
    data = COMPRESS[suffix](LINES)
    for fault in (data[: len(data) // 2], data[:-3], b"not compressed at all"):
        file = write(tmp_path / f"a.jsonl{suffix}", fault)
        with pytest.raises(Damaged, match=rf"a\.jsonl\{suffix}: cannot be decompressed: \w.*; restore the file"):
            read_raw(file)
    write(tmp_path / f"a.jsonl{suffix}", data[: len(data) // 2])
    write(tmp_path / f"b.jsonl{suffix}", data)
    reader = open_reader(f"{tmp_path}/*{suffix}", PrepareOptions())
    found = list(reader.records("train"))
    bad = [item for item in found if isinstance(item, BadRecord)]
    assert [(item.where, item.reason) for item in bad] == [(f"{tmp_path}/a.jsonl{suffix}", "damaged compression")]
    assert isinstance(found[-1], Record) and found[-1].value == ROWS[-1]["text"], "the next file is read"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.txz", "a.tar.bz2"])
def test_tars(tmp_path, name):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for number, row in enumerate(ROWS):
            data = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{number:04d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    compression = split_name(name)[1]
    assert compression is not None
    assert values(write(tmp_path / name, COMPRESS[compression](plain.getvalue()))) == [row["text"] for row in ROWS]
    cut = COMPRESS[compression](plain.getvalue()[: 2048 + 700])
    assert values(write(tmp_path / name, cut)) == [row["text"] for row in ROWS[:2]] + ["!truncated tar"]


def test_texts_to_encode_and_labelled_ones(tmp_path):
    assert [t.text for t in read_texts(str(write(tmp_path / "a.txt.gz", gzip.compress(b"one\ntwo\n"))))] == [
        "one",
        "two",
    ]
    rows = "".join(f'{{"text": "t{n}", "label": "{n % 2}"}}\n' for n in range(8)).encode()
    file = write(tmp_path / "a.jsonl.zst", zstd(rows))
    assert [(t.where, t.text) for t in read_texts(str(file))][:2] == [(f"{file}:1", "t0"), (f"{file}:2", "t1")]
    assert len(read_labelled(file, 0.5).texts) == 8
    with pytest.raises(InputError, match=r"a\.csv\.gz: must be \.txt"):
        read_texts(str(write(tmp_path / "a.csv.gz", gzip.compress(b"x"))))


def test_a_stream_is_closed_with_its_file(tmp_path):
    with open_raw(write(tmp_path / "a.gz", gzip.compress(b"x"))) as file:
        assert file.read() == b"x"
    assert file.closed


@pytest.mark.parametrize(
    ("name", "raw"),
    [("a.jsonl", True), ("a.txt.gz", True), ("a.tar.gz", True), ("*.parquet", True), ("a.zip", True), ("index.json", False),
     ("a.tar", False), ("data", False), ("v1.5", False)],
)  # fmt: skip
def test_names_that_are_surely_raw(name, raw):
    assert is_raw_name(name) is raw
