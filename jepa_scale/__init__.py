"""jepa_scale: a distributed trainer for JEPA-augmented decoder language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import device as Device

    from jepa_scale.inference import LoadedRun

__version__ = "0.1.0"


def load(run_dir: str | Path, checkpoint: str | Path = "auto", device: str | Device = "auto") -> LoadedRun:
    """See :func:`jepa_scale.inference.load`."""
    from jepa_scale.inference import load as load_run  # imports torch, which reading the version does not need

    return load_run(run_dir, checkpoint, device)
