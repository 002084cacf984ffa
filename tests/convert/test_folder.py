"""A conversion that is killed, at whatever moment, and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from jepa_scale.checkpoint import Manifest
from jepa_scale.convert import tensor_file
from jepa_scale.convert.folder import JOURNAL, Folder, Journal, read_journal
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import JOB_LOCK, locked
from tests.convert.runs import MODELS, NATIVE, make_run, write_checkpoint

HEADS = {"name": "horizon", "tap_layer": 1, "horizons": [1, 2], "horizon_probs": [1, 1]}
OPTIONS = ExportOptions(progress=False, shard_bytes=80_000, heads=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    make_run(root, "run", MODELS["native_tied"], objective=HEADS)
    export(root / "run", root / "undisturbed", OPTIONS)
    return root


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def dies_at(number: int, run: Path, out: Path) -> None:
    """Convert, and be killed before the number-th thing that the disk gets to see."""
    left = [number]
    replace, fsync = os.replace, os.fsync

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(source, target):
        count()
        replace(source, target)

    def counted_fsync(descriptor):
        count()
        fsync(descriptor)

    os.replace, os.fsync = counted_replace, counted_fsync
    export(run, out, OPTIONS)


def converts(run: Path, out: Path) -> None:
    export(run, out, OPTIONS)


@pytest.fixture(scope="module")
def processes():
    """Real processes that have the slow imports behind them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jepa_scale.convert.to_hf", "tests.convert.test_folder"])
    return context


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(run, processes, tmp_path):
    """Before every third write to the disk; the next test meets others."""
    expected = contents(run / "undisturbed")
    assert len([n for n in expected if n.startswith("model-")]) >= 2 and "jepa_heads.safetensors" in expected
    kept = set()
    for number in range(0, 200, 3):
        out = tmp_path / str(number)
        process = processes.Process(target=dies_at, args=(number, run / "run", out))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kept.add(export(run / "run", out, OPTIONS).kept)
        assert contents(out) == expected
    assert number > 20 and kept == {0, 1, 2, 3}  # files that were finished before


def test_killed_again_and_again(run, processes, tmp_path):
    """Each start gets three writes further than the last one did."""
    for number in range(0, 600, 3):
        process = processes.Process(target=dies_at, args=(number, run / "run", tmp_path / "out"))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            break
    assert number > 15
    assert contents(tmp_path / "out") == contents(run / "undisturbed")


@pytest.mark.matrix
def test_killed_at_random_times(run, processes, tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        process = processes.Process(target=converts, args=(run / "run", tmp_path / "out"))
        process.start()
        time.sleep(rng.uniform(0.02, 0.25))
        process.kill()
        process.join(300)
    export(run / "run", tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == contents(run / "undisturbed")


def test_finished_files_are_not_written_again_unless_they_changed(run, tmp_path):
    out = tmp_path / "out"
    made = export(run / "run", out, OPTIONS)
    assert made.kept == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    again = export(run / "run", out, OPTIONS)
    assert again.kept == len(before) == 3
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == before
    shards = sorted(out.glob("model-0*"))
    raw = bytearray(shards[0].read_bytes())
    raw[-1] ^= 1
    shards[0].write_bytes(raw)
    shards[1].unlink()
    assert export(run / "run", out, OPTIONS).kept == len(before) - 2
    assert contents(out) == contents(run / "undisturbed")


def test_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds something else \(notes.txt\)"):
        export(run / "run", tmp_path, OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="is a file"):
        export(run / "run", tmp_path / "notes.txt", OPTIONS)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / JOURNAL).write_text("{")
    with pytest.raises(InputError, match=r"conversion.json: cannot be read.*remove the folder"):
        export(run / "run", tmp_path / "damaged", OPTIONS)
    (tmp_path / "damaged" / JOURNAL).write_text('{"format": 99}')
    with pytest.raises(InputError, match="another version of jepa_scale"):
        export(run / "run", tmp_path / "damaged", OPTIONS)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"shard_bytes": 40_000}, {"heads": False}])
def test_other_options_need_another_folder(run, tmp_path, change):
    out = tmp_path / "out"
    export(run / "run", out, OPTIONS)
    before = contents(out)
    (name, value), *_ = change.items()
    options = ExportOptions(**{"progress": False, "shard_bytes": 80_000, "heads": True, **change})
    with pytest.raises(InputError, match=rf"holds another conversion \(of step_00000007.*this one .*{name}={value}"):
        export(run / "run", out, options)
    assert contents(out) == before


def test_begun_with_one_checkpoint_it_goes_on_with_it_while_training_makes_others(tmp_path):
    module = make_run(tmp_path, "run", NATIVE, step=3)
    out = tmp_path / "out"
    export(tmp_path / "run", out, OPTIONS)
    expected = contents(out)
    journal = json.loads((out / JOURNAL).read_text())
    gone = sorted(out.glob("model-*"))[-1].name
    (out / gone).unlink()
    del journal["files"][gone]
    (out / JOURNAL).write_text(json.dumps({**journal, "complete": False}))
    later = {f"model/{n}": p.detach() + 1 for n, p in module.named_parameters()}
    write_checkpoint(tmp_path / "run", 9, later)
    assert export(tmp_path / "run", out, OPTIONS).checkpoint.name == "step_00000003"
    assert contents(out) == expected
    assert export(tmp_path / "run", tmp_path / "new", OPTIONS).checkpoint.name == "step_00000009"
    (tmp_path / "run" / "checkpoints" / "step_00000003").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"is a conversion of step_00000003, which .*run no longer has"):
        export(tmp_path / "run", out, OPTIONS)
    assert Manifest.read(tmp_path / "elsewhere").step == 3


def test_two_at_once_are_refused(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out / JOB_LOCK), pytest.raises(InputError, match=r"by process \d+"):
        export(run / "run", out, OPTIONS)
    export(run / "run", out, OPTIONS)
    assert contents(out) == contents(run / "undisturbed")


def test_full_disk_leaves_what_is_finished(run, tmp_path, monkeypatch):
    """A write that fails ends the conversion; the next start goes on."""
    out = tmp_path / "out"
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 8:
            raise OSError(28, "No space left on device", str(out / "model-00002"))
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(tensor_file.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            export(run / "run", out, OPTIONS)
    journal = read_journal(out)
    assert journal is not None and not journal.complete and journal.files
    export(run / "run", out, OPTIONS)
    assert contents(out) == contents(run / "undisturbed")


def test_journal_lists_every_file_with_its_checksum(run):
    out = run / "undisturbed"
    journal = read_journal(out)
    assert journal is not None and journal.complete and journal.step == 7
    found = contents(out)
    assert journal.files.keys() == found.keys() - {JOURNAL}
    assert all(told["bytes"] == len(found[name]) for name, told in journal.files.items())


def test_files_below_it_are_kept_and_a_missing_one_makes_it_incomplete(tmp_path):
    begun = Folder(tmp_path, Journal("x", "step_1", 1, "plan"))
    begun.put("templates/a.jinja", "one")
    begun.put("templates/b.jinja", "two")
    begun.finish()
    again = Folder(tmp_path, Journal("y", "step_1", 1, "plan"))
    assert again.kept == {"templates/a.jinja", "templates/b.jinja"} and again.journal.complete
    assert again.journal.made_by == "y"
    (tmp_path / "templates" / "b.jinja").unlink()
    assert Folder(tmp_path, Journal("y", "step_1", 1, "plan")).kept == {"templates/a.jinja"}
    found = read_journal(tmp_path)
    assert found is not None and not found.complete
