"""Linear rise and fall of a factor over the steps of a run, such as a loss weight."""

from __future__ import annotations


def ramp(steps: int, length: int) -> float:
    """Return a factor that is 0 before step 0 and then rises linearly to 1 at step ``length``."""
    return 0.0 if steps < 0 else 1.0 if steps >= length else steps / length


def fall(steps: int, length: int) -> float:
    """Return a factor that is 1 before step 0 and then falls linearly to 0 at step ``length``."""
    return 1.0 - ramp(steps, length)
