"""Runs that are killed repeatedly by SIGKILL and restarted with ``--resume auto`` end like an undisturbed run."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.processes import Forked, Gate, ProcessPool, until
from tests.distributed.small_runs import assert_same, check_checkpoints, newest
from tests.distributed.test_runs import config_file

MOMENTS = ("training", "writing", "writing", "any time")
EVENTS = 40
"""Approximate number of file operations in two saves."""
FENCE = 8
"""Step after which a run waits to be killed, however long it takes."""


def end(run: Forked) -> None:
    """End a run as a launcher does when a rank has died, but sooner: first by SIGTERM, then by SIGKILL."""
    for rank in range(len(run.pids)):
        run.send(rank, signal.SIGTERM)
    time.sleep(0.2)  # whatever they have done by then
    run.kill()
    run.wait()


def kill_once(
    process_pool: ProcessPool, arguments: list[str], world_size: int, folder: Path, rng: random.Random, how: str
) -> str:
    """Start the run and kill it; return how."""
    who = rng.choice([[0], list(range(world_size)), [world_size - 1]])
    if how == "writing":
        event = rng.randrange(EVENTS)
        run = process_pool.start(arguments, world_size, [{"name": "dies_writing", "who": who, "event": event}])
        until(lambda: run.codes, "death")
        how = f"writing {event}"
    else:
        steps, pause = rng.randrange(1, FENCE), rng.random()
        gates = {step: Gate(folder.parent / f"{how}_{rng.random()}") for step in (steps, FENCE)}
        faults = [
            {"name": "holds_in_step", "who": 0, "step": step, "gate": str(gate.path)} for step, gate in gates.items()
        ]
        run = process_pool.start(arguments, world_size, faults)
        if how == "training":
            gates[steps].reached(run)
        gates[steps].open()
        time.sleep(pause * (0.02 if how == "training" else 0.6))  # any moment will do
        for rank in who:
            run.send(rank, signal.SIGKILL)
    end(run)
    assert -signal.SIGKILL in run.codes.values(), f"{how}: nobody was killed:\n{run.output()}"
    return f"{how}, rank {who}"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("engine", "world_size", "asynchronous", "kills", "steps"),
    [("fsdp", 2, True, 12, 100), ("zero2", 2, False, 3, 30)],
)
def test_a_run_that_is_killed_again_and_again_ends_the_same(
    process_pool, tmp_path, engine, world_size, asynchronous, kills, steps
):
    expected, run = tmp_path / "expected", tmp_path / "run"
    config = str(config_file(tmp_path, "lm", engine, name="run", steps=steps, eval_every=steps // 2, batch_size=4))
    process_pool.run(["--config", config, "run.name=expected"], world_size)  # saves at the end only

    saves = ["checkpoint.every=4", "checkpoint.ephemeral_every=3", f"checkpoint.asynchronous={asynchronous}"]
    arguments = ["--config", config, *saves, "--resume", "auto"]
    rng, before, done = random.Random(f"{engine} {world_size}"), 0, []
    for number in range(kills):
        done.append(kill_once(process_pool, arguments, world_size, run, rng, MOMENTS[number % len(MOMENTS)]))
        check_checkpoints(run)
        assert newest(run) >= before, f"after {done[-1]}"
        before = newest(run)
        assert before < steps, f"there is nothing left to kill: {done}"
    assert before > 0
    process_pool.run(arguments, world_size)
    assert_same(run, expected, steps)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    last_two = [f"step_{step:08d}" for step in range(1, steps + 1) if step % 4 == 0 or step == steps][-2:]
    assert left == ["latest", *last_two], "something was left behind"


def test_a_rank_that_is_killed_as_it_writes(process_pool, tmp_path):
    """The save of step 8 is lost, and the run resumes from that of step 4.

    Warm-up ends at step 3, so the six steps that follow depend on everything that a checkpoint must restore.
    """
    steps, expected, run = 10, tmp_path / "expected", tmp_path / "run"
    config = str(config_file(tmp_path, "lm", "fsdp", name="run", steps=steps, batch_size=4))
    process_pool.run(["--config", config, "run.name=expected"], 2)
    arguments = ["--config", config, "checkpoint.every=4", "--resume", "auto"]
    gate = Gate(tmp_path / "step_5")
    killed = process_pool.start(
        arguments,
        2,
        [
            {"name": "holds_in_step", "who": 0, "step": 5, "gate": str(gate.path)},
            {"name": "dies_writing", "who": [1], "event": 1, "save": 2},
        ],
    )
    gate.reached(killed)
    until(lambda: newest(run) == 4, "checkpoint")
    gate.open()
    until(lambda: killed.codes, "death")
    killed.kill()
    assert killed.wait()[1] == -signal.SIGKILL, killed.output()
    check_checkpoints(run)
    assert newest(run) == 4
    process_pool.run(arguments, 2)
    assert_same(run, expected, steps)


def test_death_before_each_operation_of_a_save_in_turn(process_pool, tmp_path):
    """Kill a process before each operation of a save, one process for each operation.

    This includes the operations between the renaming of the new checkpoint, the writing of ``latest`` and the removal of
    the old checkpoint. Each process resumes from the files that the one before has left.
    """
    steps, every, expected, run = 40, 2, tmp_path / "expected", tmp_path / "run"
    config = str(config_file(tmp_path, "lm", "fsdp", name="run", steps=steps, batch_size=4))
    process_pool.run(["--config", config, "run.name=expected"])
    saves = [f"checkpoint.every={every}", "checkpoint.keep_last=1", "checkpoint.asynchronous=false"]
    arguments = ["--config", config, *saves, "--resume", "auto"]
    before, seen = 0, set()
    for event in itertools.count():
        killed = process_pool.start(arguments, 1, [{"name": "dies_writing", "who": [0], "event": event}])
        assert killed.wait() == [-signal.SIGKILL], killed.output()
        check_checkpoints(run)
        assert newest(run) >= before, event
        if f"step_{before + 2 * every:08d}" in killed.output():
            break  # its first save was over, and it died in the second
        before = newest(run)
        seen |= {path.suffix for path in (run / "checkpoints").glob("*")}
    assert event > 15 and {".partial", ".removed"} <= seen
    process_pool.run(arguments)
    assert_same(run, expected, steps)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step_{steps:08d}"]
