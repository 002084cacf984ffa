import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jepa_scale.data.files import download
from jepa_scale.data.files.cache import cache_dir
from jepa_scale.data.prepare import aliases
from jepa_scale.data.prepare.aliases import ALIASES
from jepa_scale.data.prepare.base import PrepareOptions
from jepa_scale.data.prepare.formats.hub import Dataset
from jepa_scale.utils.errors import InputError

TEXT = "".join(f"Line {n} of a play.\n" for n in range(100))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_SCALE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("JEPA_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(aliases, "SHAKESPEARE_URL", f"http://127.0.0.1:{closed_port()}/input.txt")
    monkeypatch.setattr(download, "RETRY_DELAYS", (0.0,))
    (tmp_path / "data").mkdir()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def values(source, split):
    return [r.value for r in source.records(split)]


def test_the_cache_folder(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JEPA_SCALE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "jepa_scale"


@pytest.mark.parametrize(
    "place", ["data/tiny_shakespeare.txt", "data/tiny_shakespeare/input.txt", "cache/tiny_shakespeare.txt"]
)
def test_tiny_shakespeare_from_a_local_file(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(TEXT)
    source = ALIASES["tiny"](PrepareOptions())
    (train,), (valid,) = values(source, "train"), values(source, "valid")
    assert train + valid == TEXT
    assert train.endswith("\n")
    assert 0.88 < len(train) / len(TEXT) <= 0.9
    (half,) = values(ALIASES["tiny_shakespeare"](PrepareOptions(valid_fraction=0.5)), "train")
    assert 0.48 < len(half) / len(TEXT) <= 0.5
    whole = ALIASES["tiny"](PrepareOptions(valid_path="x"))
    assert whole.splits == ("train",)
    assert values(whole, "train") == [TEXT]
    assert len({source.fingerprint(), whole.fingerprint()}) == 2


def test_tiny_shakespeare_without_file_and_network_says_where_to_put_it(tmp_path):
    with pytest.raises(InputError) as caught:
        ALIASES["tiny"](PrepareOptions())
    message = str(caught.value)
    assert "no file tiny_shakespeare.txt and no download" in message
    assert "cannot connect" in message
    assert f"put {aliases.SHAKESPEARE_URL} at {tmp_path}/data/tiny_shakespeare.txt or" in message
    assert "JEPA_SCALE_DATA" in message
    assert "\n" not in message
    assert not list((tmp_path / "cache").iterdir())


class Play(BaseHTTPRequestHandler):
    length = len(TEXT)

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(TEXT.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    served = HTTPServer(("127.0.0.1", 0), Play)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(aliases, "SHAKESPEARE_URL", f"http://127.0.0.1:{served.server_port}/input.txt")
    yield
    served.shutdown()
    served.server_close()


def test_tiny_shakespeare_is_downloaded_once(tmp_path, server, monkeypatch):
    first = ALIASES["tiny"](PrepareOptions())
    assert "".join(values(first, "train") + values(first, "valid")) == TEXT
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["tiny_shakespeare.txt"]
    monkeypatch.setattr(aliases, "SHAKESPEARE_URL", f"http://127.0.0.1:{closed_port()}/input.txt")
    assert ALIASES["tiny"](PrepareOptions()).fingerprint() == first.fingerprint()


def test_half_a_download_is_none(tmp_path, server, monkeypatch):
    monkeypatch.setattr(Play, "length", len(TEXT) + 100)
    with pytest.raises(InputError, match="no download"):
        ALIASES["tiny"](PrepareOptions())
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("names", [("train.txt", "valid.txt", "test.txt"), ("wiki.train.tokens", "wiki.valid.raw")])
def test_wikitext_from_a_local_folder(tmp_path, names):
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f" \n = {name} = \n \n one \n = = S = = \n = Two = \n two \n")
    source = ALIASES["wiki"](PrepareOptions(documents="line"))  # an article is a document whatever the option says
    assert source.splits == ("train", "valid", "test")[: len(names)]
    assert values(source, "train") == [f" = {names[0]} = \n \n one \n = = S = = \n", " = Two = \n two \n"]
    before = source.fingerprint()
    (folder / names[1]).write_text("changed")
    assert source.fingerprint() != before


def test_wikitext_without_its_training_file_names_it(tmp_path):
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir()
    (folder / "valid.txt").write_text("x")
    with pytest.raises(InputError, match=f"{folder}/train.txt: no such file, but valid.txt"):
        ALIASES["wt2"](PrepareOptions())


def test_wikitext_without_folder_and_network_says_both(tmp_path):
    with pytest.raises(InputError) as caught:
        ALIASES["wikitext2"](PrepareOptions())
    for part in ("train.txt, valid.txt, test.txt", f"{tmp_path}/data/wikitext2", "Salesforce/wikitext", "network"):
        assert part in str(caught.value)


def test_wikitext_rows_of_the_hub_are_lines(tmp_path, monkeypatch):
    """A folder stands in for the hub: the library reads both alike."""
    lines = ["", " = One = \n", "", " first \n", " = = S = = \n", " = Two = \n", " second \n"]
    import json

    for split in ("train", "validation", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    monkeypatch.setattr(aliases, "WIKITEXT", (Dataset(str(tmp_path / "data")), None))
    source = ALIASES["wikitext2"](PrepareOptions())
    assert values(source, "valid") == [" = One = \n first \n = = S = = \n", " = Two = \n second \n"]
    assert [r.where for r in source.records("train")] == [f"{tmp_path}/data/train#1", f"{tmp_path}/data/train#5"]
    assert source.splits == ("train", "valid", "test")


def test_the_python_topics_need_nothing():
    from pydoc_data.topics import topics

    source = ALIASES["python_docs"](PrepareOptions())
    records = {split: list(source.records(split)) for split in ("train", "valid")}
    assert sorted(r.where for rs in records.values() for r in rs) == sorted(f"python_docs#{t}" for t in topics)
    assert all(r.value == topics[r.where.removeprefix("python_docs#")] for rs in records.values() for r in rs)
    assert len(records["valid"]) == -(-len(topics) // 10)
    assert [r.where for r in records["train"]] == sorted(r.where for r in records["train"])
    assert source.fingerprint() == ALIASES["python_docs"](PrepareOptions()).fingerprint()
