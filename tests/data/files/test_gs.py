"""A GCS server on the loopback (gcp-storage-emulator's), reached through a proxy that asks for tokens as Google does."""

import json
import os
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote

import fsspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

pytest.importorskip("gcp_storage_emulator")
if find_spec("gcsfs") is None:  # not imported yet: how our own code imports it is part of the test
    pytest.skip("gcsfs is not installed", allow_module_level=True)

from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from google.auth import jwt

from jepa_scale.cli.main import main
from jepa_scale.data.files.addresses import filesystem
from jepa_scale.data.files.cache import SHARDS, Cache
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.job import prepare
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.shards.locate import locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.utils.errors import DataError, InputError
from tests.data.files.servers import Answer, Server
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import rows
from tests.text_runs import config_file

TEXTS = [f"text {n} of some words" for n in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
ACCOUNT = "reader@project.iam.gserviceaccount.com"
ENVIRONMENT = ("HOME", "no_proxy", "NO_GCE_CHECK", "STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS")


def fault(status: int, **values: Any) -> Answer:
    body = json.dumps(values).encode()
    return status, {"Content-Length": str(len(body)), "Content-Type": "application/json"}, body


class Google:
    """What Google's servers check of a request: the signature of a token's request, then the token and its rights.

    Attributes:
        hidden: names of objects that the account may not read. Those with ``public`` in their names anybody may read.
    """

    def __init__(self, key: rsa.RSAPublicKey) -> None:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        self.key = key.public_bytes(serialization.Encoding.PEM, form)
        self.hidden: set[str] = set()

    def __call__(self, request: BaseHTTPRequestHandler) -> Answer | None:
        if request.path == "/token":
            asked = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
            try:
                jwt.decode(asked["assertion"][0], certs=self.key, clock_skew_in_seconds=60)
            except ValueError:
                return fault(400, error="invalid_grant", error_description="Invalid JWT Signature.")
            return fault(200, access_token="good", expires_in=3600, token_type="Bearer")
        path, token = unquote(request.path), request.headers.get("Authorization")
        if token == "Bearer good":
            denied = [name for name in self.hidden if name in path]
            why = f"{ACCOUNT} does not have storage.objects.get access to the Google Cloud Storage object."
            return fault(403, error={"code": 403, "message": why}) if denied else None
        if token is None:
            why = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
            return None if "public" in path else fault(401, error={"code": 401, "message": why})
        return fault(401, error={"code": 401, "message": "Invalid Credentials"})


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def account(file: Path, key: rsa.RSAPrivateKey, server: Server) -> str:
    """Write the file of a service account, and return its path."""
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    values = {
        "type": "service_account",
        "client_email": ACCOUNT,
        "private_key": key.private_bytes(serialization.Encoding.PEM, form, plain).decode(),
        "token_uri": f"{server.url}/token",
    }
    file.write_text(json.dumps(values))
    return str(file)


@pytest.fixture
def gs(server, key, tmp_path, monkeypatch) -> Iterator[Server]:
    """The proxy, with a bucket ``bkt`` behind it, and an environment that names an account with rights."""
    storage = Storage(use_memory_fs=True)
    storage.create_bucket("bkt", {"name": "bkt"})
    behind = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    Thread(target=behind.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.upstream = f"http://127.0.0.1:{behind.server_address[1]}"
    server.guard = Google(key.public_key())
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "GCSFS_", "CLOUDSDK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.config/gcloud
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # nor the accounts of a machine of Google's
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", account(tmp_path / "account.json", key, server))
    filesystem("gs://bkt")
    forget()
    lines = LINES.splitlines(keepends=True)
    put(
        server,
        {"raw/train-0.jsonl": b"".join(lines[:20]), "raw/train-1.jsonl": b"".join(lines[20:]), "public.jsonl": LINES},
    )
    put(server, {"raw/README.md": b"x", "raw/.hidden": b"x"})
    server.seen.clear()
    yield server
    forget()
    behind.shutdown()
    behind.server_close()


def forget() -> None:
    """Have the next file system read the environment anew."""
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()


def put(server: Server, files: dict[str, bytes]) -> None:
    """Write objects past the proxy."""
    import gcsfs

    behind = gcsfs.GCSFileSystem(token="anon", endpoint_url=server.upstream, skip_instance_cache=True)
    for name, content in files.items():
        behind.pipe_file(f"bkt/{name}", content)


def texts(path: str, cache: Path) -> list[str]:
    return [record.value for record in open_reader(path, PrepareOptions(), Cache(cache)).records("train")]


def test_folders_patterns_and_files(gs, tmp_path):
    for path in ("gs://bkt/raw", "gs://bkt/raw/", "gcs://bkt/raw/*.jsonl", "gs://bkt/**/t*.jsonl"):
        assert texts(path, tmp_path) == TEXTS, path
    assert texts("gs://bkt/raw/train-1.jsonl", tmp_path) == TEXTS[20:]
    reader = open_reader("gs://bkt/raw/train-{1,0}.jsonl", PrepareOptions(), Cache(tmp_path))
    assert [record.value for record in reader.records("train")] == TEXTS[20:] + TEXTS[:20]
    assert next(reader.records("train")).where == "gs://bkt/raw/train-1.jsonl:1"
    before = reader.fingerprint()
    put(gs, {"raw/train-1.jsonl": LINES})
    assert open_reader("gs://bkt/raw/train-{1,0}.jsonl", PrepareOptions(), Cache(tmp_path)).fingerprint() != before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bkt/none.jsonl", r"gs://bkt/none\.jsonl: there is no such file; correct the address"),
        ("gs://bkt/*.none", r"gs://bkt/\*\.none: no file has such a name"),
        ("gs://no-bucket/a.jsonl", r"gs://no-bucket/a\.jsonl: there is no such file"),
    ],
)
def test_what_is_not_there(gs, tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        open_reader(path, PrepareOptions(), Cache(tmp_path))


def test_credentials_that_do_not_serve_are_told_in_one_line(gs, key, tmp_path, monkeypatch, capfd):
    def said(path: str) -> str:
        forget()
        command = ["data", "prepare", path, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
        assert main(command) == 2
        assert not (tmp_path / "out").exists()
        (line,) = capfd.readouterr().err.strip().splitlines()  # without a traceback of gcsfs's
        return line

    gs.guard.hidden = {"raw/train-0"}
    assert "gs://bkt/raw/train-0.jsonl: access is denied (Forbidden: " in (line := said("gs://bkt/raw/train-0.jsonl"))
    assert line.endswith('for a public bucket set FSSPEC_GS=\'{"token": "anon"}\'')
    gs.guard.hidden.clear()

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    account(tmp_path / "account.json", other, gs)
    gs.seen.clear()
    assert "gs://bkt/raw: access is denied (401 Invalid Credentials" in said("gs://bkt/raw")
    assert [path for _, path, _ in gs.seen] == ["/token"]  # a wrong key is not tried again and again

    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    line = said("gs://bkt/raw")
    assert "gs://bkt/raw: no credentials were found (File " in line and "nowhere.json was not found.)" in line

    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    line = said("gs://bkt/raw/*")
    assert "gs://bkt/raw/*: access is denied (401 Anonymous caller does not have storage.objects.get access" in line
    assert "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`" in line


def test_public_data_need_no_account(gs, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    forget()
    with pytest.raises(InputError, match="no credentials were found") as error:
        texts("gs://bkt/public.jsonl", tmp_path)
    advised = str(error.value).rpartition("FSSPEC_GS='")[2].rstrip("'")
    # what fsspec makes of the variable when it is imported
    monkeypatch.setitem(fsspec.config.conf, "gs", json.loads(advised))
    assert texts("gs://bkt/public.jsonl", tmp_path) == TEXTS


def test_a_cut_connection_is_overcome(gs, tmp_path):
    body = bytes(range(256)) * 1000
    put(gs, {"a.txt": body})
    gs.cuts = [1000]
    located = Cache(tmp_path).fetch(tmp_path / "a.txt", "gs://bkt/a.txt", size=len(body))
    assert located.read_bytes() == body and not gs.cuts


def train(ranks: ParallelContext, configs: list[str], environment: dict[str, str]) -> None:
    from tests.distributed.test_runs import train_runs

    before = dict(os.environ)
    os.environ.update(environment)
    try:
        train_runs(ranks, [(config, None) for config in configs])
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_whole_run_from_raw_data_to_training(gs, tmp_path):
    """Prepared from the bucket, put there, and trained on: the shards and the losses of the same data on a disk."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train.jsonl").write_bytes(LINES)
    options, cache = PrepareOptions(vocab_size=300, shard_samples=20), tmp_path / "cache"
    local = prepare(tmp_path / "raw", tmp_path / "local", options, 1, False, cache=cache)
    index = prepare("gs://bkt/raw", tmp_path / "out", options, 1, False, cache=cache)
    assert index.fingerprint == local.fingerprint and len(index.splits["train"]) == 3

    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    put(gs, {f"data/{file.relative_to(tmp_path / 'out')}": file.read_bytes() for file in files})
    of = {"source": "text", "path": "gs://bkt/data", "max_length": 64, "workers": 1, "cache": str(cache)}
    configs = [
        str(config_file(tmp_path, name, data=of | changes))
        for name, changes in (("remote", {}), ("local", {"path": str(tmp_path / "local")}))
    ]
    run_ranks(train, 1, configs, {name: os.environ[name] for name in ENVIRONMENT})
    losses = {name: [row["loss"] for row in rows(tmp_path / name)] for name in ("remote", "local")}
    assert len(losses["remote"]) == 4 and losses["remote"] == losses["local"]
    assert len(list((cache / SHARDS).rglob("*.tar"))) == 3

    located = locate("gs://bkt/data", tmp_path / "other")
    assert located is not None
    data = ShardExamples(located, "train", max_length=64, long="split")
    gs.guard.hidden = {"train-000001.tar"}
    forget()
    with pytest.raises(InputError, match=r"gs://bkt/data/train-000001\.tar: access is denied") as error:
        data[20]
    assert not isinstance(error.value, DataError), "not damage, which data.on_error=skip leaves out"
