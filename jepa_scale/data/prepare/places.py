"""Where corpora that have a name are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from jepa_scale.data.shards.cache import cache_dir


def data_places() -> list[Path]:
    """Folders of data, the first one first: ``$JEPA_SCALE_DATA`` if it is set, and the cache."""
    data = os.environ.get("JEPA_SCALE_DATA")
    return [*([Path(data).expanduser()] if data else []), cache_dir()]
