"""Checkpoints: saved while training continues, verified when read, and independent of engine and world size.

checkpoints/
  latest                   name of the newest complete checkpoint, for the user only; the code reads the folders
  step_00000100/
    manifest.json          description of the checkpoint, and the checksum of every file; written last
    tensors/               parameters and moments, a PyTorch distributed checkpoint
    rng_rank00000.pt       random number generators, one file for each rank
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jepa_scale.checkpoint.manifest import Manifest
from jepa_scale.checkpoint.retention import Policy, complete, set_aside, sweep

if TYPE_CHECKING:
    from jepa_scale.checkpoint.restore import find, load, verify
    from jepa_scale.checkpoint.saver import Report, Saver

__all__ = ["Manifest", "Policy", "Report", "Saver", "complete", "find", "load", "set_aside", "sweep", "verify"]

_OF_TENSORS = {
    "Report": "saver",
    "Saver": "saver",
    "find": "restore",
    "load": "restore",
    "verify": "restore",
}
"""Names that need torch → module. They are imported on first use, because listing checkpoints does not need torch."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _OF_TENSORS:
            return getattr(import_module(f"{__name__}.{_OF_TENSORS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
