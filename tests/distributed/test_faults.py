"""Full disks, lost permissions, losses that are not finite, damaged and hostile checkpoints, in whole runs."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jepa_scale.checkpoint import Manifest, verify
from jepa_scale.checkpoint.store import describe
from tests.distributed.faults import path_through
from tests.distributed.processes import Fault, Gate, ProcessPool, until
from tests.distributed.small_runs import (
    assert_same,
    check_checkpoints,
    checkpoint,
    last_step,
    newest,
    rows,
    tensors,
)
from tests.distributed.test_runs import config_file

STEPS = 32
"""Number of steps, with a save every fourth one: some saves fail, then two succeed. The newest two are kept."""
IMPATIENT = {"name": "impatient"}
NO_SPACE = "No space left on device"


@pytest.fixture(scope="module")
def undisturbed(process_pool, tmp_path_factory):
    """Folder of a run without faults: two ranks of FSDP2."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_file(folder, "lm", "fsdp", name="run", steps=STEPS, batch_size=4)
    process_pool.run(["--config", str(config)], 2)
    return folder


def config_of(undisturbed: Path, folder: Path, *more: str) -> list[str]:
    return ["--config", str(undisturbed / "run.yaml"), f"run.dir={folder}", "checkpoint.every=4", *more]


def gates(folder: Path, *steps: int) -> tuple[list[Gate], list[Fault]]:
    """Create gates of rank 0 in the forward of these steps.

    At each gate the asynchronous save before the last one is complete, or its failure is reported.
    """
    made = [Gate(folder / f"step_{step}") for step in steps]
    faults = [
        {"name": "holds_in_step", "who": 0, "step": step, "gate": str(gate.path)}
        for step, gate in zip(steps, made, strict=True)
    ]
    return made, faults


def not_saved(text: str) -> list[str]:
    return [line for line in text.splitlines() if "was not saved" in line]


MOUNT = ["sh", "-c", 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"']


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[ProcessPool, Path, Path]]:
    """A ``ProcessPool`` whose ranks have a file system of 4 MB; its path for the ranks, and its path for the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ["unshare", "--mount", "--map-root-user", *MOUNT, str(disk)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets no test mount a file system")
    process_pool = ProcessPool(tmp_path, prefix)
    yield process_pool, disk, path_through(process_pool.process.pid, disk)
    process_pool.close()


def is_saved(folder: Path, step: int) -> bool:
    """Whether a save has come to its end, which is to name the checkpoint in ``latest``; the checkpoint itself is there before."""
    latest = folder / "checkpoints" / "latest"
    return latest.exists() and latest.read_text() == f"step_{step:08d}"


@pytest.mark.matrix
def test_a_full_disk_costs_checkpoints_and_nothing_else(small_disk, undisturbed, tmp_path):
    """The whole run directory is on the full disk, so rows of metrics.jsonl wait for space, too."""
    process_pool, disk, seen = small_disk
    (filled, freed), held = gates(tmp_path, 5, 25)
    run = process_pool.start(config_of(undisturbed, disk), 2, [*held, IMPATIENT])
    folder = seen / "run"
    filled.reached(run)
    until(lambda: is_saved(folder, 4), "checkpoint")
    with open(seen / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(1 << 12))
        except OSError:
            pass
    filled.open()
    freed.reached(run)
    assert len(not_saved(run.output(0))) >= 4
    check_checkpoints(folder)
    assert newest(folder) == 4
    assert last_step(folder) < 24, "there was room for all rows: the test shows nothing"
    (seen / "ballast").unlink()
    freed.open()
    assert run.wait() == [0, 0], run.output()
    told = not_saved(run.output(0))
    assert all(f"the disk is full: {NO_SPACE}" in line for line in told), told
    assert len(told) == len(set(told)), "each is told of once"
    assert newest(folder) == STEPS
    check_checkpoints(folder)
    assert_same(folder, undisturbed / "run", STEPS)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest", f"step_{STEPS - 4:08d}", f"step_{STEPS:08d}"]


@pytest.mark.parametrize("before", ["tensors", pytest.param("generators", marks=pytest.mark.matrix)])
def test_no_room_for_one_of_the_files(process_pool, undisturbed, tmp_path, before):
    """Limit rank 1's files during all three tries of the save of step 4, and during one try of that of step 8."""
    limit = {"name": "no_room", "who": 1, "before": before, "tries": 4}
    run = process_pool.run(config_of(undisturbed, tmp_path), 2, [limit, IMPATIENT])
    (line,) = not_saved(run.output())
    assert "the checkpoint of step 4 was not saved" in line and "File too large" in line
    check_checkpoints(tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed / "run", STEPS)


