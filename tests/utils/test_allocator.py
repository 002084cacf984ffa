"""What starts runs preloads tcmalloc for a CPU where it is installed, and a run computes the same with it."""

import functools
import json
import os
import subprocess

import pytest
import torch
from text_runs import config_file

from jepa_scale.telemetry.records import read_rows
from jepa_scale.utils import allocator
from tests.distributed.processes import HANG, REPOSITORY, ProcessPool, shared_process_pool

IN_USE = "from jepa_scale.utils import allocator; print(allocator.in_use())"
GIVEN = ("LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "CONDA_PREFIX", allocator.VARIABLE)


@pytest.fixture
def process_pool() -> ProcessPool:
    return shared_process_pool()


def bash(command: str, **environment: str) -> str:
    """What a command prints after ``scripts/launch_common.sh`` was sourced, with only these of the variables that matter."""
    inherited = {key: value for key, value in os.environ.items() if key not in GIVEN}
    done = subprocess.run(
        ["bash", "-c", f"source scripts/launch_common.sh; {command}"],
        env={**inherited, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@functools.cache
def installed() -> bool:
    return bool(bash('preload_tcmalloc; echo "${LD_PRELOAD:-}"', CUDA_VISIBLE_DEVICES=""))


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Two folders that are searched, of which the second has tcmalloc."""
    folders = [tmp_path / "local", tmp_path / "lib" / "x86_64-linux-gnu"]
    for folder in folders:
        folder.mkdir(parents=True)
    for name in ("libtcmalloc_minimal.so.4.5.10", "libtcmalloc_minimal.so.4", "libtcmalloc_minimal_debug.so.4"):
        (folders[1] / name).touch()
    for name in (*GIVEN, allocator.THRESHOLD):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "FOLDERS", (str(folders[0]), f"{tmp_path}/lib/*-linux-gnu"))
    return folders


def test_the_library_is_found_by_its_shortest_name(libraries, tmp_path, monkeypatch):
    local, lib = libraries
    assert allocator.to_preload()["LD_PRELOAD"] == str(lib / "libtcmalloc_minimal.so.4")
    (local / "libtcmalloc.so.4").touch()  # the whole of gperftools, which profiles too
    assert allocator.to_preload()["LD_PRELOAD"] == str(lib / "libtcmalloc_minimal.so.4")
    (local / "libtcmalloc_minimal.so").touch()
    assert allocator.to_preload()["LD_PRELOAD"] == str(local / "libtcmalloc_minimal.so")
    conda = tmp_path / "conda" / "lib" / "libtcmalloc_minimal.so.4"
    conda.parent.mkdir(parents=True)
    conda.touch()
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    assert allocator.to_preload()["LD_PRELOAD"] == str(conda)


def test_without_it_nothing_is_preloaded(libraries):
    for library in libraries[1].iterdir():
        library.unlink()
    assert allocator.to_preload() == {}


@pytest.mark.parametrize(("name", "value"), [(allocator.VARIABLE, "system"), ("LD_PRELOAD", "libm.so.6")])
def test_what_the_user_has_chosen_stays(libraries, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert allocator.to_preload() == {}


def test_processes_of_the_context_get_it_and_later_ones_do_not(libraries, monkeypatch):
    monkeypatch.setenv(allocator.THRESHOLD, "5")
    before = dict(os.environ)
    with allocator.preloaded():
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert changed == {"LD_PRELOAD": str(libraries[1] / "libtcmalloc_minimal.so.4")}  # the threshold is the user's
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("gpu", "environment", "taken"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"CUDA_VISIBLE_DEVICES": "0"}, False),
        (True, {"CUDA_VISIBLE_DEVICES": ""}, True),
        (True, {"CUDA_VISIBLE_DEVICES": "-1"}, True),
        (False, {allocator.VARIABLE: "system"}, False),
    ],
)
def test_scripts_preload_it_for_runs_without_a_gpu(tmp_path, gpu, environment, taken):
    if not installed():
        pytest.skip("tcmalloc is not installed")
    devices = f"'{tmp_path}/nvidia[0-9]*' '{tmp_path if gpu else tmp_path / 'none'}'"
    found = bash(f'gpu_devices=({devices}); preload_tcmalloc; python -c "{IN_USE}"', **environment)
    assert found == ("tcmalloc" if taken else "system")


@pytest.mark.parametrize("script", ["launch_torchrun.sh", "launch_slurm.sbatch", "quick_test.sh", "quickstart.sh"])
def test_what_starts_runs_calls_it(script):
    lines = (REPOSITORY / "scripts" / script).read_text().splitlines()
    start = next(
        n for n, line in enumerate(lines) if line.startswith(("exec torchrun", "srun", "train()", "for config"))
    )
    assert "preload_tcmalloc" in lines[:start]


@pytest.mark.parametrize(
    ("malloc", "device", "chosen", "hinted"),
    [
        ("system", "cpu", "", True),
        ("system", "cpu", "system", False),
        ("tcmalloc", "cpu", "", False),
        ("system", "cuda", "", False),
    ],
)
def test_a_run_on_a_cpu_without_it_logs_a_hint(monkeypatch, caplog, malloc, device, chosen, hinted):
    caplog.set_level("INFO", "jepa_scale")
    monkeypatch.setattr(allocator, "in_use", lambda: malloc)
    monkeypatch.setenv(allocator.VARIABLE, chosen)
    allocator.advise(torch.device(device))
    assert [message.startswith("memory: steps on a CPU are faster") for message in caplog.messages] == [True] * hinted


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_has_it_and_computes_the_same(process_pool, tmp_path, world_size):
    """As ranks that were forked without it."""
    if not installed():
        pytest.skip("tcmalloc is not installed")
    train = {"steps": 4, "log_every": 1, "batch_size": 8}  # two with the full learning rate
    files = {malloc: str(config_file(tmp_path, malloc, train=train)) for malloc in ("tcmalloc", "system")}
    launched = f"NPROC_PER_NODE={world_size} scripts/launch_torchrun.sh --config '{files['tcmalloc']}' 2>&1"
    assert "memory: steps on a CPU" not in bash(launched, CUDA_VISIBLE_DEVICES="")
    process_pool.run(["--config", files["system"]], world_size)
    found = {}
    for malloc in files:
        summary = json.loads((tmp_path / malloc / "summary.json").read_text())
        assert summary["environment"]["malloc"] == malloc
        found[malloc] = [(row["loss"], row["grad_norm"]) for row in read_rows(tmp_path / malloc) if "grad_norm" in row]
    assert len(found["tcmalloc"]) == 4 and found["tcmalloc"] == found["system"]
