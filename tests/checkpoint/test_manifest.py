"""A manifest is read as it was written, or refused."""

from __future__ import annotations

import json

import pytest

from jepa_scale.checkpoint.manifest import FILE, Manifest
from jepa_scale.utils.errors import InputError

TOLD = Manifest(3, "fsdp", "FSDP2 fp32", 2, 3, state={"position": 40}, files={"a": {"bytes": 1, "sha256": "0"}})


def test_what_is_written_is_read(tmp_path):
    TOLD.write(tmp_path)
    assert Manifest.read(tmp_path) == TOLD


@pytest.mark.parametrize(("key", "value"), [("step", 4), ("state", {"position": 41}), ("files", {})])
def test_a_manifest_that_was_changed_is_refused(tmp_path, key, value):
    """The changed manifest is still valid JSON, so only the checksum detects the change."""
    TOLD.write(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    assert values[key] != value
    (tmp_path / FILE).write_text(json.dumps(values | {key: value}))
    with pytest.raises(InputError, match="its checksum is wrong"):
        Manifest.read(tmp_path)
