"""Raw data from a real web server on the loopback: one that is whole, and ones that cut, hold, change and refuse."""

import gzip
import json
import threading
import time
from pathlib import Path

import pytest

from jepa_scale.data.files.cache import RAW, Cache
from jepa_scale.data.files.raw import RemoteFile, raw_file, read_raw
from jepa_scale.data.options import TextOptions
from jepa_scale.data.prepare.base import PrepareOptions, Record
from jepa_scale.data.prepare.job import prepare
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.shards.source import load
from jepa_scale.data.texts import read_texts
from jepa_scale.utils.errors import InputError
from tests.data.files.servers import Server

BODY = bytes(range(256)) * 20_000  # 5 MB, several chunks
TEXTS = [f"text {n} of some words" for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def file_of(server: Server, path: str, cache: Path, limit: int = 10**9) -> RemoteFile:
    file = raw_file(server.url + path, Cache(cache, limit))
    assert isinstance(file, RemoteFile)
    return file


def values(path: str, cache: Path, split: str = "train", **options) -> list:
    reader = open_reader(path, PrepareOptions(**options), Cache(cache))
    return [i.value if isinstance(i, Record) else f"!{i.reason}" for i in reader.records(split)]


def test_rows_of_web_files(server, tmp_path):
    server.files = {"/d/train.jsonl.gz": gzip.compress(LINES), "/d/valid.jsonl": LINES[: LINES.index(b"\n") + 1]}
    reader = open_reader(f"{server.url}/d/{{train.jsonl.gz,valid.jsonl}}?key=secret", PrepareOptions(), Cache(tmp_path))
    assert [path for path, _ in server.gets()] == ["/d/train.jsonl.gz?key=secret"], "for the kind of its first row"
    records = list(reader.records("train"))
    assert [record.value for record in records] == TEXTS
    assert records[2].where == f"{server.url}/d/train.jsonl.gz:3", "without the query"
    assert [record.value for record in reader.records("valid")] == TEXTS[:1]
    assert list(reader.records("train")) == records
    assert [path for path, _ in server.gets()] == ["/d/train.jsonl.gz?key=secret", "/d/valid.jsonl?key=secret"], (
        "once each"
    )
    again = open_reader(f"{server.url}/d/{{train.jsonl.gz,valid.jsonl}}?key=secret", PrepareOptions(), Cache(tmp_path))
    assert again.fingerprint() == reader.fingerprint()
    server.files["/d/valid.jsonl"] = LINES
    again = open_reader(f"{server.url}/d/{{train.jsonl.gz,valid.jsonl}}?key=secret", PrepareOptions(), Cache(tmp_path))
    assert again.fingerprint() != reader.fingerprint()


def test_preparing_and_training_from_an_address(server, tmp_path):
    server.files = {"/a.jsonl": LINES}
    (tmp_path / "a.jsonl").write_bytes(LINES)
    options = PrepareOptions(vocab_size=300)
    local = prepare(tmp_path / "a.jsonl", tmp_path / "local", options, 1, False, cache=tmp_path / "cache")
    index = prepare(f"{server.url}/a.jsonl?key=secret", tmp_path / "web", options, 1, False, cache=tmp_path / "cache")
    assert index.fingerprint == local.fingerprint
    assert not [file for file in (tmp_path / "web").glob("*.json") if "secret" in file.read_text()]
    data = load(TextOptions(path=f"{server.url}/a.jsonl", vocab_size=300, cache=str(tmp_path / "cache")))
    assert data.train.located.index.fingerprint == local.fingerprint


def cut(server: Server, cache: Path, *counts: int) -> None:
    """Cut each answer after so many bytes, when the client has them all."""
    before: list[int] = []

    def wait_for_client(count: int) -> None:
        before.append(count)
        there = sum(before) if server.ranges else count
        while not any(p.stat().st_size == there for p in (cache / RAW).glob("*.partial")):
            time.sleep(0.005)

    server.cuts, server.before_cut = list(counts), wait_for_client


def test_a_cut_download_goes_on_where_it_ended(server, tmp_path):
    server.files = {"/a.bin": BODY}
    cut(server, tmp_path, 1_500_000, 100, 2_000_000)
    assert read_raw(file_of(server, "/a.bin", tmp_path)) == BODY
    assert [wanted for _, wanted in server.gets()] == [None, "bytes=1500000-", "bytes=1500100-", "bytes=3500100-"]


def test_without_ranges_it_begins_again(server, tmp_path):
    server.files, server.ranges = {"/a.bin": BODY}, False
    cut(server, tmp_path, 1_500_000)
    assert read_raw(file_of(server, "/a.bin", tmp_path)) == BODY
    assert len(server.gets()) == 2


def test_tries_that_get_further_are_not_counted(server, tmp_path):
    server.files = {"/a.bin": BODY}
    cut(server, tmp_path, *[1_100_000] * 4)
    assert read_raw(file_of(server, "/a.bin", tmp_path)) == BODY, "five tries, where three are made at one place"
    server.files = {"/b.bin": BODY}
    cut(server, tmp_path, 1_500_000, 0, 0, 0)
    with pytest.raises(InputError, match=rf"{server.url}/b\.bin: the connection was cut \(tried 3 times\)"):
        read_raw(file_of(server, "/b.bin", tmp_path))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_slow_server_is_waited_for(server, tmp_path):
    server.files, server.hold = {"/a.bin": BODY}, "a.bin"
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_raw(file_of(server, "/a.bin", tmp_path))))
    reader.start()
    assert server.held.acquire(timeout=300)
    assert not got
    server.go.set()
    reader.join(300)
    assert got == [BODY]


