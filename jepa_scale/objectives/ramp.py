"""How a weight rises at the beginning of a run."""

from __future__ import annotations


def ramp(steps: int, length: int) -> float:
    """0 before step 0, then linear up to 1 at step ``length``."""
    return 0.0 if steps < 0 else 1.0 if steps >= length else steps / length
