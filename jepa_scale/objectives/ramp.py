"""Linear rise of a loss weight at the beginning of a run."""

from __future__ import annotations


def ramp(steps: int, length: int) -> float:
    """Return a factor that is 0 before step 0 and then rises linearly to 1 at step ``length``."""
    return 0.0 if steps < 0 else 1.0 if steps >= length else steps / length
