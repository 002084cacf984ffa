"""A process's place among the ranks, as a launcher's environment variables give it. Torch is not imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jepa_scale.utils.errors import InputError

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_OF_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "CROSS_SIZE"}
"""Variables that only ``torchrun`` and ``deepspeed`` set."""


@dataclass(frozen=True, slots=True)
class Place:
    """Number of this rank, of ``world_size``, and its number among those of its host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether the process needs no other one, and no address at which to meet them."""
        return self.world_size == 1 and not set(_MEETING) <= os.environ.keys()


def launcher() -> str:
    """Return the launcher that started this process, according to its environment variables."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_SIZE" in os.environ and "WORLD_SIZE" in os.environ:  # deepspeed/launcher/launch.py
        return "deepspeed"
    return "torchrun" if "WORLD_SIZE" in os.environ else "python"


def read_place() -> Place:
    """Return the place that the environment variables give; without any, the process is alone.

    Raises:
        InputError: they contradict each other, or do not say where the ranks meet, as when some of another job are left over in a
            shell.
    """
    given = {name: os.environ[name] for name in (*_PLACE, *_MEETING) if name in os.environ}
    numbers = {name: given[name] for name in _PLACE if name in given}
    problem = ""
    if not all(value.isascii() and value.isdigit() for value in numbers.values()):
        problem = "these must be numbers"
    else:
        place = Place(int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1)), int(given.get("LOCAL_RANK", 0)))
        missing = [name for name in ("RANK", *_MEETING) if name not in given]
        if place.rank >= place.world_size or place.local_rank >= place.world_size:
            problem = f"a rank must be below the number of ranks, {place.world_size}"
        elif place.world_size > 1 and missing:
            problem = f"there are other ranks, and {', '.join(missing)} of this one is not set"
    if problem:
        shown = ", ".join(f"{name}={value}" for name, value in numbers.items())
        raise InputError(
            f"environment: {shown}: {problem}; if this is left over from another job, unset {' '.join(numbers)}, else start the "
            "ranks with torchrun or deepspeed"
        )
    return place


def is_first() -> bool:
    """Return whether this process prints an error that all ranks have: rank 0 does, and one whose rank is left over in a shell."""
    if os.environ.get("RANK", "0") == "0":
        return True
    if started_by_launcher():
        return False
    try:
        read_place()
    except InputError:
        return True
    return False


def started_by_launcher() -> bool:
    """Return whether ``torchrun`` or ``deepspeed`` started this process; else its variables were set by hand or are left over."""
    return bool(_OF_LAUNCHERS & os.environ.keys())
