"""A run on a CPU starts itself again with tcmalloc where it is installed, and computes the same with it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from text_runs import config_file

from jepa_scale.telemetry.records import read_rows
from jepa_scale.utils import allocator
from jepa_scale.utils.errors import InputError
from tests.distributed.processes import HANG, REPOSITORY, Nursery, shared_nursery

here = pytest.mark.skipif(allocator.installed() is None, reason="tcmalloc is not installed")


@pytest.fixture
def nursery() -> Nursery:
    return shared_nursery()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """What Debian and Ubuntu install, under a root of the test's own."""
    folder = tmp_path / "lib" / "x86_64-linux-gnu"
    folder.mkdir(parents=True)
    for name in ("libtcmalloc_minimal.so.4.5.10", "libtcmalloc_minimal.so.4", "libtcmalloc_minimal_debug.so.4"):
        (folder / name).touch()
    monkeypatch.setattr(allocator, "FOLDERS", (str(tmp_path / "none"), str(tmp_path / "lib")))
    return folder / "libtcmalloc_minimal.so.4"


@pytest.mark.parametrize(
    ("environment", "gpu", "taken"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"LD_PRELOAD": "/opt/libnuma.so"}, False, True),
        ({"LD_PRELOAD": "/opt/libjemalloc.so.2"}, False, False),
        ({"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}, False, False),  # as the process that it starts has it
        ({allocator.VARIABLE: "system"}, False, False),
        ({allocator.VARIABLE: "tcmalloc"}, False, True),
        ({allocator.VARIABLE: "tcmalloc"}, True, True),
    ],
)
def test_it_is_taken_on_a_cpu_unless_another_was_chosen(library, environment, gpu, taken):
    assert allocator.wanted(environment, gpu) == (library if taken else None)


def test_without_it_a_run_goes_on_unless_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "FOLDERS", (str(tmp_path),))
    assert allocator.wanted({}, False) is None
    with pytest.raises(InputError, match=f"{allocator.VARIABLE}: no tcmalloc in {tmp_path}; install it"):
        allocator.wanted({allocator.VARIABLE: "tcmalloc"}, False)


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False),
    ],
)
def test_a_gpu_is_told_by_its_device_unless_it_is_hidden(tmp_path, monkeypatch, environment, seen):
    monkeypatch.setattr(allocator, "DEVICES", (str(tmp_path / "nvidia[0-9]*"), str(tmp_path / "kfd")))
    (tmp_path / "nvidiactl").touch()
    assert not allocator.has_gpu(environment)
    (tmp_path / "nvidia0").touch()
    assert allocator.has_gpu(environment) == seen


@pytest.mark.parametrize(
    ("malloc", "device", "chosen", "told"),
    [
        ("system", "cpu", "", True),
        ("system", "cpu", "system", False),
        ("tcmalloc", "cpu", "", False),
        ("system", "cuda", "", False),
    ],
)
def test_a_run_without_it_tells_how_to_get_it(monkeypatch, capfd, malloc, device, chosen, told):
    monkeypatch.setattr(allocator, "FOLDERS", ())
    monkeypatch.setattr(allocator, "in_use", lambda: malloc)
    monkeypatch.setenv(allocator.VARIABLE, chosen)
    allocator.advise(torch.device(device))
    said = capfd.readouterr().err
    assert said.startswith("memory: steps on a CPU are faster with tcmalloc (Debian") if told else not said


def start(*command: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", allocator.VARIABLE)}
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


@pytest.mark.parametrize("command", [("jepa_scale/train.py", "--config", "x"), ("-m", "jepa_scale", "eval", "x")])
def test_an_unknown_malloc_is_refused_in_a_line(command):
    ended = start(*command, **{allocator.VARIABLE: "other"})
    assert ended.returncode == 2
    assert ended.stderr == f"jepa-scale: {allocator.VARIABLE}: unknown malloc 'other'; choose from system, tcmalloc\n"


@pytest.mark.matrix
@here
@pytest.mark.parametrize(
    ("launcher", "world_size"),
    [
        (["jepa_scale/train.py"], 1),
        (["-m", "jepa_scale", "train"], 1),
        (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "jepa_scale/train.py"], 2),
    ],
    ids=["file", "cli", "torchrun"],
)
def test_a_run_has_it_and_computes_the_same(nursery, tmp_path, launcher, world_size):
    """As ranks that were forked without it."""
    train = {"steps": 4, "log_every": 1, "batch_size": 8}  # two with the full learning rate
    files = {malloc: str(config_file(tmp_path, malloc, train=train)) for malloc in ("tcmalloc", "system")}
    ended = start(*launcher, "--config", files["tcmalloc"])
    assert ended.returncode == 0, ended.stderr
    assert "memory: steps on a CPU" not in ended.stderr
    nursery.run(["--config", files["system"]], world_size)
    found = {}
    for malloc in files:
        summary = json.loads((tmp_path / malloc / "summary.json").read_text())
        assert summary["environment"]["malloc"] == malloc
        found[malloc] = [(row["loss"], row["grad_norm"]) for row in read_rows(tmp_path / malloc) if "grad_norm" in row]
    assert len(found["tcmalloc"]) == 4 and found["tcmalloc"] == found["system"]