def test_a_last_save_that_fails_is_the_failure_of_the_run(process_pool, undisturbed, tmp_path):
    """Rank 1 finds no room, at no try of any save."""
    limit = {"name": "no_room", "who": 1, "before": "tensors", "tries": 1000}
    run = process_pool.start(config_of(undisturbed, tmp_path, "checkpoint.every=0"), 2, [limit, IMPATIENT])
    assert run.wait() == [1, 1], run.output()
    assert f"the state after step {STEPS} is lost" in run.output(0) and "File too large" in run.output(0)
    assert "the run has no checkpoint" in run.output(0)
    assert "Traceback" not in run.output() and "unexpected pos" not in run.output()


def test_a_stopped_run_that_cannot_save_does_not_say_that_it_goes_on(process_pool, undisturbed, tmp_path):
    """The folder of the checkpoints goes, after step 4 is saved there, and then a signal comes."""
    (gate,), held = gates(tmp_path, 7)
    run = process_pool.start(config_of(undisturbed, tmp_path), 2, [*held, IMPATIENT])
    gate.reached(run)
    folder = tmp_path / "run"
    until(lambda: is_saved(folder, 4), "checkpoint")
    (folder / "checkpoints").rename(tmp_path / "away")
    (folder / "checkpoints").write_text("in the way")
    run.send(1, signal.SIGTERM)
    gate.open()
    assert run.wait() == [1, 1], run.output()
    assert "the state after step 8 is lost" in run.output(0) and "Not a directory" in run.output(0)
    assert "stopped by" not in run.output() and "Traceback" not in run.output()
    (folder / "checkpoints").unlink()
    (tmp_path / "away").rename(folder / "checkpoints")
    process_pool.run(config_of(undisturbed, tmp_path, "--resume", "auto"), 2)
    assert_same(folder, undisturbed / "run", STEPS)


def test_permission_lost_and_then_the_folder(process_pool, undisturbed, tmp_path):
    (forbidden, allowed, removed, restored), held = gates(tmp_path, 5, 13, 17, 25)
    run = process_pool.start(config_of(undisturbed, tmp_path), 2, [*held, IMPATIENT, {"name": "bound_by_permissions"}])
    folder = tmp_path / "run"
    forbidden.reached(run)
    until(lambda: is_saved(folder, 4), "checkpoint")
    (folder / "checkpoints").chmod(0o555)
    try:
        forbidden.open()
        allowed.reached(run)
        told = not_saved(run.output(0))
        assert "the checkpoint of step 8 was not saved" in told[0] and "Permission denied" in told[0]
        check_checkpoints(folder)
        assert newest(folder) == 4
    finally:
        (folder / "checkpoints").chmod(0o755)
    allowed.open()
    removed.reached(run)
    until(lambda: is_saved(folder, 16), "checkpoint")
    (folder / "checkpoints").rename(tmp_path / "away")
    (folder / "checkpoints").write_text("in the way")
    removed.open()
    restored.reached(run)
    assert "Not a directory" in run.output(0)
    (folder / "checkpoints").unlink()
    (tmp_path / "away").rename(folder / "checkpoints")
    restored.open()
    assert run.wait() == [0, 0], run.output()
    check_checkpoints(folder)
    assert_same(folder, undisturbed / "run", STEPS)


@pytest.mark.parametrize(
    "engine",
    ["fsdp", "zero2", pytest.param("zero1", marks=pytest.mark.matrix), pytest.param("zero3", marks=pytest.mark.matrix)],
)
def test_nan_on_one_rank_is_skipped_on_all(process_pool, tmp_path, engine):
    options = {"steps": 9, "checkpoint": {"every": 1, "keep_last": 20}}
    config = config_file(tmp_path, "lm", engine, name="run", **options)
    run = process_pool.run(["--config", str(config)], 2, [{"name": "nan_loss", "who": 1, "steps": [4, 6, 7]}])
    assert "no finite gradient in step 4; skipped on all ranks" in run.output(0)
    fit = rows(tmp_path / "run", "train")
    assert [row.get("skipped_steps", 0) for row in fit] == [0, 0, 0, 1, 0, 1, 1, 0, 0]
    assert [row["step"] for row in fit if row["loss"] is None] == [4, 6, 7]
    saved = {step: tensors(checkpoint(tmp_path / "run", step)) for step in range(1, 10)}
    for step in range(2, 9):  # in the last one the learning rate is 0
        same = [torch.equal(saved[step][name], saved[step - 1][name]) for name in saved[step]]
        assert all(same) if step in (4, 6, 7) else not any(same), step
        assert all(t.isfinite().all() for t in saved[step].values())
    assert Manifest.read(checkpoint(tmp_path / "run", 9)).updates == 6
    if engine != "zero2":
        return
    # a run that is resumed among them goes on the same
    path = checkpoint(tmp_path / "run", 4)
    again = config_file(tmp_path, "lm", engine, name="again", **options)
    process_pool.run(
        ["--config", str(again), "--resume", str(path)], 2, [{"name": "nan_loss", "who": 1, "steps": [2, 3]}]
    )
    got = tensors(checkpoint(tmp_path / "again", 9))
    assert all(torch.equal(got[name], saved[9][name]) for name in got)


