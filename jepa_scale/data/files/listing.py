"""Listing of files behind addresses: one file, a folder, a wildcard or a brace pattern."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from braceexpand import braceexpand

from jepa_scale.data.files.addresses import Refused, explained, filesystem, is_http, redacted_url
from jepa_scale.data.files.cache import Cache
from jepa_scale.data.files.download import with_retries
from jepa_scale.data.files.raw import RemoteFile, info_of, remote_file
from jepa_scale.utils.errors import InputError


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder behind an address, with all files below it in the order of their names."""

    address: str
    files: tuple[RemoteFile, ...]

    def __str__(self) -> str:
        return redacted_url(self.address)


def expand_braces(path: str) -> list[str]:
    """Return the paths of a brace pattern (``a-{000..003}.tar``), in order.

    Raises:
        InputError: a brace is not closed.
    """
    try:
        return list(braceexpand(path)) if "{" in path else [path]
    except ValueError:  # its UnbalancedBracesError
        raise InputError(f"data path {redacted_url(path)!r}: braces are not closed; add the missing brace") from None


def find_remote(address: str, cache: Cache) -> list[RemoteFile | RemoteFolder]:
    """Return the files and folders that an address or a pattern of addresses names, at least one.

    Raises:
        InputError: there are none, they cannot be listed now, or credentials are missing.
    """
    found: list[RemoteFile | RemoteFolder] = []
    for name in expand_braces(address):
        try:
            found += _find(name, cache)
        except Refused as error:
            raise InputError(f"{redacted_url(name)}: {error}; correct the address") from None
    return list(dict.fromkeys(found))


def _find(address: str, cache: Cache) -> Iterable[RemoteFile | RemoteFolder]:
    shown = redacted_url(address)
    if is_http(address):
        if any(mark in shown for mark in "*[") or shown.endswith("/"):
            raise InputError(
                f"{shown}: a web server's files cannot be listed; name the files, several by braces {{a,b}}"
            )
        return [remote_file(address, info_of(address), cache)]
    if glob.has_magic(address):
        files = _listed(address, cache, lambda system, path: system.glob(path, detail=True))
        if not files:
            raise InputError(f"{shown}: no file has such a name; correct the pattern")
        return files
    info = info_of(address)
    if info.get("type") != "directory":
        return [remote_file(address, info, cache)]
    files = _listed(address, cache, lambda system, path: system.find(path, detail=True))
    return [RemoteFolder(address.rstrip("/"), tuple(files))]


def _listed(address: str, cache: Cache, find: Callable[[Any, str], dict[str, dict[str, Any]]]) -> list[RemoteFile]:
    def ask() -> list[RemoteFile]:
        with explained(address):
            system, path = filesystem(address)
            system.invalidate_cache()
            entries = find(system, path)
        before = address.rstrip("/").removesuffix(path.rstrip("/"))  # gcsfs leaves a slash at the end of a path
        files = sorted((name, info) for name, info in entries.items() if info.get("type") == "file")
        return [remote_file(before + name, info, cache) for name, info in files if not name.endswith("/")]

    return with_retries(ask, address)
