"""The options of ``lm``."""

from __future__ import annotations

from jepa_scale.config.schema import Section


class LmOptions(Section):
    """``lm`` has no options of its own."""
