"""scripts/launch_torchrun.sh on two nodes that are namespaces of the network, of which one is cut off for a while."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed.held import OBJECTIVE, held_in_step
from tests.distributed.processes import ENVIRONMENT, HANG, REPOSITORY, Gate, until
from tests.distributed.small_runs import assert_same, check_checkpoints, last_step, newest
from tests.distributed.test_runs import config_file
from tests.integration.daemons import needs
from tests.integration.namespaces import Network, possible

LAUNCHER = str(REPOSITORY / "scripts/launch_torchrun.sh")
STEPS = 40
"""Cut off in step 22: the checkpoint of step 20 is there, and what it does not give back shows in twenty steps."""
HANG_SECONDS = 30.0
"""Far longer than a step of ranks that are not cut off takes on a machine with other work."""


@pytest.fixture
def network():
    if reason := possible():
        pytest.skip(reason)
    with Network(2) as network:
        yield network


@pytest.mark.matrix
@needs("ip", root=True)
def test_a_node_that_is_cut_off_and_comes_back(process_pool, launch, network, tmp_path):
    """The ranks that wait for it are ended by the watchdog, the launchers start them again, and they go on from the
    newest checkpoint, to the bit as if nothing had been."""
    options = {"steps": STEPS, "batch_size": 4, "hang_minutes": HANG_SECONDS / 60, "checkpoint": {"every": 10}}
    config = config_file(tmp_path, "lm", "fsdp", name="run", **options)
    process_pool.run(["--config", str(config), f"run.dir={tmp_path}/expected"], 2)
    run, gate = tmp_path / "run", Gate(tmp_path / "step_22")

    def start(node: int):
        variables = {
            "NNODES": "2",
            "NPROC_PER_NODE": "1",
            "MAX_RESTARTS": "2",
            "RDZV_ENDPOINT": f"{network.address(0)}:29400",
            "LOCAL_ADDR": network.address(node),
            "GLOO_SOCKET_IFNAME": "net0",
            **held_in_step(0, 22, gate.path),
        }
        return launch(*network.within(node), LAUNCHER, "--config", str(config), OBJECTIVE, environment=variables)

    nodes = [start(0), start(1)]
    arrived = Path(f"{gate.path}.reached")
    until(lambda: arrived.exists() or any(node.process.poll() is not None for node in nodes), "step 22")
    assert arrived.exists(), [node.output() for node in nodes]
    until(lambda: newest(run) == 20, "checkpoint")
    network.cut(1)
    gate.open()
    until(lambda: all("no progress" in node.output() for node in nodes), "word of the watchdogs")
    assert last_step(run) == 21
    network.mend(1)
    assert [node.wait() for node in nodes] == [0, 0], [node.output() for node in nodes]
    assert nodes[0].output().count("writes to  ") >= 2, "the ranks were not started again"
    check_checkpoints(run)
    assert newest(run) == STEPS
    assert_same(run, tmp_path / "expected" / "run", STEPS)


def test_bad_input_ends_the_launcher_before_there_are_ranks(tmp_path):
    command = [LAUNCHER, "--config", "configs/reversal.yaml", f"run.dir={tmp_path}", "train.stepz=3"]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert "train.stepz: unknown key" in done.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NNODES": "2"}, "RDZV_ENDPOINT: needed with NNODES=2"),
        ({"NNODES": "two"}, "NNODES: must be a number of nodes, not 'two'"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT: must look like host:port, not 'node0'"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "no-such-host.invalid:29400"}, "no address is known for host 'no-such-host"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: must be a number, not '-1'"),
    ],
)
def test_wrong_settings_are_refused_by_name(variables, says):
    done = subprocess.run(
        [LAUNCHER, "--config", "configs/reversal.yaml"],
        env={**os.environ, **ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert says in done.stderr
