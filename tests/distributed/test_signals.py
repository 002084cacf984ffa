"""A signal to one rank stops all of them in order; a rank that hangs is named, and the run ends by itself."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.distributed.processes import until
from tests.distributed.small_runs import assert_same, check_checkpoints, last_step, newest, rows
from tests.distributed.test_runs import config_file

STOPS_WITHIN = 10.0
"""Seconds from the signal until all is saved and the run says so."""
ENDS_WITHIN = 60
"""Seconds from then on until the interpreters are gone: 3 on a quiet machine, above 10 beside other tests."""
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
}
STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(nursery, tmp_path_factory):
    """Two ranks of FSDP2, evaluated after steps 20 and 40."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_file(folder, "lm", "fsdp", name="run", steps=STEPS, eval_every=20, batch_size=4)
    nursery.run(["--config", str(config)], 2)
    return folder


def config_of(undisturbed, tmp_path) -> list[str]:
    return ["--config", str(undisturbed / "run.yaml"), f"run.dir={tmp_path}", "--resume", "auto"]


def assert_stops(run) -> None:
    until(lambda: "stopped by" in run.output(0), STOPS_WITHIN, "word of the stop")
    assert run.wait(ENDS_WITHIN) == [0, 0], run.output()


@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(nursery, undisturbed, tmp_path, number, who):
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    stopped = nursery.start(arguments, 2, [{"name": "slow_steps", "seconds": 0.02}])
    until(lambda: last_step(run) >= 7, 30, "step")
    began = time.monotonic()
    stopped.send(who, number)
    assert_stops(stopped)
    print(f"stopped in {time.monotonic() - began:.2f} s")
    step = newest(run)
    assert 7 <= step < 15 and step == last_step(run)
    sender = number.name if who == 0 else "a signal to another rank"
    assert f"stopped by {sender} after step {step}; go on with --resume auto" in stopped.output(0)
    assert "Traceback" not in stopped.output()
    nursery.run(arguments, 2)
    assert_same(run, undisturbed / "run", STEPS)


@pytest.mark.parametrize("step", [20, STEPS])
def test_a_signal_in_an_evaluation_is_obeyed_at_once_and_the_evaluation_made_up_for(
    nursery, undisturbed, tmp_path, step
):
    """Twice in a row in the evaluation of step 20, the second time right after the start; and in the last one."""
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    if step == STEPS:
        stopped = nursery.start(arguments, 2, [{"name": "slow_steps", "seconds": 0.01}])
        until(lambda: rows(run, "test"), 60, "evaluation")
        stopped.send(0, signal.SIGTERM)
        assert_stops(stopped)
        assert 20 < last_step(run) < step
    for _ in range(2 if step < STEPS else 1):
        stopped = nursery.start(arguments, 2, [{"name": "slow_evaluation", "seconds": 0.3}])
        until(lambda run=stopped: "evaluating" in run.output(1), 60, "evaluation")
        began = time.monotonic()
        stopped.send(1, signal.SIGTERM)
        assert_stops(stopped)
        print(f"stopped in {time.monotonic() - began:.2f} s")
        assert newest(run) == last_step(run) == step
        assert f"stopped by a signal to another rank after step {step}; go on with --resume auto" in stopped.output(0)
        assert not [row for row in rows(run) if row["step"] == step and row["split"] != "fit"]
    nursery.run(arguments, 2)
    assert_same(run, undisturbed / "run", STEPS)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_real_launcher(launch, undisturbed, tmp_path, launcher):
    """The signal goes to one rank's process, as a scheduler's would; the launcher ends with 0, too. Then SIGKILL to one
    rank of the run that goes on: the launcher ends all of them."""
    arguments, run = config_of(undisturbed, tmp_path), tmp_path / "run"
    command = [*LAUNCHERS[launcher], *(["29731"] if launcher == "deepspeed" else []), "jepa_scale/train.py", *arguments]
    first = launch(*command, "train.steps=100000")
    pid = first.rank(1)
    until(lambda: last_step(run) >= 3, 60, "step")
    os.kill(pid, signal.SIGUSR1 if launcher == "torchrun" else signal.SIGTERM)
    began = time.monotonic()
    until(lambda: "stopped by" in first.output(), STOPS_WITHIN + 10, "word of the stop")
    assert first.wait(ENDS_WITHIN) == 0, first.output()
    print(f"stopped in {time.monotonic() - began:.2f} s")
    step = newest(run)
    assert f"stopped by a signal to another rank after step {step}; go on with --resume auto" in first.output()

    if launcher == "deepspeed":
        return
    second = launch(*command, "train.steps=100000", "checkpoint.every=5")
    pid = second.rank(1)
    until(lambda: newest(run) >= step + 10, 60, "checkpoint")
    os.kill(pid, signal.SIGKILL)
    assert second.wait(60) != 0
    until(lambda: not second.marked(), 30, "end of all its processes")
    check_checkpoints(run)


HANG_SECONDS = 2.0
HANGS = {
    "forward": ({"name": "hangs", "who": 1, "step": 5}, r"rank 1 hangs at step 5 in 'forward and backward' at maybe"),
    "save": ({"name": "hangs_saving", "who": 1}, r"rank 1 hangs at step 6 in 'save' at slow"),
    "evaluation": ({"name": "hangs_evaluating", "who": 1}, r"rank 1 hangs at step 4 in 'evaluation' at slow"),
}


@pytest.mark.parametrize(
    ("where", "engine"), [("forward", "fsdp"), ("forward", "zero3"), ("save", "fsdp"), ("evaluation", "fsdp")]
)
def test_a_rank_that_hangs_is_named_and_the_run_ends(nursery, tmp_path, where, engine):
    fault, verdict = HANGS[where]
    options = {"steps": 20, "eval_every": 4, "hang_minutes": HANG_SECONDS / 60, "checkpoint": {"every": 6}}
    config = config_file(tmp_path, "lm", engine, name="run", **options)
    run = nursery.start(["--config", str(config)], 2, [fault])
    until(lambda: last_step(tmp_path / "run") >= 3, 60, "step")
    began = time.monotonic()
    codes = run.wait(4 * HANG_SECONDS + 10)
    print(f"ended in {time.monotonic() - began:.2f} s")
    assert codes == [1, 1]
    told = [line for line in run.output().splitlines() if "no progress" in line]
    assert told and all(re.search(verdict, line) for line in told), told


def test_a_frozen_process_is_named(nursery, tmp_path):
    """It cannot say anything itself."""
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=2000, hang_minutes=HANG_SECONDS / 60)
    run = nursery.start(["--config", str(config)], 2)
    until(lambda: last_step(tmp_path / "run") >= 20, 60, "step")
    run.send(1, signal.SIGSTOP)
    until(lambda: 0 in run.codes, 4 * HANG_SECONDS + 10, "end")
    run.kill()
    assert run.codes[0] == 1
    (told,) = [line for line in run.output().splitlines() if "no progress" in line]
    assert re.search(r": rank 1 hangs at step \d+ in '", told), told


def test_a_long_evaluation_is_no_hang(nursery, tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="run", steps=2, hang_minutes=HANG_SECONDS / 60)
    began = time.monotonic()
    nursery.run(["--config", str(config)], 1, [{"name": "slow_evaluation", "seconds": 0.1}])
    assert time.monotonic() - began > 1.5 * HANG_SECONDS
