"""scripts/quick_test.sh as a whole: it goes through training, resume, evaluation, report and monitor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ENVIRONMENT, REPOSITORY, until
from tests.distributed.small_runs import newest, rows
from tests.distributed.test_runs import config_file


def quick_test(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **ENVIRONMENT, "PATH": path, "NPROC_PER_NODE": "2", **variables}
    command = [str(REPOSITORY / "scripts/quick_test.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_all_its_parts(tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="long", steps=10_000, eval_every=1)
    done = quick_test("--config", str(config), STEPS="2", QUICK_TEST_DIR=str(tmp_path / "kept"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    run = tmp_path / "kept" / "quick_test"
    assert newest(run) == 4 and (run / "checkpoints" / "step_00000002").is_dir()
    assert [row["step"] for row in rows(run, "fit")] == [1, 2, 3, 4]
    assert (run / "report.html").is_file()
    assert done.stdout.endswith("quick test: all works\n") and "step 4 of 4" in done.stdout
    assert not (tmp_path / "long").exists()


def test_a_config_that_is_wrong_fails(tmp_path):
    config = config_file(tmp_path, "lm", "fsdp", name="long", steps=10)
    done = quick_test("--config", str(config), "optim.lrr=1")
    assert done.returncode != 0 and "optim.lrr: unknown key" in done.stderr
    assert "all works" not in done.stdout


def test_nobody_can_take_the_ranks_port(launch, tmp_path):
    """It has no restarts to lose: the launcher holds the port from before there is a rank."""
    config = config_file(tmp_path, "lm", "fsdp", name="long", steps=10)
    variables = {"STEPS": "1", "NPROC_PER_NODE": "1", "QUICK_TEST_DIR": str(tmp_path / "kept")}
    launched = launch(str(REPOSITORY / "scripts/quick_test.sh"), "--config", str(config), environment=variables)
    ports = until(lambda: [e["MASTER_PORT"] for e in launched.marked().values() if e.get("RANK") == "0"], 60, "rank 0")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int(ports[0])))
    assert launched.wait(200) == 0, launched.output()
