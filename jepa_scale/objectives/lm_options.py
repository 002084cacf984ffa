"""The options of ``lm``."""

from __future__ import annotations

from jepa_scale.config import Section


class LmOptions(Section):
    """``lm`` has no options of its own."""
