"""Signals as schedulers, terminals and people send them: to a whole job, to its launcher, or to one rank."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from itertools import combinations, product
from typing import NamedTuple

import pytest

from tests.distributed.processes import REPOSITORY, held_port, until
from tests.distributed.small_runs import check_checkpoints, last_step, newest
from tests.distributed.test_runs import config_file


class Case(NamedTuple):
    """A run that is stopped. ``times``: number of signals, within a second. ``moment``: what most of its time is spent on."""

    launcher: str
    number: str
    target: str
    workers: int
    times: int
    moment: str


CASES = [
    Case("python", "SIGTERM", "group", 2, 1, "save"),
    Case("python", "SIGINT", "launcher", 0, 1, "evaluation"),
    Case("python", "SIGHUP", "rank", 2, 2, "training"),
    Case("python", "SIGUSR1", "group", 2, 2, "evaluation"),
    Case("torchrun", "SIGTERM", "launcher", 2, 2, "training"),
    Case("torchrun", "SIGINT", "group", 2, 1, "evaluation"),
    Case("torchrun", "SIGHUP", "group", 0, 1, "training"),
    Case("torchrun", "SIGUSR1", "rank", 0, 2, "save"),
    Case("deepspeed", "SIGTERM", "group", 2, 2, "training"),
    Case("deepspeed", "SIGINT", "rank", 2, 1, "training"),
    Case("deepspeed", "SIGHUP", "launcher", 0, 2, "evaluation"),
    Case("deepspeed", "SIGUSR1", "launcher", 2, 1, "save"),
    Case("launch_torchrun.sh", "SIGTERM", "rank", 0, 1, "evaluation"),
    Case("launch_torchrun.sh", "SIGINT", "launcher", 0, 1, "save"),
    Case("launch_torchrun.sh", "SIGHUP", "launcher", 2, 2, "save"),
    Case("launch_torchrun.sh", "SIGUSR1", "group", 0, 1, "training"),
]
MOMENTS = {
    "training": ["train.eval_every=0"],
    "evaluation": ["train.eval_every=1"],
    "save": ["train.eval_every=0", "checkpoint.every=1", "checkpoint.asynchronous=false"],
}
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def test_all_pairs_of_levels_are_among_the_cases():
    """Ctrl-C twice is to stop at once, without a save."""
    levels = [set(column) for column in zip(*CASES, strict=True)]
    for (i, first), (j, second) in combinations(enumerate(levels), 2):
        wanted = set(product(first, second)) - {("SIGINT", 2)}
        assert {(case[i], case[j]) for case in CASES} >= wanted, (Case._fields[i], Case._fields[j])


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_job_that_is_stopped_has_saved_its_last_step_and_ended(launch, tmp_path, monkeypatch, case):
    engine = "zero1" if case.launcher == "deepspeed" else "fsdp"
    config = config_file(tmp_path, "lm", engine, name="run", steps=1_000_000, batch_size=4)
    run = tmp_path / "run"
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("MAX_RESTARTS", "0")
    with held_port() as port:
        program = {
            "python": ["python"],
            "torchrun": TORCHRUN,
            "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(port)],
            "launch_torchrun.sh": ["scripts/launch_torchrun.sh"],
        }[case.launcher]
        script = [] if case.launcher.endswith(".sh") else ["jepa_scale/train.py"]
        options = [f"data.workers={case.workers}", *MOMENTS[case.moment]]
        started = launch(*program, *script, "--config", str(config), *options)
        until(lambda: last_step(run) >= 3 or started.process.poll() is not None, "step")
        assert last_step(run) >= 3, started.output()
        rank = started.process.pid if case.launcher == "python" else started.rank(1)
        for _ in range(case.times):
            with suppress(ProcessLookupError):
                if case.target == "group":
                    os.killpg(started.process.pid, signal.Signals[case.number])
                else:
                    os.kill(rank if case.target == "rank" else started.process.pid, signal.Signals[case.number])
            time.sleep(0.3)
        started.wait_for_all()
    assert newest(run) == last_step(run) >= 3, started.output()
    check_checkpoints(run)
    assert f'File "{REPOSITORY}/jepa_scale' not in started.output(), "no traceback of ours"
