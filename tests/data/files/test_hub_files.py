"""Files of a dataset by ``hf://``: huggingface_hub's own client, against a server that answers as the hub does."""

import json

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

from jepa_scale.cli.main import main
from jepa_scale.data.files.cache import Cache
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.utils.errors import InputError
from tests.text_runs import config_file

TEXTS = [f"text {n}" for n in range(9)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url, "token": "hf_some"})
    huggingface_hub.HfFileSystem.clear_instance_cache()
    names = ("data/a.jsonl", "data/b.jsonl")
    files = [{"type": "file", "oid": f"o{n}", "size": len(LINES), "path": name} for n, name in enumerate(names)]
    of = "/api/datasets/owner/set"
    server.files = {
        of: json.dumps({"_id": "1", "id": "owner/set", "sha": "abc", "siblings": []}).encode(),
        f"{of}/tree/main": json.dumps([{"type": "directory", "oid": "d", "size": 0, "path": "data"}]).encode(),
        f"{of}/tree/main/data": json.dumps(files).encode(),
        **{f"/datasets/owner/set/resolve/main/{name}": LINES for name in names},
    }
    yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("path", "copies"), [("data/b.jsonl", 1), ("data", 2), ("data/*.jsonl", 2), ("data/{a,b}.jsonl", 2)]
)
def test_files_and_folders_of_a_dataset(hub, tmp_path, path, copies):
    reader = open_reader(f"hf://datasets/owner/set/{path}", PrepareOptions(), Cache(tmp_path))
    records = list(reader.records("train"))
    assert [record.value for record in records] == TEXTS * copies
    assert records[-1].where == "hf://datasets/owner/set/data/b.jsonl:9"
    assert (
        reader.fingerprint()
        == open_reader(f"hf://datasets/owner/set/{path}", PrepareOptions(), Cache(tmp_path)).fingerprint()
    )


def test_what_is_not_there_or_private_is_said_at_once(hub, tmp_path, monkeypatch):
    message = r"hf://datasets/owner/{}/a\.jsonl: there is no such file, or it is private: set HF_TOKEN"
    for name, status in (("set", 404), ("private", 401), ("gated", 403)):
        hub.status[f"/api/datasets/owner/{name}/tree/main"] = status
        hub.status[f"/api/datasets/owner/{name}"] = status
        expected = (
            message.format(name) if status == 404 else rf"{name}/a\.jsonl: access is denied \(.*{status}.*set HF_TOKEN"
        )
        with pytest.raises(InputError, match=expected):
            open_reader(f"hf://datasets/owner/{name}/a.jsonl", PrepareOptions(), Cache(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"other/a\.jsonl: HF_HUB_OFFLINE is set"):
        open_reader("hf://datasets/owner/other/a.jsonl", PrepareOptions(), Cache(tmp_path))


@pytest.mark.parametrize("path", ["data/a.jsonl", "data", "data/*.jsonl", "shards/index.json", "shards/{a,b}.tar"])
def test_a_run_without_a_network_ends_with_one_line(hub, tmp_path, monkeypatch, capfd, path):
    monkeypatch.setitem(
        fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:1", "token": "hf_some"}
    )  # nobody there
    huggingface_hub.HfFileSystem.clear_instance_cache()
    config = config_file(tmp_path)
    assert main(["train", "--config", str(config), f"data.path=hf://datasets/owner/set/{path}"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "hf://datasets/owner/set/" in line and "cannot connect: " in line
    assert line.endswith("(tried 3 times); check the address and the network")
    assert not (tmp_path / "run").exists()
