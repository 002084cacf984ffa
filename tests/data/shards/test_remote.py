"""Shards by URL: a real HTTP server on the loopback, a real cache, real processes."""

import hashlib
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_scale.data.files import addresses, download
from jepa_scale.data.files import cache as fetch
from jepa_scale.data.files.cache import Cache
from jepa_scale.data.shards.format import Index, Sample, write_shard
from jepa_scale.data.shards.locate import Located, locate
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.data.shards.remote import Remote, ShardError
from jepa_scale.utils.errors import DataError, InputError
from jepa_scale.utils.lock import locked


class Handler(SimpleHTTPRequestHandler):
    """Serves files, badly where it is told to: name of a file → what to do the next time it is asked for."""

    orders: dict[str, list[str]]
    seen: list[str]
    asked: threading.Semaphore
    go: threading.Event

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.seen.append(name + (f"?{query}" if query else ""))
        order = self.orders[name].pop(0) if self.orders.get(name) else ""
        if order.isdigit():
            return self.send_error(int(order))
        if order == "held":  # until the test says so, or is over
            self.asked.release()
            self.go.wait()
        if order in ("cut", "short"):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            if order == "cut":  # says how long it is, and then isn't; "short" does not even say
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        with suppress(ConnectionError):  # a client that was killed
            super().do_GET()
        return None

    def log_message(self, *args: Any) -> None:
        pass


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.orders: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.asked, self.go = threading.Semaphore(0), threading.Event()
        handler = type("OfThisServer", (Handler,), {**vars(self)})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


SHARDS = [f"train-{i:06d}.tar" for i in range(4)]


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served/data"
    (folder / "tokenizer").mkdir(parents=True)
    rng = np.random.default_rng(0)
    infos = []
    for name in SHARDS:
        parts = [Sample({"npy": rng.integers(0, 50, n).astype(np.uint16)}, n) for n in (5, 9, 4000)]
        infos.append(write_shard(folder, name, parts))
    (folder / "tokenizer/tokenizer_config.json").write_text("{}")
    (folder / "tokenizer/chat_template.jinja").write_text("x")
    Index("text", {"train": infos}, 50, {}, tokenizer="tokenizer").write(folder)
    server = Server(tmp_path / "served")
    yield server
    server.close()


def found(server: Server, path: str = "data", **options: Any) -> Located:
    located = locate(f"{server.url}/{path}", server.folder.parent / "cache", **options)
    assert located is not None
    return located


def examples(located: Located) -> ShardExamples:
    return ShardExamples(located, "train", max_length=5000, long="split")


def tokens(located: Located) -> list[list[int]]:
    return [e.tokens.tolist() for e in examples(located)]


def expected(server: Server) -> list[list[int]]:
    located = locate(str(server.folder / "data"), Path("unused"))
    assert located is not None
    return tokens(located)


@pytest.mark.parametrize("path", ["data", "data/", "data/index.json", "data/*.tar", "data/train-{000000..000003}.tar"])
def test_what_is_read_is_what_is_served(server, path):
    located = found(server, path)
    assert tokens(located) == tokens(located) == expected(server)
    assert sorted(server.seen) == sorted(["index.json", *SHARDS, *(s.replace(".tar", ".idx.npy") for s in SHARDS)])
    tokens(found(server, path))
    assert len(server.seen) == 10, "all but the index comes from the cache"
    assert not list(Path(located.source.folder).glob("*.partial"))


def test_nothing_is_fetched_before_it_is_needed(server):
    located = found(server, "data/train-00000[13].tar?key=secret")
    assert server.seen == ["index.json?key=secret"] and "secret" not in located.where
    data = examples(located)
    assert server.seen[1:] == ["train-000001.idx.npy?key=secret", "train-000003.idx.npy?key=secret"]
    assert data.sizes(np.arange(6)).tolist() == [5, 9, 4000] * 2
    assert len(data[4].tokens) == 9 and server.seen[3:] == ["train-000003.tar?key=secret"]


