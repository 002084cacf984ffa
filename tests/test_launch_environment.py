"""What a rank begins with: its own number on its host, and modules of ours that shadow nobody's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SRUN = """#!/usr/bin/env bash
# Two nodes with two tasks each, as SLURM numbers them; its options come before the command.
while [[ $1 == --* ]]; do shift; done
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@"
done
"""
SCONTROL = """#!/usr/bin/env bash
printf 'node%d\\n' $(seq 7 20000)
"""
"""More than a pipe holds: a reader that closes the pipe after the first line would end the program with SIGPIPE."""
PYTHON = """#!/usr/bin/env bash
[ "$1" = jepa_scale/train.py ] || exit 0
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*"
"""


def test_a_task_of_slurm_is_a_rank_with_its_number_on_its_node(tmp_path):
    """The batch script with a stand-in for ``srun``: on one task a node, as in the tests on a real SLURM, every local number is 0."""
    programs = {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    scripts = tmp_path / "submitted" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("launch_slurm.sbatch", "launch_common.sh", "help.sh"):
        shutil.copy(REPOSITORY / "scripts" / name, scripts)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(scripts.parent),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "31234",
    }
    command = ["bash", str(scripts / "launch_slurm.sbatch"), "--config", "x.yaml", "train.steps=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [line.split(maxsplit=5) for line in done.stdout.splitlines()]
    assert [rank[:3] for rank in ranks] == [["0", "0", "4"], ["1", "1", "4"], ["2", "0", "4"], ["3", "1", "4"]]
    for rank in ranks:
        assert rank[3:5] == ["node7", "21234"]
        assert rank[5] == "jepa_scale/train.py --resume auto --config x.yaml train.steps=3"


def test_a_config_of_the_folder_where_a_script_is_started_is_meant(tmp_path):
    """Not that of the repository which has the same name."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "reversal.yaml").write_text("")
    show = 'source "$0/scripts/launch_common.sh"; printf "%s|" "$@"'
    given = [
        "--config",
        "configs/reversal.yaml",
        "--config=configs/reversal.yaml",
        "--config",
        "configs/grid_arc.yaml",
        "run.dir=configs",
    ]
    own = f"{tmp_path}/configs/reversal.yaml"
    for folder, expected in {tmp_path: ["--config", own, f"--config={own}", *given[3:]], REPOSITORY: given}.items():
        done = subprocess.run(["bash", "-c", show, str(REPOSITORY), *given], cwd=folder, capture_output=True, text=True)
        assert done.stdout.split("|")[:-1] == expected
        assert ("relative paths but that of --config are below" in done.stderr) == (folder == tmp_path)


def test_a_script_of_the_package_does_not_put_its_folder_first(tmp_path):
    """``deepspeed jepa_scale/train.py`` would have ``import config``, in whatever package, find ours."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, sys\natexit.register(lambda: print(sys.path[0]))\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "jepa_scale/train.py", "--config", "there_is_none.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "there_is_none.yaml" in done.stderr
    assert done.stdout.splitlines()[-1] == str(REPOSITORY)


def test_the_launcher_of_deepspeed_is_quiet_unless_more_is_asked_for(tmp_path):
    """Its own lines alone are hidden: those of the script that it starts are all there."""
    (tmp_path / "job.py").write_text("print('the job')\n")
    launch = """
        source "$0/scripts/launch_common.sh"; quiet_deepspeed "$@"
        exec deepspeed ${launcher_flags[@]+"${launcher_flags[@]}"} --num_gpus 1 --master_port 0 "$JOB"
    """
    environment = {**os.environ, "JOB": str(tmp_path / "job.py"), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)

    def said(*arguments: str) -> list[str]:
        command = ["bash", "-c", launch, str(REPOSITORY), *arguments]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return [line for line in (done.stdout + done.stderr).splitlines() if line]

    assert said("--config", "x.yaml") == ["the job"]
    verbose = said("--config", "x.yaml", "-v")
    assert "the job" in verbose and any("[launch.py" in line for line in verbose)
