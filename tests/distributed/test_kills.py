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

EVENTS = 40
"""About as many operations on files as there are in two saves."""


def end(run: Forked) -> None:
    """As a launcher does when a rank has died: ask the others to end, then make them."""
    for rank in range(len(run.pids)):
        run.send(rank, signal.SIGTERM)
    try:
        run.wait(5)
    except AssertionError:
        run.kill()
        run.wait(10)


def kill_once(nursery: Nursery, arguments: list[str], world_size: int, folder: Path, rng: random.Random) -> str:
    """Start the run and kill it; how."""
    who = rng.choice([[0], list(range(world_size)), [world_size - 1]])
    how = rng.choice(["writing", "writing", "training", "any time"])
    if how == "writing":
        event = rng.randrange(EVENTS)
        run = nursery.start(arguments, world_size, [{"name": "dies_writing", "who": who, "event": event}])
        until(lambda: run.codes, 60, "death")
        how = f"writing {event}"
    else:
        run = nursery.start(arguments, world_size)
        if how == "training":
            began, steps = newest(folder), rng.randrange(1, 8)
            until(lambda: run.codes or last_step(folder) >= began + steps, 60, "step")
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
    [("fsdp", 2, True, 20, 100), ("zero2", 2, False, 4, 30), ("fsdp", 1, False, 6, 70)],
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
    for _ in range(kills):
        done.append(kill_once(nursery, arguments, world_size, run, rng))
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
