"""The ``malloc`` implementation of a process.

glibc returns the memory of a large tensor to the kernel when it is freed, so that the next tensor pays for its page
faults again. tcmalloc keeps the pages, and steps on a CPU are faster with it (docs/performance.md). A process cannot
change its ``malloc`` after its start, so the scripts that start runs preload tcmalloc.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VARIABLE = "JEPA_SCALE_MALLOC"
"""Environment variable: ``system`` keeps the scripts from preloading tcmalloc, and the hint from being logged."""


def in_use() -> str:
    """Return the process's ``malloc``: ``tcmalloc``, ``jemalloc``, ``mimalloc`` or ``system``."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "system"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped), "system")


def advise(device: torch.device) -> None:
    """Log a hint about a faster ``malloc`` for a run on a CPU, unless it has one or the user has opted out."""
    if sys.platform == "linux" and device.type == "cpu" and in_use() == "system" and not os.environ.get(VARIABLE):
        logger.info(
            "memory: steps on a CPU are faster with tcmalloc, which scripts/launch_torchrun.sh preloads where it is installed "
            f"(docs/performance.md); {VARIABLE}=system hides this"
        )
