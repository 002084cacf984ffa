"""scripts/quick_test.sh as a whole: it goes through training, resume, evaluation, report and monitor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.held import OBJECTIVE, held_in_step
from tests.distributed.processes import ENVIRONMENT, HANG, REPOSITORY, Gate, until
from tests.distributed.small_runs import newest, rows
from tests.distributed.test_runs import config_file

SCRIPT = str(REPOSITORY / "scripts/quick_test.sh")


@pytest.mark.matrix
def test_all_its_parts(launch, tmp_path):
    """And nobody can take the ranks' port, for which it has no restarts to lose: the launcher holds it from before there is a
    rank."""
    config = config_file(tmp_path, "lm", "fsdp", name="long", steps=10_000, eval_every=1)
    gate = Gate(tmp_path / "step_1")
    variables = {"STEPS": "2", "NPROC_PER_NODE": "2", "QUICK_TEST_DIR": str(tmp_path / "kept")}
    variables |= held_in_step(0, 1, gate.path)
    done = launch(SCRIPT, "--config", str(config), OBJECTIVE, environment=variables)
    done.rank(0)
    (port,) = until(lambda: {e["MASTER_PORT"] for e in done.marked().values() if e.get("RANK") == "0"}, "its port")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int(port)))
    gate.open()
    assert done.wait() == 0, done.output()
    run = tmp_path / "kept" / "quick_test"
    assert newest(run) == 4 and (run / "checkpoints" / "step_00000002").is_dir()
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 4]
    assert (run / "report.html").is_file()
    assert done.output().endswith("quick test: all works\n") and "step 4 of 4" in done.output()
    assert not (tmp_path / "long").exists()


def test_a_config_that_is_wrong_fails(tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="long", steps=10)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [SCRIPT, "--config", str(config), "optim.lrr=1"],
        env={**os.environ, **ENVIRONMENT, "PATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode != 0 and "optim.lrr: unknown key" in done.stderr
    assert "all works" not in done.stdout
