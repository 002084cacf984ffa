"""The ``malloc`` implementation of a process.

glibc returns the memory of a large tensor to the kernel when it is freed, so that the next tensor pays for its page
faults again. tcmalloc keeps the pages, and steps on a CPU are faster with it (docs/performance.md). So are tokenizers, which make
many small allocations. A process cannot change its ``malloc`` after its start, so what starts a process preloads tcmalloc:
the scripts that start runs, and the preparation of data for its workers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VARIABLE = "JEPA_SCALE_MALLOC"
"""Environment variable: ``system`` keeps tcmalloc from being preloaded, and the hint from being logged."""
THRESHOLD = "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD"
FOLDERS = ("/usr/local/lib", "/usr/lib", "/usr/lib64", "/usr/lib/*-linux-gnu")
"""Folders of libraries, as patterns; ``lib`` of an active Conda environment comes before them."""


def in_use() -> str:
    """Return the process's ``malloc``: ``tcmalloc``, ``jemalloc``, ``mimalloc`` or ``system``."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "system"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped), "system")


def to_preload() -> dict[str, str]:
    """Return the environment variables that give tcmalloc to a process that is started with them.

    Empty where it is not installed. ``LD_PRELOAD`` of the user's own, or ``JEPA_SCALE_MALLOC=system``, leaves things as they are.
    """
    if sys.platform != "linux" or os.environ.get("LD_PRELOAD") or os.environ.get(VARIABLE) == "system":
        return {}
    conda = os.environ.get("CONDA_PREFIX")
    for name in ("libtcmalloc_minimal.so*", "libtcmalloc.so*"):  # the first has no profiler
        for folder in (*([f"{conda}/lib"] if conda else []), *FOLDERS):
            if found := sorted(Path("/").glob(f"{folder.lstrip('/')}/{name}")):  # x.so.4 comes before x.so.4.5.10
                # without the threshold it reports every tensor of a GiB
                return {"LD_PRELOAD": str(found[0]), THRESHOLD: os.environ.get(THRESHOLD, str(1 << 62))}
    return {}


@contextmanager
def preloaded() -> Iterator[None]:
    """Give tcmalloc, where it is installed, to the processes that are started within the context."""
    added = to_preload()
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def advise(device: torch.device) -> None:
    """Log a hint about a faster ``malloc`` for a run on a CPU, unless it has one or the user has opted out."""
    if sys.platform == "linux" and device.type == "cpu" and in_use() == "system" and not os.environ.get(VARIABLE):
        logger.info(
            "memory: steps on a CPU are faster with tcmalloc, which scripts/launch_torchrun.sh preloads where it is installed "
            f"(docs/performance.md); {VARIABLE}=system hides this"
        )


if __name__ == "__main__":  # for the scripts: NAME=value, one a line
    print("\n".join(f"{name}={value}" for name, value in to_preload().items()))
