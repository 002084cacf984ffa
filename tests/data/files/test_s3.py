"""A real S3 server on the loopback (moto's), reached through a proxy that cuts and holds where a test says so."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
import requests
from fsspec.registry import _registry
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from jepa_scale.data.files.cache import Cache
from jepa_scale.data.prepare.base import PrepareOptions, Record
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.shards.format import Index, Sample, write_shard
from jepa_scale.data.shards.locate import Located, locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.utils.errors import DataError, InputError
from tests.data.files.servers import Server

TEXTS = [f"text {n}" for n in range(30)]
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto, server, tmp_path, monkeypatch) -> Iterator[Server]:
    """The proxy, with a bucket ``bkt`` behind it, and an environment with keys."""
    server.upstream = moto
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    for name in KEYS:
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    requests.post(f"{moto}/moto-api/reset", timeout=60)
    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket="bkt")
    for key, body in {
        "raw/train-0.jsonl": lines(TEXTS[:10]),
        "raw/train-1.jsonl": lines(TEXTS[10:]),
        "raw/test.jsonl": lines(["t"]),
        "raw/.hidden": b"x",
        "raw/README.md": b"x",
        "facts/vocab.json": b"{}",
        "facts/train.json": b"[]",
    }.items():
        client.put_object(Bucket="bkt", Key=key, Body=body, ACL="public-read" if "test" in key else "private")
    S3FileSystem.clear_instance_cache()
    yield server
    S3FileSystem.clear_instance_cache()


def values(path: str, cache: Path, split: str = "train") -> list[Any]:
    reader = open_reader(path, PrepareOptions(), Cache(cache))
    return [i.value if isinstance(i, Record) else f"!{i.reason}" for i in reader.records(split)]


def test_folders_patterns_and_files(s3, tmp_path):
    for path in ("s3://bkt/raw", "s3://bkt/raw/", "s3://bkt/raw/*.jsonl", "s3://bkt/**/t*.jsonl"):
        reader = open_reader(path, PrepareOptions(), Cache(tmp_path))
        assert {split: len(list(reader.records(split))) for split in reader.splits} == {"train": 30, "test": 1}, path
        assert [r.value for r in reader.records("train")] == TEXTS
    assert values("s3://bkt/raw/train-1.jsonl", tmp_path) == TEXTS[10:]
    assert values("s3://bkt/raw/train-{1,0}.jsonl", tmp_path) == TEXTS[10:] + TEXTS[:10]
    assert next(open_reader("s3://bkt/raw", PrepareOptions(), Cache(tmp_path)).records("train")).where == (
        "s3://bkt/raw/train-0.jsonl:1"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bkt/none.jsonl", r"s3://bkt/none\.jsonl: there is no such file; correct the address"),
        ("s3://bkt/*.none", r"s3://bkt/\*\.none: no file has such a name"),
        ("s3://no-bucket/a.jsonl", r"s3://no-bucket/a\.jsonl: there is no such file"),
        ("s3://bkt/facts", "s3://bkt/facts: a folder of facts is read from a disk; copy it here"),
    ],
)
def test_what_is_not_there(s3, tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        open_reader(path, PrepareOptions(), Cache(tmp_path))


def prepared(moto: str, folder: Path) -> list[list[int]]:
    """Put prepared shards into the bucket, and return the tokens of their samples."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n).astype(np.uint16) for n in (5, 9, 300_000, 7)]
    shards = [
        write_shard(folder, f"train-{i:06d}.tar", [Sample({"npy": row}, len(row)) for row in rows[i * 2 : i * 2 + 2]])
        for i in range(2)
    ]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text("{}")
    Index("text", {"train": shards}, 50, {}, tokenizer="tokenizer").write(folder)
    client = boto3.client("s3", endpoint_url=moto)
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bkt", Key=f"data/{file.relative_to(folder)}", Body=file.read_bytes())
    return [row.tolist() for row in rows]


def found(path: str, cache: Path) -> Located:
    located = locate(path, cache)
    assert located is not None
    return located


def tokens(located: Located) -> list[list[int]]:
    return [e.tokens.tolist() for e in ShardExamples(located, "train", max_length=400_000, long="split")]


