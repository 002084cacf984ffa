"""The environment of a run: versions, machine, ranks, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from jepa_scale import __version__
from jepa_scale.config.loading import REPOSITORY
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.utils import allocator


def describe_environment(ranks: ParallelContext, engine: str, precision: str) -> dict[str, Any]:
    """Return the machine's entries of ``summary.json``.

    Packages that are not installed are ``None``. ``git_commit`` and ``git_changes`` (uncommitted ones) are there only
    if the package lies in a git checkout of its own.
    """
    environment: dict[str, Any] = {
        **package_versions(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),  # the widest that torch's kernels use
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "malloc": allocator.in_use(),
        "engine": engine,
        "precision": precision,
        "launcher": ranks.launcher,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
    }
    if ranks.device.type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(ranks.device)
    return environment | _git(REPOSITORY)


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that results depend on; None = not installed."""
    return {
        "jepa_scale": __version__,
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(repository: Path) -> dict[str, Any]:
    if not (repository / ".git").exists():  # installed elsewhere: an outer repository's commit would mislead
        return {}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {
            "git_commit": git("rev-parse", "--verify", "HEAD"),
            "git_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}
