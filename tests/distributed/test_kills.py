"""SIGKILL, again and again: a run that is started with ``--resume auto`` ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.processes import Forked, Nursery, until
from tests.distributed.small_runs import assert_same, check_checkpoints, last_step, newest
from tests.distributed.test_runs import config_file

MOMENTS = ("training", "writing", "writing", "any time")
EVENTS = 40
"""About as many operations on files as there are in two saves."""


def end(run: Forked) -> None:
    """As a launcher does when a rank has died, though with less patience: ask the others to end, then make them."""
    for rank in range(len(run.pids)):
        run.send(rank, signal.SIGTERM)
    time.sleep(0.2)
    run.kill()
    run.wait(10)


def kill_once(
    nursery: Nursery, arguments: list[str], world_size: int, folder: Path, rng: random.Random, how: str
) -> str:
    """Start the run and kill it; how."""
    who = rng.choice([[0], list(range(world_size)), [world_size - 1]])
    if how == "writing":
        event = rng.randrange(EVENTS)
        run = nursery.start(arguments, world_size, [{"name": "dies_writing", "who": who, "event": event}])
        until(lambda: run.codes, 60, "death")
        how = f"writing {event}"
    else:
        run = nursery.start(arguments, world_size)
        if how == "training":
            began, steps = newest(folder), rng.randrange(1, 8)
            until(lambda: run.codes or last_step(folder) >= max(began, 4) + steps, 60, "step")
            time.sleep(rng.random() * 0.02)
        else:
            time.sleep(rng.random() * 0.6)
        for rank in who:
            run.send(rank, signal.SIGKILL)
    end(run)
    assert -signal.SIGKILL in run.codes.values(), f"{how}: nobody was killed:\n{run.output()}"
    return f"{how}, rank {who}"


@pytest.mark.parametrize(
    ("engine", "world_size", "asynchronous", "kills", "steps"),
    [("fsdp", 2, True, 20, 100), ("zero2", 2, False, 3, 30)],
)
def test_a_run_that_is_killed_again_and_again_ends_the_same(
    nursery, tmp_path, engine, world_size, asynchronous, kills, steps
):
    expected, run = tmp_path / "expected", tmp_path / "run"
    config = str(config_file(tmp_path, "lm", engine, name="run", steps=steps, eval_every=steps // 2, batch_size=4))
    nursery.run(["--config", config, "run.name=expected"], world_size)  # saves at the end only

    saves = ["checkpoint.every=4", "checkpoint.ephemeral_every=3", f"checkpoint.asynchronous={asynchronous}"]
    arguments = ["--config", config, *saves, "--resume", "auto"]
    rng, before, done = random.Random(f"{engine} {world_size}"), 0, []
    for number in range(kills):
        done.append(kill_once(nursery, arguments, world_size, run, rng, MOMENTS[number % len(MOMENTS)]))
        check_checkpoints(run)
        assert newest(run) >= before, f"after {done[-1]}"
        before = newest(run)
        assert before < steps, f"there is nothing left to kill: {done}"
    assert before > 0
    nursery.run(arguments, world_size)
    assert_same(run, expected, steps)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    last_two = [f"step_{step:08d}" for step in range(1, steps + 1) if step % 4 == 0 or step == steps][-2:]
    assert left == ["latest", *last_two], "something was left behind"


def test_death_before_each_operation_of_a_save_in_turn(nursery, tmp_path):
    """Also between the moments when the new checkpoint gets its name, ``latest`` its content, and the old one goes."""
    steps, expected, run = 100, tmp_path / "expected", tmp_path / "run"
    config = str(config_file(tmp_path, "lm", "fsdp", name="run", steps=steps, batch_size=4))
    nursery.run(["--config", config, "run.name=expected"])
    saves = ["checkpoint.every=2", "checkpoint.keep_last=1", "checkpoint.asynchronous=false"]
    arguments = ["--config", config, *saves, "--resume", "auto"]
    before, seen = 0, set()
    for event in range(44):  # there are about 20 in a save that removes the one before
        killed = nursery.start(arguments, 1, [{"name": "dies_writing", "who": [0], "event": event}])
        assert killed.wait(30) == [-signal.SIGKILL], killed.output()
        check_checkpoints(run)
        assert newest(run) >= before, event
        before = newest(run)
        seen |= {path.suffix for path in (run / "checkpoints").glob("*")}
    assert {".partial", ".removed"} <= seen
    nursery.run(arguments)
    assert_same(run, expected, steps)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step_{steps:08d}"]
