"""The options of ``lm``."""

from __future__ import annotations

from jepa_scale.config.schema import Section


class LmOptions(Section):
    """Options of ``lm``. It has none."""
