"""scripts/quick_test.sh as a whole: it goes through training, resume, evaluation, report and monitor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.processes import ENVIRONMENT, REPOSITORY
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
    assert done.returncode == 0, done
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
