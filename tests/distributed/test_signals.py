"""A signal to one rank stops all of them orderly; a rank that hangs is reported by name, and the run ends."""

from __future__ import annotations

import os
import re
import signal

import pytest

from jepa_scale.checkpoint import Manifest
from tests.distributed.processes import Gate, held_port, until
from tests.distributed.small_runs import assert_same, check_checkpoints, checkpoint, last_step, newest, rows
from tests.distributed.test_runs import config_file

STEPS = 9
"""Number of steps. Runs stop after the fourth or in the evaluation of the sixth, and warm-up ends at the third. So the
remaining steps depend on the weights, moments, learning rate and order of samples that a stop must keep."""
EVAL_EVERY = 6
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@pytest.fixture(scope="module")
def undisturbed(process_pool, tmp_path_factory):
    """Folder of a run without signals: two ranks of FSDP2, evaluated after step 6 and at the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_file(folder, "lm", "fsdp", name="run", steps=STEPS, eval_every=EVAL_EVERY, batch_size=4)
    process_pool.run(["--config", str(config)], 2)
    return folder


def config_of(undisturbed, tmp_path) -> list[str]:
    return ["--config", str(undisturbed / "run.yaml"), f"run.dir={tmp_path}", "--resume", "auto"]


@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(process_pool, undisturbed, tmp_path, number, who):
    """The signal comes in step 3; the ranks agree on it at the start of step 4, and save after that step."""
    arguments, run, gate = config_of(undisturbed, tmp_path), tmp_path / "run", Gate(tmp_path / "step_3")
    stopped = process_pool.start(
        arguments, 2, [{"name": "holds_in_step", "who": who, "step": 3, "gate": str(gate.path)}]
    )
    gate.reached(stopped)
    stopped.send(who, number)
    gate.open()
    assert stopped.wait() == [0, 0], stopped.output()
    assert newest(run) == last_step(run) == 4
    sender = number.name if who == 0 else "a signal to another rank"
    assert f"stopped by {sender} after step 4; go on with --resume auto" in stopped.output(0)
    assert "Traceback" not in stopped.output()
    process_pool.run(arguments, 2)
    assert_same(run, undisturbed / "run", STEPS)


@pytest.mark.parametrize(("step", "evaluations"), [(EVAL_EVERY, [1, 1]), (STEPS, [2])], ids=["within", "last"])
def test_a_signal_in_an_evaluation_is_obeyed_at_once_and_the_evaluation_made_up_for(
    process_pool, undisturbed, tmp_path, step, evaluations
):
    """Signals come twice in the evaluation of step 6, the second right after the restart, and once in the last evaluation."""
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    for time, evaluation in enumerate(evaluations):
        gate = Gate(tmp_path / f"evaluation_{time}")
        fault = {"name": "holds_evaluating", "who": 1, "gate": str(gate.path), "evaluation": evaluation}
        stopped = process_pool.start(arguments, 2, [fault])
        gate.reached(stopped)
        stopped.send(1, signal.SIGTERM)
        gate.open()
        assert stopped.wait() == [0, 0], stopped.output()
        assert newest(run) == last_step(run) == step
        assert f"stopped by a signal to another rank after step {step}; go on with --resume auto" in stopped.output(0)
        assert not [row for row in rows(run) if row["step"] == step and row["split"] != "train"]
    process_pool.run(arguments, 2)
    assert_same(run, undisturbed / "run", STEPS)


@pytest.mark.parametrize(
    ("launcher", "engine", "program"),
    [
        ("deepspeed", "deepspeed", ["jepa_scale/train.py"]),
        pytest.param("deepspeed", "deepspeed", ["--module", "jepa_scale.train"], marks=pytest.mark.matrix),
        pytest.param("torchrun", "fsdp", ["-m", "jepa_scale.train"], marks=pytest.mark.matrix),
    ],
    ids=["deepspeed", "deepspeed-module", "torchrun-module"],
)
def test_under_a_real_launcher(launch, undisturbed, tmp_path, launcher, engine, program):
    """Each engine runs under its launcher. A signal to one rank's process, as from a scheduler, ends the launcher with 0."""
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    endless = ["engine.name=auto", "train.steps=1000000", "train.eval_every=0"]
    with held_port() as port:
        command = TORCHRUN if launcher == "torchrun" else ["deepspeed", "--num_gpus", "2", "--master_port", str(port)]
        started = launch(*command, *program, *arguments, *endless)
        pid = started.rank(1)
        until(lambda: last_step(run) >= 3 or started.process.poll() is not None, "step")
        assert last_step(run) >= 3, started.output()
        os.kill(pid, signal.SIGUSR1 if launcher == "torchrun" else signal.SIGTERM)
        assert started.wait() == 0, started.output()
    step = newest(run)
    assert step == last_step(run)
    assert f"stopped by a signal to another rank after step {step}; go on with --resume auto" in started.output()
    assert Manifest.read(checkpoint(run, step)).engine == engine
    # the learning rate rises alike for the first three steps, however many there are
    for row, expected in zip(rows(run, "train")[:3], rows(undisturbed / "run", "train")[:3], strict=True):
        assert abs(row["loss"] - expected["loss"]) < 1e-4