def test_the_tokenizer_comes_too(server):
    located = found(server)
    server.orders["tokenizer.json"] = ["500", "500"]
    folder = located.tokenizer()
    assert folder is not None and located.tokenizer() == folder
    assert server.seen.count("tokenizer_config.json") == 1
    held = [".complete", "chat_template.jinja", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == held
    for name in held:
        (folder / name).unlink()
    (server.folder / "data/tokenizer").rename(server.folder / "elsewhere")
    with pytest.raises(InputError, match="data/tokenizer/tokenizer_config.json: the tokenizer is missing"):
        located.tokenizer()
    server.orders["tokenizer.json"] = ["500"] * 3
    with pytest.raises(InputError, match="the server answers 500"):
        located.tokenizer()


@pytest.mark.parametrize("fault", ["cut", "short", "500", "503", "429"])
def test_a_fault_that_passes_is_overcome(server, fault):
    server.orders |= {name: [fault] for name in ("train-000001.tar", "train-000000.idx.npy")}
    if fault != "short":  # nobody can know how long an index is that is served without a length
        server.orders["index.json"] = [fault]
    located = found(server)
    assert tokens(located) == expected(server)
    assert server.seen.count("train-000001.tar") == 2 and server.seen.count(SHARDS[0]) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut", "the connection was cut"),
        ("short", r"ended after [\d,]+ of [\d,]+ bytes"),
        ("502", "502"),
    ],
)
def test_a_fault_that_stays_stops_the_run(server, fault, message):
    """It is the network, not the data: no reason to leave samples out."""
    data = examples(found(server))
    server.orders["train-000002.tar"] = [fault] * 3
    with pytest.raises(InputError, match=rf"data/train-000002\.tar: .*{message}.*\(tried 3 times\)") as error:
        data[6]
    assert not isinstance(error.value, DataError)
    assert len(data[6].tokens) == 5, "the next try may succeed"
    assert len(list(Path(data.located.source.folder).glob("*.partial"))) == 0


def test_no_such_file(server):
    for path in ("nothing", "data/tokenizer/train-000000.tar"):
        assert locate(f"{server.url}/{path}", server.folder) is None, "raw data, perhaps"
    data = examples(found(server))
    (server.folder / "data/train-000002.tar").unlink()
    server.seen.clear()
    for _ in range(2):
        with pytest.raises(
            ShardError, match=r"data/train-000002\.tar: there is no such file.*data\.on_error=skip"
        ) as error:
            data[7]
        assert error.value.shard == "train-000002.tar"
    assert server.seen == ["train-000002.tar"], "asked for once"
    assert len(data[9].tokens) == 5
    index = server.folder / "data/train-000001.idx.npy"
    index.write_bytes(index.read_bytes()[:-1])
    server.folder.parent.joinpath("cache").rename(server.folder.parent / "old")
    for message in (
        "train-000001.idx.npy: its checksum is not the one",
        "train-000001.idx.npy: there is no such file",
    ):
        with pytest.raises(ShardError, match=message) as error:
            examples(found(server))
        assert error.value.shard == "train-000001.tar"
        index.unlink(missing_ok=True)


@pytest.mark.parametrize(("change", "message"), [(b"", "checksum is not the one"), (b"more", "is larger than")])
def test_another_file_than_the_index_says(server, change, message):
    data = examples(found(server))
    path = server.folder / "data/train-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(bytes(content) + change)
    with pytest.raises(ShardError, match=rf"train-000000\.tar: .*{message}"):
        data[0]
    assert not list(Path(data.located.source.folder).glob("train-000000.tar*"))


def test_a_server_that_is_not_there(server, tmp_path):
    with socket.socket() as nobody:  # has the port, so that no other process can take it, and does not listen
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"{url}/data/index\.json: cannot connect: .*\(tried 3 times\)"):
            locate(f"{url}/data", tmp_path)


def test_a_server_that_says_nothing(server, monkeypatch):
    monkeypatch.setattr(addresses, "TIMEOUT", 0.1)
    server.orders["index.json"] = ["held"] * 3
    with pytest.raises(InputError, match=r"timed out \(tried 3 times\)"):
        found(server)


