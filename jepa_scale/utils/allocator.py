"""Which ``malloc`` a process has.

glibc hands a large tensor back to the kernel when it is freed, so that the next one pays for its pages again. tcmalloc keeps
them, and steps on a CPU are faster with it (docs/performance.md). A process has the ``malloc`` that it was started with: the
scripts that start runs preload it.
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
    """``tcmalloc``, ``jemalloc`` or ``mimalloc`` if the process has it, else ``system``."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "system"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped), "system")


def advise(device: torch.device) -> None:
    """Log how a run on a CPU would be faster, unless it has such a ``malloc`` or its user wants none."""
    if sys.platform == "linux" and device.type == "cpu" and in_use() == "system" and not os.environ.get(VARIABLE):
        logger.info(
            "memory: steps on a CPU are faster with tcmalloc, which scripts/launch_torchrun.sh preloads where it is installed "
            f"(docs/performance.md); {VARIABLE}=system hides this"
        )
