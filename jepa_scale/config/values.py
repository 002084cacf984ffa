"""Types of a config's values beside numbers and choices: texts, names, paths, and mappings for other libraries."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from jepa_scale.config.yaml12 import WrittenFloat, WrittenInt

NAME_BYTES = 250
"""Longest name of a run; file systems allow 255 bytes, and some tools add a few."""
ALPHABET = "letters, digits, spaces and . , : ; _ - + = @ # % ! & ( ) [ ] ' ^ ~, and / between folders"
_NAME = re.compile(r"[\w.,:;+=@#%!&()\[\]'^~/ -]*")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def _as_written(value: Any) -> Any:
    """Return the text of a number that was written without quotes."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    return value if isinstance(value, bool) or not isinstance(value, int | float) else str(value)


def _name(value: str) -> str:
    problem = ""
    folders = value.split("/") if value else []
    if wrong := _NAME.sub("", value):
        problem = f"has {wrong[0]!r}; a name may have {ALPHABET}"
    elif not all(folders):
        problem = "begins or ends with /, or has two of them in a row; a name goes below run.dir"
    elif any(folder.startswith(("-", ".", " ", "~")) or folder.endswith(" ") for folder in folders):
        problem = "begins with '-', '.', '~' or a space, or ends with a space; change that"
    elif any(len(folder.encode()) > NAME_BYTES for folder in folders):
        problem = f"has {len(value.encode())} bytes, and {NAME_BYTES} are the most; shorten it"
    if problem:
        raise ValueError(f"{value if len(value) <= 60 else value[:57] + '…'!r} {problem}")
    return value


def is_url(path: str) -> bool:
    """Return whether ``path`` is anything but a local file."""
    return path.startswith("pipe:") or (re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None)


def expand(path: str) -> str:
    """Return a path with environment variables (``$NAME``, ``${NAME}``) and a leading ``~`` or ``~user`` replaced.

    A shell command (``pipe:``) is left to its shell. In a URL a variable that is not set is no error, as ``$`` is a character
    of URLs.

    Raises:
        ValueError: a variable is not set, or there is no home folder, and there is no file of that name either; or the path is
            empty or has a control character.
    """
    if not path:
        raise ValueError("is empty; give a path (. is the folder in which the command was started)")
    if any(ord(character) < 32 for character in path):
        raise ValueError(f"{path!r} has a control character, such as a line end; remove it")
    if path.startswith("pipe:"):
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    if is_url(path) or os.path.exists(expanded):
        return expanded
    if unset := _VARIABLE.search(expanded):
        name = unset[1] or unset[2]
        raise ValueError(f"{path!r}: the environment variable {name} is not set; set it, or write the path out")
    if expanded.startswith("~"):
        raise ValueError(f"{path!r}: the home folder of {expanded.partition('/')[0]} is not known; write the path out")
    return expanded


def _plain(value: Any) -> Any:
    """Return a value without the texts that its numbers had in the file."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, WrittenInt) else float(value) if isinstance(value, WrittenFloat) else value


Text = Annotated[str, BeforeValidator(_as_written)]
"""A text. A number without quotes is taken as it is written; true, false and null need quotes."""
RunName = Annotated[Text, AfterValidator(_name)]
"""A name of a run, which is the name of its folder too."""
LocalPath = Annotated[Text, AfterValidator(expand)]
"""A path, or a name or URL that may stand in its place, after :func:`expand`."""
PlainMapping = Annotated[dict[str, Any], BeforeValidator(_plain)]
"""A mapping for another library."""