def test_a_file_that_changes_is_not_put_together_of_two(server, tmp_path):
    server.files = {"/a.bin": BODY}
    file = file_of(server, "/a.bin", tmp_path)
    server.files["/a.bin"] = BODY[::-1]
    with pytest.raises(InputError, match=r"a\.bin: has changed since the command began; start again"):
        read_raw(file)
    assert read_raw(file_of(server, "/a.bin", tmp_path)) == BODY[::-1]


def test_the_cache_is_bounded_and_keeps_versions_apart(server, tmp_path):
    server.files = {f"/{n}.bin": bytes([n]) * 1000 for n in range(3)}
    for n in (0, 1, 2, 0):
        assert read_raw(file_of(server, f"/{n}.bin", tmp_path, 2500)) == bytes([n]) * 1000
    assert [path for path, _ in server.gets()] == ["/0.bin", "/1.bin", "/2.bin", "/0.bin"]
    kept = [p for p in (tmp_path / RAW).iterdir() if not p.name.startswith(".")]
    assert sum(p.stat().st_size for p in kept) == 2000
    file = file_of(server, "/1.bin", tmp_path, 1)
    with file.fetch().open("rb") as opened:
        file_of(server, "/2.bin", tmp_path, 1).fetch()
        assert opened.read() == bytes([1]) * 1000, "an open file stays readable"


def test_without_a_version_nothing_old_is_taken(server, tmp_path):
    server.files, server.headers = {"/a.bin": b"old"}, {"/a.bin": {}}
    file = file_of(server, "/a.bin", tmp_path)
    assert read_raw(file) == read_raw(file) == b"old" and len(server.gets()) == 1
    before = file.fingerprint()
    server.files["/a.bin"] = b"new"
    assert read_raw(file_of(server, "/a.bin", tmp_path)) == b"new"
    assert file_of(server, "/a.bin", tmp_path).fingerprint() != before == file.fingerprint()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.jsonl", r"none\.jsonl: there is no such file; correct the address"),
        (
            "/denied.jsonl",
            r"denied\.jsonl: access is denied \(403 Forbidden\); use an address that carries its signature",
        ),
        ("/login.jsonl", r"login\.jsonl: access is denied \(401 Unauthorized\)"),
        ("/busy.jsonl", r"busy\.jsonl: the server answers 503 Service Unavailable \(tried 3 times\)"),
        ("/odd.jsonl", r"odd\.jsonl: the server answers 418"),
        ("/page", r"/page: is a web page, not a file of data"),
        ("/d/", r"/d/: a web server's files cannot be listed; name the files"),
        ("/*.jsonl", r"/\*\.jsonl: a web server's files cannot be listed"),
        ("/{a,b.jsonl", "braces are not closed"),
    ],
)
def test_what_cannot_be_had_is_refused_at_once(server, tmp_path, path, message):
    server.files = {"/page": b"<html></html>"}
    server.headers = {"/page": {"Content-Type": "text/html; charset=utf-8"}}
    server.status = {"/denied.jsonl": 403, "/login.jsonl": 401, "/busy.jsonl": 503, "/odd.jsonl": 418}
    with pytest.raises(InputError, match=message) as error:
        open_reader(f"{server.url}{path}?key=secret", PrepareOptions(), Cache(tmp_path / "cache"))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.bin"))


def test_texts_to_encode(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_SCALE_CACHE", str(tmp_path))
    server.files = {"/a.txt.gz": gzip.compress(b"one\ntwo\n")}
    assert [(t.where, t.text) for t in read_texts(f"{server.url}/a.txt.gz")] == [
        (f"{server.url}/a.txt.gz:1", "one"),
        (f"{server.url}/a.txt.gz:2", "two"),
    ]
