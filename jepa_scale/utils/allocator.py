"""Which ``malloc`` a run on a CPU has: tcmalloc, where it is installed.

glibc hands a large tensor back to the kernel when it is freed, so that the next one pays for its pages again, a fault and 4 KiB
of zeros at a time (docs/performance.md). tcmalloc (gperftools) keeps them. A process has the ``malloc``
that it was started with, so ours starts itself again, before it imports anything large. Only standard modules are imported here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VARIABLE = "JEPA_SCALE_MALLOC"
"""Environment variable: ``system`` leaves the process as it is; ``tcmalloc`` asks for it, on a machine with GPUs too; else it is
taken where it is installed and there is no GPU."""

FOLDERS = (f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib", "/usr/lib64")
"""Where the library is looked for, and one folder further down (Debian's ``x86_64-linux-gnu``)."""

PACKAGES = "Debian, Ubuntu: libtcmalloc-minimal4; Fedora: gperftools-libs; conda: gperftools"
NAMES = ("libtcmalloc_minimal.so*", "libtcmalloc.so*")

DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""Of the drivers of GPUs: NVIDIA's, AMD's, and either's under Windows."""

QUIET = {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 62)}
"""Otherwise it tells of every tensor of a GiB."""


def start_with_tcmalloc() -> None:
    """Start this process anew, with the same arguments and process id, if it should have another ``malloc``; returns otherwise.

    For the first line of a program: nothing that ran before it is kept. Bad input in :data:`VARIABLE` ends it with exit code 2.
    """
    try:
        library = wanted(os.environ, has_gpu(os.environ))
    except InputError as error:
        print(f"jepa-scale: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if library and sys.executable:
        others = os.environ.get("LD_PRELOAD", "")
        os.environ["LD_PRELOAD"] = f"{library}:{others}" if others else str(library)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def wanted(environment: Mapping[str, str], gpu: bool) -> Path | None:
    """The library to start with; ``None`` = stay. Whoever has preloaded a ``malloc`` is left with it.

    Raises:
        InputError: :data:`VARIABLE` asks for what is not there, or for what nobody knows.
    """
    asked = environment.get(VARIABLE, "")
    if asked not in ("", "system", "tcmalloc"):
        raise InputError(f"{VARIABLE}: unknown malloc {asked!r}; choose from system, tcmalloc")
    if asked == "system" or "malloc" in environment.get("LD_PRELOAD", "") or sys.platform != "linux":
        return None
    if gpu and not asked:
        return None
    found = installed()
    if asked and found is None:
        raise InputError(f"{VARIABLE}: no tcmalloc in {', '.join(FOLDERS)}; install it ({PACKAGES}), or set LD_PRELOAD")
    return found


def installed() -> Path | None:
    for name in NAMES:
        for folder in map(Path, FOLDERS):
            if found := [*folder.glob(name), *folder.glob(f"*-linux-gnu/{name}")]:
                return min(found, key=lambda path: len(path.name))  # libx.so.4 rather than libx.so.4.5.10
    return None


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether the driver of a GPU has devices that this process may see; torch, which knows for sure, takes seconds to import."""
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(map(glob, DEVICES))


def in_use() -> str:
    """``tcmalloc``, ``jemalloc`` or ``mimalloc`` if the process has it, else ``system``."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return "system"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped), "system")


def advise(device: torch.device) -> None:
    """Tell what a run on a CPU goes without, unless it is installed: then a program of somebody's was started without it, and called us."""
    missing = sys.platform == "linux" and device.type == "cpu" and in_use() == "system" and installed() is None
    if missing and not os.environ.get(VARIABLE):
        logger.info(f"memory: steps on a CPU are faster with tcmalloc ({PACKAGES}); {VARIABLE}=system says no more")
