"""Folders that are searched for corpora with a name."""

from __future__ import annotations

import os
from pathlib import Path

from jepa_scale.data.files.cache import cache_dir


def data_folders() -> list[Path]:
    """Return the data folders in order of search: ``$JEPA_SCALE_DATA`` if it is set, then the cache."""
    data = os.environ.get("JEPA_SCALE_DATA")
    return [*([Path(data).expanduser()] if data else []), cache_dir()]
