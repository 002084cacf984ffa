"""jepa_scale: a distributed trainer for JEPA-augmented decoder language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import device as Device

    from jepa_scale.inference import LoadedRun

__version__ = "0.1.0"


def load(run_dir: str | Path, checkpoint: str | Path = "auto", device: str | Device = "auto") -> LoadedRun:
    """See :func:`jepa_scale.inference.load`."""
    from jepa_scale.inference import load as load_run  # imports torch, which reading the version does not need

    return load_run(run_dir, checkpoint, device)


def __getattr__(name: str) -> Any:
    """Import the script ``jepa_scale/train.py`` when it is first called: ``jepa_scale.train(config)`` trains in this process."""
    if name == "train":
        return import_module("jepa_scale.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
