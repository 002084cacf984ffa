"""scripts/launch_slurm.sbatch on a real SLURM with two nodes: saved when time runs out, queued again, resumed, ended right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.held import OBJECTIVE, held_in_step
from tests.distributed.processes import ENVIRONMENT, HANG, MARK, REPOSITORY, Gate, Launched, held_port, until
from tests.distributed.small_runs import assert_same, check_checkpoints, last_step, newest
from tests.distributed.test_runs import config_file
from tests.integration.daemons import needs
from tests.integration.slurm import Slurm

STEPS = 12
"""Told to stop in the fifth, with warm-up over at the third: what is lost shows in the steps that are left."""
pytestmark = [pytest.mark.matrix, needs("munged", "slurmctld", "slurmd", "sbatch", "srun", root=True)]
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def cluster(short_folder: Path) -> Iterator[Slurm]:
    with Slurm(short_folder) as cluster:
        yield cluster


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """In step 5 of rank 1, which passes when it has been asked to stop."""
    return Gate(tmp_path / "step_5")


@pytest.fixture
def submit(cluster: Slurm, gate: Gate, tmp_path: Path) -> Iterator[Submit]:
    """``submit(arguments, option=…)`` → the job's number. What a job leaves behind is killed."""
    mark = f"slurm_{os.getpid()}_{tmp_path.name}"
    path = os.pathsep.join([str(Path(sys.executable).parent), cluster.environment["PATH"]])
    environment = {**os.environ, **ENVIRONMENT, **cluster.environment, "PATH": path, MARK: mark}
    environment |= held_in_step(1, 5, gate.path)

    with held_port() as port:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # n1 is a name to SLURM alone

        def start(*arguments: str, **options: str) -> str:
            given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.txt"]
            done = subprocess.run(
                [*command, *given, "scripts/launch_slurm.sbatch", *arguments],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=HANG,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        yield start
        cluster.run("scancel", "--user=root", check=False)
        Launched(["true"], tmp_path / "true.txt", mark=mark).close()


def state_is(cluster: Slurm, job: str, *states: str) -> Callable[[], bool]:
    return lambda: cluster.job(job)["JobState"] in states


def said(tmp_path: Path) -> str:
    return (tmp_path / "job.txt").read_text() if (tmp_path / "job.txt").exists() else "nothing"


def reached(gate: Gate, cluster: Slurm, job: str, tmp_path: Path) -> None:
    """Wait until rank 1 waits."""
    arrived = Path(f"{gate.path}.reached")
    ended = state_is(cluster, job, "COMPLETED", "FAILED", "CANCELLED")
    until(lambda: arrived.exists() or ended(), "step 5")
    assert arrived.exists(), said(tmp_path)


def test_told_in_time_it_saves_queues_itself_again_and_ends_right(process_pool, cluster, submit, gate, tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=STEPS, batch_size=4)
    process_pool.run(["--config", str(config), f"run.dir={tmp_path}/expected"], 2)
    run = tmp_path / "run"
    job = submit("--config", str(config), OBJECTIVE, "data.workers=1", time="30")  # a loader's worker is told, too
    reached(gate, cluster, job, tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does before the time limit
    until(state_is(cluster, job, "PENDING", "COMPLETED", "FAILED"), "end of the first part")
    assert cluster.job(job)["JobState"] == "PENDING", said(tmp_path)
    assert newest(run) == last_step(run) == 6
    assert "after step 6; go on with --resume auto" in said(tmp_path)

    until(state_is(cluster, job, "COMPLETED", "FAILED", "CANCELLED"), "end of the second part")
    assert cluster.job(job)["JobState"] == "COMPLETED", said(tmp_path)
    assert cluster.job(job)["Restarts"] == "1"
    check_checkpoints(run)
    assert_same(run, tmp_path / "expected" / "run", STEPS)


def test_the_time_limit_itself_sends_the_signal(cluster, submit, gate, tmp_path):
    """The limit is shortened when training is under way, so that it does not matter how long the start takes."""
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=STEPS, batch_size=4)
    run = tmp_path / "run"
    job = submit("--config", str(config), OBJECTIVE, time="30", signal="B:USR1@110")
    reached(gate, cluster, job, tmp_path)
    minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":")[-2:])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2 + seconds // 45}")
    until(state_is(cluster, job, "PENDING", "TIMEOUT", "COMPLETED", "FAILED"), "signal")
    assert cluster.job(job)["JobState"] == "PENDING", said(tmp_path)
    assert newest(run) == last_step(run) == 6
    assert "goes back into the queue" in said(tmp_path)


def test_an_operator_requeues_it(process_pool, cluster, submit, gate, tmp_path):
    """SIGTERM comes from SLURM itself, to the ranks."""
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=STEPS, batch_size=4)
    process_pool.run(["--config", str(config), f"run.dir={tmp_path}/expected"], 2)
    run = tmp_path / "run"
    job = submit("--config", str(config), OBJECTIVE, "checkpoint.every=50", time="30")
    reached(gate, cluster, job, tmp_path)
    cluster.run("scontrol", "requeue", job)
    until(state_is(cluster, job, "COMPLETED", "FAILED", "CANCELLED"), "end")
    assert cluster.job(job)["JobState"] == "COMPLETED", said(tmp_path)
    assert_same(run, tmp_path / "expected" / "run", STEPS)


def test_bad_input_is_not_queued_again(cluster, submit, tmp_path):
    job = submit("--config", "configs/reversal.yaml", "train.stepz=3", time="30")
    until(state_is(cluster, job, "COMPLETED", "FAILED"), "end")
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("FAILED", "0"), said(tmp_path)
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert said(tmp_path).count("train.stepz: unknown key") == 1
