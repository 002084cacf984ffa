import os
import signal

import pytest

from jepa_scale.telemetry import locked_run_dir, prepare_run_dir, run_dir
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import NoLocks
from tests.forked import in_child


@pytest.mark.parametrize("leftover", ["metrics.jsonl", "summary.json", "checkpoints/step_00000010"])
def test_a_used_run_directory_is_refused_unless_resumed(tmp_path, leftover):
    run = tmp_path / "runs" / "first"
    prepare_run_dir(run, resume=False)
    (run / leftover).parent.mkdir(exist_ok=True)
    (run / leftover).write_text("precious")
    with pytest.raises(InputError) as caught:
        prepare_run_dir(run, resume=False)
    message = str(caught.value)
    assert "\n" not in message
    assert str(run) in message and "--resume auto" in message and "run.name" in message
    prepare_run_dir(run, resume=True)
    assert (run / leftover).read_text() == "precious"


def test_a_directory_without_a_run_in_it_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()  # empty
    prepare_run_dir(tmp_path, resume=False)
    prepare_run_dir(tmp_path / "not" / "there" / "yet", resume=True)
    assert (tmp_path / "not" / "there" / "yet").is_dir()


def test_a_file_in_the_way_is_an_input_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run.dir"):
        prepare_run_dir(tmp_path / "run", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_where_no_checkpoint_could_be_saved_nothing_is_trained(tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")  # as a wrong mount leaves it
    with pytest.raises(
        InputError, match=r"^run\.dir: cannot use .*run' as a run directory: .*checkpoints: File exists"
    ):
        prepare_run_dir(tmp_path / "run", resume=resume)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not apply to root")
def test_a_directory_without_permission_is_refused(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        prepare_run_dir(tmp_path / "run", resume=False)


def test_two_processes_do_not_train_in_one_directory(tmp_path, monkeypatch, caplog):
    """A job was queued again while its first process still runs; then that one is killed."""
    monkeypatch.setattr(run_dir, "WAIT", 0.0)
    ready, holds = os.pipe()

    def train() -> None:
        with locked_run_dir(tmp_path / "run", resume=False):
            os.write(holds, b"x")
            signal.pause()

    pid = in_child(train)
    try:
        os.read(ready, 1)
        refused = pytest.raises(
            InputError, match=rf"run: is in use by process {pid} on .*, since .*, or another run.name"
        )
        with refused, locked_run_dir(tmp_path / "run", resume=True):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with locked_run_dir(tmp_path / "run", resume=True):
        assert f"was in use by process {pid} on " in caplog.messages[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(path, wait):
        raise NoLocks("none")

    monkeypatch.setattr(run_dir, "locked", none)
    with locked_run_dir(tmp_path / "run", resume=False):
        assert "has no locks" in caplog.messages[0]


def test_a_run_that_is_refused_leaves_no_directory(tmp_path):
    new, there = tmp_path / "new", tmp_path / "there"
    there.mkdir()
    for folder in (new, there):
        with pytest.raises(InputError, match="data.path"), locked_run_dir(folder, resume=False):
            raise InputError("data.path: no such file")
    assert not new.exists() and there.is_dir()
    with pytest.raises(FloatingPointError), locked_run_dir(new, resume=False):
        (new / "metrics.jsonl").touch()
        raise FloatingPointError
    assert (new / "metrics.jsonl").is_file()