def test_shards_in_training(s3, moto, tmp_path):
    rows = prepared(moto, tmp_path / "data")
    for path in ("s3://bkt/data", "s3://bkt/data/", "s3://bkt/data/*.tar", "s3://bkt/data/index.json"):
        assert tokens(found(path, tmp_path / "cache")) == rows
    assert tokens(found("s3://bkt/data/train-{000001..000001}.tar", tmp_path / "cache")) == rows[2:]
    folder = found("s3://bkt/data", tmp_path / "cache").tokenizer()
    assert folder is not None and [p.name for p in folder.glob("[!.]*")] == ["tokenizer_config.json"]
    assert len([path for path, _ in s3.gets() if path.startswith("/bkt/data/train-000000.tar")]) == 1, (
        "then from the cache"
    )
    with pytest.raises(InputError, match="s3://bkt/data: is already prepared"):
        open_reader("s3://bkt/data", PrepareOptions(), Cache(tmp_path))


def test_keys_that_are_wrong(s3, moto, tmp_path):
    prepared(moto, tmp_path / "data")
    data = ShardExamples(found("s3://bkt/data", tmp_path / "cache"), "train", max_length=400_000, long="split")
    requests.post(f"{moto}/moto-api/reset-auth", data=b"0", timeout=60)  # from now on keys are checked
    try:
        message = (
            r"s3://bkt/raw/test\.jsonl: access is denied \(.*\); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
        )
        with pytest.raises(InputError, match=message) as error:
            open_reader("s3://bkt/raw/test.jsonl", PrepareOptions(), Cache(tmp_path))
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=r"s3://bkt/raw/\*: access is denied \(The AWS Access Key Id"):
            open_reader("s3://bkt/raw/*", PrepareOptions(), Cache(tmp_path))
        with pytest.raises(InputError, match=r"train-000000\.tar: access is denied") as error:
            data[0]
        assert not isinstance(error.value, DataError), "not damage, which data.on_error=skip leaves out"
    finally:
        requests.post(f"{moto}/moto-api/reset-auth", data=b"inf", timeout=60)
    assert len(data[0].tokens) == 5, "with new keys it goes on"


def test_without_keys_and_with_public_data(s3, tmp_path, monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name)
    with pytest.raises(
        InputError, match=r"no credentials were found \(.*\); set AWS_.*public bucket set FSSPEC_S3="
    ) as error:
        open_reader("s3://bkt/raw/test.jsonl", PrepareOptions(), Cache(tmp_path))
    advised = str(error.value).rpartition("FSSPEC_S3='")[2].rstrip("'")
    monkeypatch.setitem(
        fsspec.config.conf, "s3", json.loads(advised)
    )  # what fsspec makes of the variable when it is imported
    assert values("s3://bkt/raw/test.jsonl", tmp_path) == ["t"]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    message = rf"{scheme}://b/a\.jsonl: needs the package {package} .*; install it: pip install 'jepa-scale\[remote\]'"
    with pytest.raises(InputError, match=message):
        open_reader(f"{scheme}://b/a.jsonl", PrepareOptions(), Cache(tmp_path))
    with pytest.raises(InputError, match=message.replace(r"a\.jsonl", r"data/index\.json")):
        locate(f"{scheme}://b/data", tmp_path)


def test_a_cut_connection_is_overcome(s3, moto, tmp_path):
    rows = prepared(moto, tmp_path / "data")
    located = found("s3://bkt/data", tmp_path / "cache")
    s3.cuts = [0, 100_000]
    assert located.fetch("train-000001.tar").read_bytes() == (tmp_path / "data/train-000001.tar").read_bytes()
    assert not s3.cuts and tokens(located) == rows
    s3.cuts = [100] * 3
    with pytest.raises(InputError, match=r"s3://bkt/raw/train-1\.jsonl: .*\(tried 3 times\)") as error:
        values("s3://bkt/raw/train-1.jsonl", tmp_path)
    assert not isinstance(error.value, DataError)


def test_a_slow_server_is_waited_for(s3, moto, tmp_path):
    rows = prepared(moto, tmp_path / "data")
    s3.hold = "train-000001.tar"
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(tokens(found("s3://bkt/data", tmp_path / "cache"))))
    reader.start()
    assert s3.held.acquire(timeout=300)
    assert not got
    s3.go.set()
    reader.join(300)
    assert got == [rows]