def test_a_damaged_copy_is_told_from_a_damaged_shard(server):
    data = examples(found(server))
    path = data.located.fetch(SHARDS[0])
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=rf"{path}, sample train-000000-000000: .*delete it to fetch it again"):
        data[0]
    path.write_bytes(content[:-512])
    assert len(examples(found(server))[0].tokens) == 5, "a copy of a wrong size is fetched again at once"


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_shards_go(server):
    shard = (server.folder / "data" / SHARDS[0]).stat().st_size
    located = found(server, cache_bytes=2 * shard + 4 * 500)
    data = examples(located)
    folder = Path(located.source.folder)

    def here() -> set[str]:
        return {path.name for path in folder.glob("*.tar")}

    def use(number: int) -> None:
        for path in folder.rglob("*"):  # what was used before is older, however coarse the kernel's clock is
            before = path.stat().st_mtime - 1
            os.utime(path, (before, before))
        data._file.cache_clear()
        data._document.cache_clear()
        assert data[number * 3].tokens.tolist() == wanted[number * 3]

    wanted = expected(server)
    use(0)
    use(1)
    use(0)
    use(2)
    assert here() == {SHARDS[0], SHARDS[2]}
    use(3)
    assert here() == {SHARDS[2], SHARDS[3]}
    assert len(list(folder.glob("*.idx.npy"))) == 4
    tiny = examples(found(server, cache_bytes=1))
    assert [len(e.tokens) for e in tiny] == [5, 9, 4000] * 4 and len(here()) == 1
    assert [len(e.tokens) for e in tiny] == [5, 9, 4000] * 4, "open files stay readable without a name"


def test_other_data_give_way_too(tmp_path):
    names = ["shards/a/1.tar", "raw/2", "shards/b/3.tar", "shards/a/x.idx.npy", "shards/b/4.tar.host-1.partial"]
    for number, name in enumerate([*names, "raw/.5.lock", "raw/5.host-1.partial"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))

    def left(limit: int, wanted: int) -> set[str]:
        Cache(tmp_path, limit).evict(wanted)
        return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}

    everything = {*names, "raw/.5.lock", "raw/5.host-1.partial"}
    assert left(700, 0) == everything
    assert left(700, 101) == everything - {"shards/a/1.tar", "raw/2"}, "the oldest, of both kinds"
    assert left(10, 0) == everything - {"shards/a/1.tar", "raw/2", "shards/b/3.tar"}


def test_a_shard_that_vanishes_between_fetch_and_open_is_fetched_again(server, monkeypatch):
    located = found(server)
    data = examples(located)
    real = Located.fetch
    times = []

    def fetch_and_lose(self: Located, name: str) -> Path:
        path = real(self, name)
        times.append(name)
        if len(times) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(Located, "fetch", fetch_and_lose)
    assert len(data[0].tokens) == 5 and server.seen.count(SHARDS[0]) == 2


def get(remote: Remote, name: str, sha256: str, size: int, here: Any) -> bytes:
    """Fetch, and say so just before waiting for the others."""

    def announced(path: Path) -> Any:
        here.release()
        return locked(path)

    fetch.locked = announced  # in a process of its own
    return remote.fetch(name, name, sha256, size).read_bytes()


def test_processes_that_want_the_same_file_at_once_download_it_once(server):
    path = server.folder / "data" / SHARDS[0]
    server.orders[SHARDS[0]] = ["held"]
    remote = Remote(f"{server.url}/data/{{}}", "x", Cache(server.folder.parent / "cache"))
    remote.folder.mkdir(parents=True)
    dead = remote.folder / f"{SHARDS[0]}.host-1.partial"
    dead.write_bytes(b"left over")
    context = multiprocessing.get_context("fork")
    content = path.read_bytes()
    with context.Manager() as manager, context.Pool(3) as pool:
        here = manager.Semaphore(0)
        arguments = (remote, SHARDS[0], hashlib.sha256(content).hexdigest(), len(content), here)
        fetched = pool.starmap_async(get, [arguments] * 3, chunksize=1)
        for _ in range(3):
            assert here.acquire(timeout=300)
        server.go.set()  # all three want it by now
        assert fetched.get(300) == [content] * 3
    assert server.seen == [SHARDS[0]] and not dead.exists()


def test_a_killed_download_leaves_nothing_that_could_be_taken_for_the_file(server):
    located = found(server)
    server.orders[SHARDS[0]] = ["held"]
    child = os.fork()
    if child == 0:
        located.fetch(SHARDS[0])
        os._exit(0)
    assert server.asked.acquire(timeout=300)
    os.kill(child, 9)
    os.waitpid(child, 0)
    server.go.set()
    assert not located.path(SHARDS[0]).exists()
    assert located.fetch(SHARDS[0]).read_bytes() == (server.folder / "data" / SHARDS[0]).read_bytes()


def test_a_full_disk_or_a_forbidden_folder_is_told(server, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    located = locate(f"{server.url}/data", blocked)
    assert located is not None
    with pytest.raises(InputError, match="cannot be written"):
        located.fetch(SHARDS[0])