@pytest.mark.matrix
def test_a_rank_that_is_killed_takes_its_launcher_down(launch, undisturbed, tmp_path):
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    started = launch(*TORCHRUN, "jepa_scale/train.py", *arguments, "train.steps=1000000", "checkpoint.every=5")
    pid = started.rank(1)
    until(lambda: newest(run) >= 10 or started.process.poll() is not None, "checkpoint")
    os.kill(pid, signal.SIGKILL)
    assert started.wait_for_all() != 0
    check_checkpoints(run)


HANG_SECONDS = 5.0
"""Seconds without progress, from the start of a hang: far longer than a step of the other ranks. A test waits for nothing
else."""
HANGS = {
    "forward": ({"name": "hangs", "who": 1, "step": 5}, r"rank 1 hangs at step 5 in 'forward and backward' at hang"),
    "save": ({"name": "hangs_saving", "who": 1}, r"rank 1 hangs at step 6 in 'save' at hang"),
    "evaluation": ({"name": "hangs_evaluating", "who": 1}, r"rank 1 hangs at step 4 in 'evaluation' at hang"),
}
matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    ("where", "engine"),
    [
        ("forward", "fsdp"),
        pytest.param("forward", "zero3", marks=matrix),
        pytest.param("save", "fsdp", marks=matrix),
        pytest.param("evaluation", "fsdp", marks=matrix),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_ends(process_pool, tmp_path, where, engine):
    fault, verdict = HANGS[where]
    options = {"steps": 20, "eval_every": 4, "hang_minutes": HANG_SECONDS / 60, "checkpoint": {"every": 6}}
    config = config_file(tmp_path, "lm", engine, name="run", **options)
    mark = str(tmp_path / "hangs")
    faults = [{**fault, "mark": mark}, {"name": "hang_begins", "mark": mark, "speakers": [0, 1]}]
    run = process_pool.start(["--config", str(config)], 2, faults)
    assert run.wait() == [1, 1], run.output()
    told = [line for line in run.output().splitlines() if "no progress" in line]
    assert told and all(re.search(verdict, line) for line in told), told


@pytest.mark.matrix
def test_a_frozen_process_is_named(process_pool, tmp_path):
    """The frozen process cannot report itself."""
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=1_000_000, hang_minutes=HANG_SECONDS / 60)
    mark, gate = tmp_path / "hangs", Gate(tmp_path / "step_20")
    faults = [
        {"name": "holds_in_step", "who": 1, "step": 20, "gate": str(gate.path)},
        {"name": "hang_begins", "mark": str(mark), "speakers": [0]},
    ]
    run = process_pool.start(["--config", str(config)], 2, faults)
    gate.reached(run)
    # its watchdog writes the first time half a second after the start, which a fast machine needs for 20 steps
    until((tmp_path / "run" / "watchdog" / "rank_00001.json").exists, "file of rank 1's watchdog")
    gate.open()
    run.send(1, signal.SIGSTOP)
    mark.touch()
    until(lambda: 0 in run.codes, "end")
    run.kill()
    assert run.codes[0] == 1
    told = [line for line in run.output().splitlines() if "no progress" in line]
    assert len(told) == 1, run.output()
    (told,) = told
    assert re.search(r": rank 1 hangs at step \d+ in '", told), told


def test_a_long_evaluation_is_no_hang(process_pool, tmp_path):
    """Each forward counts as progress, so together they may take longer than the limit."""
    limit = 1.0
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=2, hang_minutes=limit / 60)
    run = process_pool.run(["--config", str(config)], 1, [{"name": "evaluates_long", "limit": limit}])
    assert "evaluating for 3.6 times the limit" in run.output()
