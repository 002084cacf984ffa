"""What this machine computes with, found out without torch, so that a config it cannot train is refused at once."""

from __future__ import annotations

import os
from pathlib import Path

from jepa_scale.utils.errors import InputError

FP16_ON_CPU = "JEPA_SCALE_FP16_ON_CPU"
"""Environment variable that allows fp16 on a CPU without instructions for it."""
CPU_FILE = Path("/proc/cpuinfo")
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in ``/dev`` of NVIDIA's driver, of AMD's, and of GPUs in Windows' Linux."""


def check_fp16() -> None:
    """Check that this machine may be able to compute in fp16. Where nothing is known, it is taken to be.

    Raises:
        InputError: it has no GPU, and its CPU lacks the instructions, unless ``JEPA_SCALE_FP16_ON_CPU`` is 1.
    """
    if any(any(Path("/dev").glob(name)) for name in GPU_FILES):
        return
    try:
        flags = CPU_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    if not any(name in flags for name in ("avx512_fp16", "amx_fp16", "asimdhp")):
        refuse_fp16()


def refuse_fp16() -> None:
    """Refuse fp16 on a CPU without instructions for it, unless ``JEPA_SCALE_FP16_ON_CPU`` is 1.

    Raises:
        InputError: always else.
    """
    if os.environ.get(FP16_ON_CPU) != "1":
        raise InputError(
            "engine.precision: fp16 needs a GPU, or a CPU with instructions for it, and this machine has neither; use bf16, fp32 "
            f"or auto, or set {FP16_ON_CPU}=1 to try it slowly here"
        )
