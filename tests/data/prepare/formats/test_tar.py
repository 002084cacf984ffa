import io
import json
import tarfile

import pytest
from webdataset import TarWriter

from jepa_scale.data.prepare.base import BadRecord, Record
from jepa_scale.data.prepare.formats.rows import Schema
from jepa_scale.data.prepare.formats.tar import read_tar
from jepa_scale.utils.errors import InputError


def write(path, samples):
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def texts(n):
    return [{"__key__": f"dir/s{k:03d}", "txt": f"text {k}".encode() * 50} for k in range(n)]


def shown(path):
    return [
        (i.where.removeprefix(f"{path}:"), i.value if isinstance(i, Record) else f"!{i.reason}") for i in read_tar(path)
    ]


def test_members_of_one_name_are_a_row(tmp_path):
    samples = [
        {"__key__": "a", "txt": b"one", "json": b'{"id": 1}', "jpg": b"\xff"},
        {"__key__": "b", "json": json.dumps({"messages": []}).encode()},
        {"__key__": "c/d", "txt": "é".encode()},
    ]
    assert shown(write(tmp_path / "s.tar", samples)) == [
        ("a", {"id": 1, "text": "one"}),
        ("b", {"messages": []}),
        ("c/d", {"text": "é"}),
    ]


def test_bad_members_are_named_and_the_next_sample_follows(tmp_path):
    samples = [
        {"__key__": "a", "txt": b"\xff"},
        {"__key__": "b", "json": b"{"},
        {"__key__": "c", "json": b"[1]"},
        {"__key__": "d", "jpg": b"x"},
        {"__key__": "e", "txt": b"good"},
    ]
    path = write(tmp_path / "s.tar", samples)
    assert shown(path) == [
        ("a.txt", "!corrupt member"),
        ("b.json", "!corrupt member"),
        ("c.json", "!not a row"),
        ("d", "!no member txt or json"),
        ("e", {"text": "good"}),
    ]


def test_token_ids_alone_are_refused(tmp_path):
    raw = io.BytesIO(b"\x93NUMPY")
    with pytest.raises(
        InputError, match=r"s.tar:a.npy: the vocabulary of token ids alone is unknown.* txt, or json with messages"
    ):
        list(read_tar(write(tmp_path / "s.tar", [{"__key__": "a", "npy": raw.getvalue()}])))


def test_a_tar_cut_at_any_place_is_noticed(tmp_path):
    path = write(tmp_path / "whole.tar", texts(4))
    data = path.read_bytes()
    last = 4 * 1024  # a header and one block of text each, then blocks of zeros
    assert data[last - 1024 : last - 1019] == b"dir/s"
    assert not any(data[last:])
    for cut in (100, 512, 700, 1024, 1500, 1536, 1900, 2048, 2100, 2560, 4096, 4400):
        short = tmp_path / f"cut{cut}.tar"
        short.write_bytes(data[:cut])
        *rows, bad = read_tar(short)
        # a sample is whole when the next one's header is there: it might have had another member
        assert [r.value["text"][:6] for r in rows] == [f"text {k}" for k in range(4) if (k + 1) * 1024 + 512 <= cut], (
            cut
        )
        assert isinstance(bad, BadRecord)
        assert bad.reason == "truncated tar", (cut, bad)
        assert str(bad).startswith(f"{short}:")
    (bad,) = read_tar(tmp_path / "cut700.tar")
    assert str(bad).endswith("dir/s000.txt: truncated tar: 188 of 300 bytes are there, the rest of the shard is lost")
    assert all(isinstance(i, Record) for i in read_tar(path))


def test_a_damaged_header_gives_what_was_before_it(tmp_path):
    path = write(tmp_path / "s.tar", texts(4))
    data = bytearray(path.read_bytes())
    data[2048 + 150] ^= 0xFF  # in the checksum of the third header
    path.write_bytes(data)
    assert [w for w, _ in shown(path)] == ["dir/s000", "after dir/s001.txt"]
    assert shown(path)[-1][1] == "!corrupt member"
    data[150] ^= 0xFF
    path.write_bytes(data)
    assert shown(path) == [("after start", "!corrupt member")]


def test_an_empty_file_is_a_truncated_tar(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"")
    assert shown(tmp_path / "s.tar") == [("after start", "!truncated tar")]
    with pytest.raises(InputError, match="none.tar: cannot be read"):
        list(read_tar(tmp_path / "none.tar"))


def test_folders_and_links_in_an_archive_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("dir/x.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        member = tarfile.TarInfo("dir/a.b.txt")  # the name ends at its first dot
        member.size = 2
        archive.addfile(member, io.BytesIO(b"hi"))
        member = tarfile.TarInfo("dir/c.txt")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"ho"))
    assert shown(tmp_path / "s.tar") == [("dir/a", "!no member txt or json"), ("dir/c", {"text": "ho"})]


def test_hidden_files_of_macos_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, data in (
            ("./._0.txt", b"Mac OS X"),
            ("./0.txt", b"one"),
            ("./a/._1.json", b"x"),
            ("./a/1.txt", b"two"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert [value for _, value in shown(tmp_path / "s.tar")] == [{"text": "one"}, {"text": "two"}]


def test_members_that_are_not_used_are_reported(tmp_path):
    path = write(tmp_path / "s.tar", [{"__key__": "a", "txt": b"one", "jpg": b"x", "json": b'{"id": 1}'}])
    (record,) = Schema("text", "text", {"text": "text"}).expand(next(iter(read_tar(path))))
    assert record.unused == ("member .jpg", "column id")
