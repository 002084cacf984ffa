"""Names of files that other files give: a file from elsewhere must not lead to one outside of its folder."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jepa_scale.utils.errors import InputError

TOKENIZER_CONFIG = "tokenizer_config.json"


def lies_within(name: object) -> bool:
    """Return whether a name, joined to a folder, stays in that folder: it is relative and has no ``..``.

    Symbolic links are not resolved: a link in the folder may lead elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    rooted = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return not rooted and ".." not in parts and "://" not in name


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: is no JSON object; copy it again")
    return values


def shards_of(index: Path) -> list[str]:
    """Return the names of the files in an index of weights (``model.safetensors.index.json``), sorted.

    Raises:
        InputError: it cannot be read, or a name leads outside of its folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: has no weight_map; copy it again")
    for tensor, name in sorted(names.items()):
        if not lies_within(name):
            raise InputError(
                f"{index}: weight_map says that {tensor} is in {name!r}, outside of this folder; put the file beside the index "
                "and name it so, if you trust it"
            )
    return sorted(set(names.values()))


def check_tokenizer_config(folder: Path) -> None:
    """Check the names of files in a folder's ``tokenizer_config.json``, if it has one.

    Raises:
        InputError: a name leads outside of the folder.
    """
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    for key, value in read_json(file).items():
        for name in value if isinstance(value, list) else [value]:
            if not key.endswith(("_file", "_files")) or name is None or lies_within(name):
                continue
            # many a public tokenizer keeps a path of the machine that made it, which is not there and not read
            if key.endswith("_files") or (isinstance(name, str) and (folder / name).exists()):
                raise InputError(
                    f"{file}: {key} names {name!r}, outside of this folder; put the file beside it and name it so, if you trust it"
                )
