"""The keys of ``ema:``, for objectives with an EMA teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jepa_scale.config.schema import Section


class TeacherOptions(Section):
    momentum: float = Field(0.99, ge=0, le=1, description="EMA momentum m at the first update.")
    final_momentum: float | None = Field(
        0.9998, ge=0, le=1, description="m at the end of a linear or cosine schedule; null = momentum."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How m goes from the first to the final one; constant = it stays the first."
    )
    steps: int = Field(0, ge=0, description="Updates until the final momentum; 0 = the whole run.")


def check_teacher_is_used(target: str, ema: TeacherOptions, default: TeacherOptions | None = None) -> None:
    """Check that keys of ``ema:`` are given only where the target is a teacher's.

    Args:
        default: the options without any key; None = those of the class.

    Raises:
        ValueError: they have no effect.
    """
    if target != "ema" and ema != (default or TeacherOptions()):
        raise ValueError("ema: has no effect without target: ema; set that or remove the key")
