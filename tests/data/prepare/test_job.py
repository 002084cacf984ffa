import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_scale.cli.main import main
from jepa_scale.data.prepare import blocks, job, workers
from jepa_scale.data.prepare.base import BadRecord, LeftOut, PrepareOptions, Record
from jepa_scale.data.prepare.job import prepare, prepared
from jepa_scale.data.shards.format import Index
from jepa_scale.utils import allocator
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import sha256_of
from tests.data.prepare import lines
from tests.forked import in_child

OPTIONS = PrepareOptions(shard_samples=7)


@pytest.fixture(autouse=True)
def line_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(job, "open_reader", lines.open_reader)
    monkeypatch.setattr(job, "make_encoder", lines.make_encoder)
    monkeypatch.setenv("JEPA_SCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "jepa_scale")
    return caplog


def text(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(50)}" for _ in range(rng.randrange(1, 14))) for _ in range(number)]


def source(folder: Path, train: list[str], **others: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, content in {"train": train, **others}.items():
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in content))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


class Command:
    """``jepa-scale data prepare`` in a forked process, with a process group of its own: what it imports is there already."""

    def __init__(self, folder: Path, *args: str, delay: str = "0") -> None:
        self.said = [folder / "stdout", folder / "stderr"]

        def work() -> None:
            os.setsid()
            for number, file in enumerate(self.said, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ["LINES_DELAY"] = delay
            code = main(["data", "prepare", *args])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

        self.pid = in_child(work)

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        stdout, stderr = (file.read_text() for file in self.said)
        return code, stdout, stderr


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], Any]) -> None:
    """Wait for something to happen; the bound only ends a hang."""
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def finished(folder: Path) -> int:
    """Shards that are there with their records."""
    return len(list(folder.glob("*.done.json")))


def kill(command: Command, group: bool) -> None:
    """The command alone, or with its workers; returns when all of them are gone."""
    workers = children(command.pid)
    assert len(workers) >= 2
    (os.killpg if group else os.kill)(command.pid, signal.SIGKILL)
    command.end()
    try:
        until(lambda: not any(map(alive, workers)))
    finally:
        for pid in filter(alive, workers):
            os.kill(pid, signal.SIGKILL)