def test_too_many_in_a_row_stop_the_run(process_pool, tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=20, max_skipped_steps=3, checkpoint={"every": 3})
    run = process_pool.start(
        ["--config", str(config)], 2, [{"name": "nan_loss", "who": 1, "steps": list(range(5, 20))}]
    )
    assert run.wait() == [1, 1]
    message = "steps 5 to 8 had no finite gradient, more than train.max_skipped_steps=3 in a row"
    assert message in run.output(0) and message in run.output(1)
    assert newest(tmp_path / "run") in (3, 6)
    check_checkpoints(tmp_path / "run")
    process_pool.run(["--config", str(config), "--resume", "auto", "train.steps=8"], 2)
    assert last_step(tmp_path / "run") == 8


@pytest.fixture(scope="module")
def killed_once(process_pool, undisturbed, tmp_path_factory) -> Path:
    """Folder of a run that was killed in step 9, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    (gate,), held = gates(folder, 9)
    run = process_pool.start(config_of(undisturbed, folder), 2, held)
    gate.reached(run)
    until(lambda: newest(folder / "run") == 8, "checkpoint")
    run.kill()
    run.wait()
    return folder


@pytest.fixture
def killed(undisturbed, killed_once, tmp_path) -> tuple[list[str], Path]:
    """Arguments that resume a copy of that run, and the copy."""
    shutil.copytree(killed_once, tmp_path, dirs_exist_ok=True)
    return config_of(undisturbed, tmp_path), tmp_path / "run"


@pytest.mark.parametrize("file", ["tensors/__1_0.distcp", pytest.param("manifest.json", marks=pytest.mark.matrix)])
def test_a_flipped_byte_in_the_newest_checkpoint(process_pool, killed, undisturbed, file):
    arguments, run = killed
    bad = checkpoint(run, newest(run)) / file
    flip(bad)
    going_on = process_pool.run([*arguments, "--resume", "auto"], 2)
    assert f"{bad}: " in going_on.output(0) and "is damaged and left out" in going_on.output(0)
    assert_same(run, undisturbed / "run", STEPS)


def flip(file: Path) -> None:
    """Damage a file by one bit; in a manifest, change the number of updates, so that it is still valid JSON."""
    raw = bytearray(file.read_bytes())
    at = raw.index(b'"updates": ') + len(b'"updates": ') if file.suffix == ".json" else len(raw) // 2
    raw[at] ^= 1
    file.write_bytes(raw)


def test_all_damaged_is_an_error_and_not_a_new_start(process_pool, killed):
    arguments, run = killed
    before = rows(run)
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "manifest.json").write_text("{")
    refused = process_pool.start([*arguments, "--resume", "auto"], 2)
    assert refused.wait() == [2, 2]
    assert "checkpoints are damaged; restore one, or remove the folder" in refused.output(0)
    assert rows(run) == before


class Harmful:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", ["tensors/.metadata", "tensors/__0_0.distcp", "rng_rank00000.pt"])
def test_a_pickle_that_runs_code_is_refused(process_pool, killed, tmp_path, file):
    """The checksum is correct, because an attacker who can write the checkpoint can also write the manifest."""
    arguments, run = killed
    folder, trace = checkpoint(run, newest(run)), tmp_path / "trace"
    target = folder / file
    if file.endswith(".metadata"):
        target.write_bytes(pickle.dumps(Harmful(trace)))
    else:
        torch.save(Harmful(trace), target)
    manifest = Manifest.read(folder)
    manifest.files[file] = describe([target])[target.name]
    manifest.write(folder)
    assert not verify(folder)
    refused = process_pool.start([*arguments, "--resume", str(folder)], 2)
    codes = refused.wait()
    assert 0 not in codes and not trace.exists(), refused.output()
    (told,) = [line for line in refused.output(0).splitlines() if line.startswith("jepa-scale: ")]
    assert str(folder) in told
    assert codes == [2, 2] and "Traceback" not in refused.output()
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists(), "the pickle is harmless, and the test shows nothing"