def test_what_is_not_used_is_reported(
    tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with the number of records; a record that its own data exclude is left out whatever on_error is."""

    def encode(encoder: lines.WordEncoder, record: Record) -> list[Any]:
        if record.where.endswith(":3"):
            raise LeftOut(record.where, "labelled as unwanted")
        return plain(encoder, record)

    plain = lines.WordEncoder.__call__
    monkeypatch.setattr(lines.WordEncoder, "__call__", encode)
    monkeypatch.setattr(
        lines.WordEncoder, "unused", lambda _, r: ("message field x",) * r.where.endswith(("2", "3", "4"))
    )
    index = prepare(source(tmp_path / "raw", text(9)), tmp_path / "out", OPTIONS, processes=1)
    assert index.made_from["unused"] == {"message field x": 2}
    assert index.skipped == {"labelled as unwanted": 1}
    told = [message for message in logged.messages if "not used" in message]
    assert told == ["not used, with the number of records that hold it: message field x (2)"]


def test_what_is_prepared(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    raw = source(tmp_path / "raw", text(20), valid=text(3, seed=1))
    index = prepare(raw, tmp_path / "out", OPTIONS, processes=1)
    assert index == Index.read(tmp_path / "out")
    assert [s.name for s in index.splits["train"]] == [f"train-00000{n}.tar" for n in range(3)]
    words = sum(len(line.split()) for line in text(20))
    assert sum(s.tokens for s in index.splits["train"]) == words
    assert sum(s.samples for s in index.splits["train"]) == sum(1 + (len(line.split()) > 8) for line in text(20))
    assert (index.kind, index.vocab_size, index.special, index.tokenizer) == ("text", 1000, {"eos": 0}, "tokenizer")
    assert index.made_from["records"] == {"train": 20, "valid": 3}
    shards = {
        f"{name}.{end}" for name in ("train-000000", "train-000001", "train-000002") for end in ("tar", "idx.npy")
    }
    shards |= {"valid-000000.tar", "valid-000000.idx.npy"}
    assert set(content(tmp_path / "out")) == {"index.json", "job.json", "tokenizer/tokenizer.json", *shards}
    assert [line.split(":")[0] for line in logged.messages] == ["train", "valid"]


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    train = text(60)
    train[5] = train[33] = ""
    train[34] = "unreadable"
    raw = source(tmp_path / "raw", train, valid=text(9, seed=1))
    options = PrepareOptions(shard_samples=7, on_error="skip")
    for processes in (1, 2):
        prepare(raw, tmp_path / str(processes), options, processes=processes, progress=False)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert Index.read(tmp_path / "1").skipped == {"empty document": 2, "unreadable": 1}


def test_what_is_one_shard_is_made_without_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting one takes seconds, and a corpus for a first try is small. What fails is told as ever."""
    monkeypatch.setattr(workers.Workers, "_spawn", lambda self: pytest.fail("a process is started"))
    raw = source(tmp_path / "raw", text(7))
    for processes in (1, 2):
        prepare(raw, tmp_path / str(processes), OPTIONS, processes=processes, progress=False)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    with pytest.raises(InputError, match="train.txt:1: empty document"):
        prepare(source(tmp_path / "bad", [""]), tmp_path / "out", OPTIONS, processes=2, progress=False)


def test_workers_are_started_with_tcmalloc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed. It is a tokenizer's largest cost, and this process keeps its own malloc and variables."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    if not allocator.to_preload():
        pytest.skip("tcmalloc is not installed")
    mapped: list[str] = []
    send = workers.Workers._collect

    def look(self: workers.Workers, timeout: float | None) -> None:
        mapped.extend(Path(f"/proc/{process.pid}/maps").read_text() for process, _ in self._started)
        send(self, timeout)

    monkeypatch.setattr(workers.Workers, "_collect", look)
    raw = source(tmp_path / "raw", text(30))
    prepare(raw, tmp_path / "out", OPTIONS, processes=2, progress=False)
    assert mapped and "/libtcmalloc" in mapped[-1] and "LD_PRELOAD" not in os.environ


def test_one_process_leaves_much_work_to_a_worker_with_tcmalloc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed, and the process has it not itself; without it no process is started."""
    raw = source(tmp_path / "raw", text(60))
    spawn, began = workers.Workers._spawn, []

    def start(self: workers.Workers) -> Any:
        began.append(len(list(self._make.folder.glob("train-*.tar"))))
        return spawn(self)

    monkeypatch.setattr(workers.Workers, "_spawn", start)
    monkeypatch.setattr(workers, "WORTH_A_WORKER", 600)
    monkeypatch.setattr(allocator, "in_use", lambda: "system")
    for name, preload in (("without", {}), ("with", {"HOME": str(tmp_path)})):  # of any value: what is started gets it
        monkeypatch.setattr(allocator, "to_preload", lambda preload=preload: preload)
        prepare(raw, tmp_path / name, OPTIONS, processes=1, progress=False)
        assert len(began) == (name == "with")
    assert content(tmp_path / "with") == content(tmp_path / "without")
    assert 0 < began[0] < len(list((tmp_path / "with").glob("*.tar"))), "after some blocks were made here"


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Every file appears by os.replace: the process ends there without another word, then starts again. No more than
    one shard is made twice."""
    log = tmp_path / "log"
    raw = source(tmp_path / "raw", [*text(20), ""], valid=text(3, seed=1))
    options = PrepareOptions(shard_samples=7, on_error="skip")
    prepare(raw, tmp_path / "undisturbed", options, processes=1, progress=False)
    replace = os.replace
    for moment in itertools.count():
        out, count = tmp_path / f"{moment}", itertools.count()

        def dying(a: Any, b: Any, moment: int = moment, count: Any = count) -> None:
            now = next(count) == moment
            if now and when == "before":
                os._exit(9)
            replace(a, b)
            if now:
                os._exit(9)

        def work(out: Path = out, dying: Any = dying) -> None:
            monkeypatch.setattr(os, "replace", dying)
            prepare(raw, out, options, processes=1, progress=False)

        monkeypatch.setenv("LINES_LOG", str(log))
        status = os.waitpid(in_child(work), 0)[1]
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9
        prepare(raw, out, options, processes=1, progress=False)
        assert content(out) == content(tmp_path / "undisturbed"), moment
        assert len(log.read_text().split()) <= 24 + 7
        log.unlink()
    assert moment == 1 + 4 * 3 + 2  # job; index, tar and record of four shards; tokenizer, index


def test_finished_shards_stay_unless_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    train = text(35)
    raw, out, log = source(tmp_path / "raw", [*train, ""]), tmp_path / "out", tmp_path / "log"
    with pytest.raises(InputError, match=r"train.txt:36: empty document; fix it, or .* on_error=skip"):
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    assert (len(list(out.glob("*.done.json"))), list(out.glob("*.partial"))) == (5, [])
    (out / "train-000001.tar").write_bytes(b"x" * (out / "train-000001.tar").stat().st_size)
    (out / "train-000003.idx.npy").write_bytes(b"short")
    (out / "train-000004.done.json").write_bytes(b"{")
    (out / "train-000009.tar.partial").write_bytes(b"litter")
    monkeypatch.setenv("LINES_LOG", str(log))
    skip = PrepareOptions(shard_samples=7, on_error="skip")
    logged.clear()
    prepare(raw, out, skip, processes=1)
    again = [1 + n for block in (1, 3, 4, 5) for n in range(7 * block, min(7 * block + 7, 36))]
    assert log.read_text().split() == [f"train.txt:{n}" for n in again]
    assert "continues where it was stopped" in logged.messages[0]
    assert "36 records, 14 of them were there already" in logged.messages[1]
    prepare(raw, tmp_path / "undisturbed", skip, processes=1, progress=False)
    assert content(out) == content(tmp_path / "undisturbed")


def test_killed_with_all_its_processes_and_then_alone(tmp_path: Path) -> None:
    """First among quick shards, then when only those are left that take hours: no orphan goes on with them."""
    raw = source(tmp_path / "raw", [*text(7 * 8), *["slow"] * 14])
    prepare(raw, tmp_path / "undisturbed", OPTIONS, processes=1, progress=False)
    out = tmp_path / "out"
    args = (str(raw), "--out", str(out), "--shard-samples", "7", "--processes", "2")
    for shards, group in ((2, True), (8, False)):
        command = Command(tmp_path, *args, delay="0.01")
        until(lambda shards=shards: finished(out) >= shards)
        kill(command, group)
        assert not (out / "index.json").exists()
    assert finished(out) == 8
    code, stdout, stderr = Command(tmp_path, *args[:-1], "1").end()
    assert code == 0 and "INFO" not in stdout
    goes_on, done = stderr.splitlines()
    assert "INFO" in goes_on and "continues where it was stopped" in goes_on
    assert "of them were there already" in done
    assert content(out) == content(tmp_path / "undisturbed")


@pytest.mark.matrix
def test_killed_at_random_moments(tmp_path: Path) -> None:
    raw, out, rng = source(tmp_path / "raw", text(300)), tmp_path / "out", random.Random(0)
    prepare(raw, tmp_path / "undisturbed", OPTIONS, processes=1, progress=False)
    args = (str(raw), "--out", str(out), "--shard-samples", "7", "--processes", "2")
    for _ in range(4):
        command, there = Command(tmp_path, *args, delay="0.01"), finished(out)
        until(lambda there=there: finished(out) > there)
        time.sleep(rng.random() * 0.15)
        kill(command, group=True)
    assert Command(tmp_path, *args[:-1], "1", "-q").end()[::2] == (0, "")
    assert content(out) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_one_line(tmp_path: Path, number: signal.Signals, code: int) -> None:
    raw, out = source(tmp_path / "raw", [*text(20), *["slow"] * 100]), tmp_path / "out"
    command = Command(tmp_path, str(raw), "--out", str(out), "--shard-samples", "7", "--processes", "2", delay="0.01")
    until(lambda: finished(out) > 1)
    os.killpg(command.pid, number)
    ended, _, stderr = command.end()
    assert ended == code
    goes_on = "what is finished stays: start the same command again to go on"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d WARNING stopped by {number.name}; {goes_on}\n", stderr)
    assert not list(out.glob("*.partial")) and not (out / "job.lock").exists()


def test_another_job_is_refused(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    raw, out = source(tmp_path / "raw", text(20)), tmp_path / "out"
    index = prepare(raw, out, OPTIONS, processes=1, progress=False)
    before = content(out)
    logged.clear()
    assert prepare(raw, out, OPTIONS, processes=1) == index
    assert logged.messages == [f"{out}: is prepared already, nothing to do"]
    other = PrepareOptions(shard_samples=8, tokenizer="gpt2")
    with pytest.raises(InputError, match=r"holds another preparation \(differs in shard_samples, tokenizer\); remove"):
        prepare(raw, out, other, processes=1, progress=False)
    source(raw, text(21))
    with pytest.raises(InputError, match=r"holds another preparation \(differs in source\)"):
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    assert content(out) == before
    skip = PrepareOptions(shard_samples=7, on_error="skip")
    prepare(raw, tmp_path / "skip", skip, processes=1, progress=False)
    with pytest.raises(InputError, match=r"differs in on_error"):
        prepare(raw, tmp_path / "skip", OPTIONS, processes=1, progress=False)


def test_a_shard_lost_since_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, out = source(tmp_path / "raw", text(20)), tmp_path / "out"
    prepare(raw, out, OPTIONS, processes=1, progress=False)
    before = content(out)
    (out / "train-000001.tar").unlink()
    prepare(raw, out, OPTIONS, processes=1)
    assert "made again" in caplog.messages[0]
    assert content(out) == before


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    raw, out = source(tmp_path / "raw", text(20)), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not empty and was not made by this command"):
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    assert list(content(out)) == ["thesis.tex"]
    with pytest.raises(InputError, match="lies in the source"):
        prepare(raw, raw / "shards", OPTIONS, processes=1, progress=False)
    assert not (raw / "shards").exists()
    with pytest.raises(InputError, match=r"thesis.tex: .*exists"):
        prepare(raw, out / "thesis.tex", OPTIONS, processes=1, progress=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_names_the_first_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """The first in the order of the records, though a later one is found earlier."""
    monkeypatch.setenv("LINES_DELAY", "0.01")
    train = text(40)
    train[13], train[14], train[30] = "unreadable", "", "break"
    raw = source(tmp_path / "raw", train)
    with pytest.raises(InputError) as caught:
        prepare(raw, tmp_path / "out", OPTIONS, processes=processes, progress=False)
    assert str(caught.value) == "train.txt:14: unreadable: it says so; fix it, or leave it out with on_error=skip"
    assert (tmp_path / "out" / "train-000000.tar").exists()
    if processes == 1:
        with pytest.raises(InputError, match="^train.txt:31: the file breaks off$"):
            prepare(raw, tmp_path / "out", PrepareOptions(shard_samples=7, on_error="skip"), 1, progress=False)
    assert not list((tmp_path / "out").glob("*.partial"))


def test_skipped_records_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = text(30)
    train[7:14] = [""] * 7  # the whole second block
    train[20] = "unreadable"
    raw = source(tmp_path / "raw", train, valid=["", ""])
    skip = PrepareOptions(shard_samples=7, on_error="skip")
    index = prepare(raw, tmp_path / "out", skip, processes=1)
    assert index.skipped == {"empty document": 9, "unreadable": 1}
    assert index.made_from["skipped"] == {
        "empty document": ["train.txt:8", "train.txt:9", "train.txt:10"],
        "unreadable": ["train.txt:21: it says so"],
    }
    assert [s.name for s in index.splits["train"]] == [f"train-00000{n}.tar" for n in (0, 2, 3, 4)]
    assert list(index.splits) == ["train"]
    assert caplog.messages == ["valid: holds no samples, it is left out"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    skip = PrepareOptions(on_error="skip")
    raw = source(tmp_path / "raw", ["", "unreadable", ""], valid=text(3))
    with pytest.raises(InputError, match="nothing to train on: 3 records skipped: 2 empty document, 1 unreadable"):
        prepare(raw, tmp_path / "out", skip, processes=1, progress=False)
    with pytest.raises(InputError, match="nothing to train on: it holds no records"):
        prepare(source(tmp_path / "none", []), tmp_path / "out2", skip, processes=1, progress=False)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = source(tmp_path / "raw", text(10), valid=text(3))
    monkeypatch.setattr(job, "_split_done", lambda *about: str(source(raw, ["other"])))  # after each split
    with pytest.raises(InputError, match="has changed while it was being prepared"):
        prepare(raw, tmp_path / "out", OPTIONS, 1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out = source(tmp_path / "raw", text(30)), tmp_path / "out"
    fsync, count = os.fsync, itertools.count()

    def full(file: int) -> None:
        if next(count) == 7:  # job and its folder; tar of the first shard; its index, its record; tar of the second
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"train-000001.tar: No space left on device; correct this and start again"
    ) as caught:
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    assert "\n" not in str(caught.value)
    assert not list(out.glob("*.partial"))
    assert (out / "train-000000.done.json").exists()
    monkeypatch.setattr(os, "fsync", fsync)
    prepare(raw, out, OPTIONS, processes=1, progress=False)


def test_one_job_at_a_time_in_a_folder(tmp_path: Path) -> None:
    raw, out = source(tmp_path / "raw", text(30)), tmp_path / "out"
    ready, go = os.pipe()
    end, open_as_long_as_we_live = os.pipe()

    def hold() -> None:
        os.close(open_as_long_as_we_live)
        with job.locked(out / "job.lock", wait=0):
            os.write(go, b"x")
            os.read(end, 1)

    out.mkdir()
    pid = in_child(hold)
    os.read(ready, 1)
    with pytest.raises(InputError, match=rf"is in use by process {pid} on .*; wait for it"):
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    prepare(raw, out, OPTIONS, processes=1, progress=False)
    assert not (out / "job.lock").exists()


@pytest.mark.parametrize("dies", [False, True])
def test_prepared_does_the_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    raw, cache, log = source(tmp_path / "raw", text(28)), tmp_path / "cache", tmp_path / "log"
    monkeypatch.setenv("LINES_LOG", str(log))
    monkeypatch.setenv("LINES_DELAY", "0.01")

    def dying(a: Any, b: Any, count: Any = itertools.count(), replace: Any = os.replace) -> None:  # noqa: B008
        if next(count) == 8:  # in its third shard
            os._exit(9)
        replace(a, b)

    def work(monkey: bool) -> None:
        if monkey:
            monkeypatch.setattr(os, "replace", dying)
        assert Index.read(prepared(raw, OPTIONS, cache, processes=1)).splits["train"]

    pids = [in_child(lambda: work(dies))]
    until(log.exists)
    pids += [in_child(lambda: work(False)) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [9 if dies else 0, 0, 0, 0]
    seen = log.read_text().split()
    assert len(set(seen)) == 28
    assert len(seen) == (28 + 7 if dies else 28)  # the third block was lost
    folder = prepared(raw, OPTIONS, cache, processes=1)
    assert len(log.read_text().split()) == len(seen)
    assert folder.parent == cache / "prepared" and len(folder.name) == 32
    prepare(raw, tmp_path / "undisturbed", OPTIONS, processes=1, progress=False)
    assert content(folder) == content(tmp_path / "undisturbed")


def test_prepared_tells_other_data_apart(tmp_path: Path) -> None:
    raw, cache = source(tmp_path / "raw", text(10)), tmp_path / "cache"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "tokenizer.json").write_text("{}")
    folders = [prepared(raw, options, cache, 1) for options in (OPTIONS, PrepareOptions(shard_samples=8))]
    local = PrepareOptions(tokenizer=str(mine))
    folders.append(prepared(raw, local, cache, 1))
    assert prepared(raw, local, cache, 1) == folders[-1]
    (mine / "tokenizer.json").write_text('{"changed": 1}')
    folders.append(prepared(raw, local, cache, 1))
    folders.append(prepared(source(raw, text(11)), OPTIONS, cache, 1))
    assert len(set(folders)) == 5
    assert len(list((cache / "prepared").iterdir())) == 5


def test_blocks_are_bounded_in_records_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    values = ["x" * 40, "x" * 40, "x" * 20, "x" * 300, "y", {"key": ["z" * 60]}, np.zeros(4, np.int64), "w", "w", "w"]
    records: list[Record | BadRecord] = [Record(str(n), value) for n, value in enumerate(values)]
    records.append(BadRecord("10", "unreadable"))
    cut = list(blocks.cut(records, "train", 4))
    assert [(b.number, b.first, len(b.records)) for b in cut] == [(0, 0, 3), (1, 3, 1), (2, 4, 3), (3, 7, 4)]
    assert cut[3].shard == "train-000003.tar"
    assert [r for b in cut for r in b.records] == records


def test_few_blocks_are_held_and_killed_workers_are_told(tmp_path: Path) -> None:
    """The reader is never further ahead of the shards than the bound says."""
    raw, out = source(tmp_path / "raw", text(300)), tmp_path / "out"
    read = told = most = 0

    def counted() -> Any:
        nonlocal read, most
        for block in blocks.cut(lines.LineReader(raw).records("train"), "train", 10):
            read += 1
            most = max(most, read - finished(out))
            yield block

    out.mkdir()
    maker = blocks.ShardMaker(out, lines.WordEncoder(delay=0.002), "stop")
    before = set(children(os.getpid()))
    with pytest.raises(InputError, match="a worker process was killed from outside"), workers.Workers(maker, 2) as pool:
        for _ in pool.finish(counted()):
            told += 1
            if told == 20:  # both: one that is idle need not get any of the other ten blocks
                servers = [p.pid for p in multiprocessing.active_children() if p.name.startswith("prepare-")]
                assert len(servers) == 2 and not set(servers) & before
                for server in servers:
                    os.kill(server, signal.SIGKILL)
    assert 20 <= told < 30
    # the one just read, and the others that are not finished; a shard may be finished before the one ahead of it
    assert 2 < most <= 2 * workers.BLOCKS_PER_PROCESS
    assert not any(map(alive, servers))


def test_the_record_of_a_shard_is_written_after_it(tmp_path: Path) -> None:
    raw, out = source(tmp_path / "raw", [*text(7), ""]), tmp_path / "out"
    with pytest.raises(InputError):
        prepare(raw, out, OPTIONS, processes=1, progress=False)
    done, shard = out / "train-000000.done.json", out / "train-000000.tar"
    assert done.stat().st_mtime_ns >= shard.stat().st_mtime_ns
    assert json.loads(done.read_text())["shard"]["sha256"] == sha256_of(shard)


@pytest.mark.parametrize("how", ["file", pytest.param("stdin", marks=pytest.mark.matrix)])
def test_a_script_without_a_guard_can_prepare(tmp_path: Path, how: str) -> None:
    """Spawned workers would run it again, from its first line."""
    np.save(tmp_path / "shard_0.npy", np.full((20, 3), 5, dtype=np.int32))
    facts = {"vocab_size": 9, "max_seq_len": 3, "eos_id": 0, "pad_id": 1, "mask_id": 2}
    (tmp_path / "metadata.json").write_text(json.dumps(facts))
    script = (
        "from jepa_scale.data.prepare.base import PrepareOptions\n"
        "from jepa_scale.data.prepare.job import prepare\n"
        f"index = prepare({str(tmp_path)!r}, {str(tmp_path) + '_out'!r}, PrepareOptions(shard_samples=10), 2, False)\n"
        "print(sum(shard.samples for shard in index.splits['train']))\n"
    )
    file = tmp_path / "script.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, str(file) if how == "file" else "-"],
        input=script,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "20\n", done.stderr
