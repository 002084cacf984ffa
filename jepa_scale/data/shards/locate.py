"""Location of prepared shards: a folder or a pattern, on this machine or behind URLs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from braceexpand import braceexpand

from jepa_scale.config.values import is_url
from jepa_scale.data.files.addresses import Refused, redacted_url
from jepa_scale.data.files.cache import CACHE_BYTES, Cache
from jepa_scale.data.files.download import read_address
from jepa_scale.data.files.suffixes import is_raw_name
from jepa_scale.data.shards.format import INDEX_FILE, Index, ShardInfo, index_name
from jepa_scale.data.shards.remote import Remote
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.lock import locked

_TAR_NAME = re.compile(r"[^/\s'\"=]+\.tar(?![\w.])")
_SAFE_NAME = re.compile(r"\w[\w.-]*")
_TOKENIZER_FILES = (  # possible files: a folder behind a URL cannot be listed
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True)
class Located:
    """Prepared shards that were found. Picklable; holds no open files.

    Attributes:
        index: index of the selected shards.
        where: name of the location, for messages.
        source: the local folder, or the remote location from which files are fetched.
    """

    index: Index
    where: str
    source: Path | Remote

    @cached_property
    def shards(self) -> dict[str, ShardInfo]:
        """The shards of all splits, by name."""
        return {shard.name: shard for shards in self.index.splits.values() for shard in shards}

    @property
    def is_local(self) -> bool:
        return isinstance(self.source, Path)

    def path(self, name: str) -> Path:
        """Return the path of a shard's tar file on this machine; it may not have been fetched yet."""
        return (self.source if isinstance(self.source, Path) else self.source.folder) / name

    def fetch(self, name: str) -> Path:
        """Fetch the tar file of a shard, and return its path on this machine. A local file is not checked and may be missing.

        Raises:
            ShardError: the server doesn't have the file, or its content differs from the index.
            InputError: the file cannot be fetched now.
        """
        if isinstance(self.source, Path):
            return self.source / name
        return self.source.fetch(name, name, self.shards[name].sha256, self.shards[name].bytes)

    def fetch_index(self, name: str) -> Path:
        """Fetch the index file of a shard; as :meth:`fetch`."""
        if isinstance(self.source, Path):
            return self.source / index_name(name)
        return self.source.fetch(index_name(name), name, self.shards[name].index_sha256)

    def tokenizer(self) -> Path | None:
        """Fetch the tokenizer, and return its folder on this machine; None if the data have none.

        Raises:
            InputError: the tokenizer is missing.
        """
        if self.index.tokenizer is None:
            return None
        if isinstance(self.source, Path):
            folder = self.source / self.index.tokenizer
            if not folder.is_dir():
                raise InputError(f"{folder}: the tokenizer is missing; prepare the data again")
            return folder
        folder = self.source.folder / self.index.tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        complete = folder / ".complete"
        with locked(folder / ".lock"):
            if not complete.exists():
                urls = {name: self.source.url(f"{self.index.tokenizer}/{name}") for name in _TOKENIZER_FILES}
                if not any([_fetch_if_there(url, folder / name) for name, url in urls.items()]):
                    url = redacted_url(urls[_TOKENIZER_FILES[0]])
                    raise InputError(f"{url}: the tokenizer is missing; copy its folder beside the index")
                complete.touch()
        return folder


def locate(path: str | list[str], cache: Path, cache_bytes: int = CACHE_BYTES) -> Located | None:
    """Find prepared shards.

    Args:
        path: one of the following, or a list of them, all in one folder:

            - a folder, or its ``index.json``;
            - tar files by name, brace pattern or wildcard (``DIR/train-{000000..000003}.tar``, ``DIR/*.tar``): in *every*
              split only the shards that match are used;
            - any of these as a URL: ``http://``, ``https://``, ``s3://``, ``gs://``, ``hf://``, or another that fsspec opens.
              Wildcards are matched with the names in the index. The query after ``?`` is sent with each file;
            - ``pipe:COMMAND``, a shell command that writes a file to its standard output, with ``{}`` in place of the file's
              name (``pipe:ssh host cat /data/{}``). As in webdataset, the name or brace pattern of the tar files may be
              given instead of ``{}`` (``pipe:cat /data/train-{000000..000003}.tar``).
        cache: folder of downloaded files.
        cache_bytes: their size limit; see :class:`~jepa_scale.data.files.cache.Cache`.

    Returns:
        None for a path or URL without an index: it is raw data, which must be prepared first.

    Raises:
        InputError: the index cannot be fetched or read, a name is not in it, no shard of the split ``train`` is left, or
            the files are in several folders.
    """
    paths = [path] if isinstance(path, str) else list(path)
    paths = [url2pathname(urlsplit(p).path) if p.startswith("file://") else p for p in paths]
    if not paths:
        raise InputError("data.path: is an empty list; give a folder or pattern of shards")
    if all(map(is_url, paths)):
        return _locate_urls(paths, Cache(cache, cache_bytes))
    if any(map(is_url, paths)):
        raise InputError("data.path: files of this machine and URLs cannot be mixed in one source; use one source each")
    return _locate_files(paths)


def check(located: Located, on_error: Literal["stop", "skip"] = "stop") -> list[ShardInfo]:
    """Check that all local shards exist and have the right size. Files fetched by URL are checked after the download.

    Returns:
        With ``skip``, the shards that are missing or have another size; their samples are skipped in reading.

    Raises:
        InputError: with ``stop``, if a shard is missing or has another size; the message names the first one.
    """
    if not isinstance(located.source, Path):
        return []
    damaged, first = [], ""
    for shard in located.shards.values():
        if fault := shard_fault(located.source, shard):
            damaged.append(shard)
            first = first or fault
    if damaged and on_error == "stop":
        raise InputError(
            f"{first} ({len(damaged)} of {len(located.shards)} shards are missing or damaged); copy them again, prepare "
            "the data again, or go on without them with data.on_error=skip"
        )
    return damaged


def shard_fault(folder: Path, shard: ShardInfo) -> str:
    """Return why a shard is not whole: a file is missing or has another size. Empty if it is whole; no content is read."""
    path, index = folder / shard.name, folder / index_name(shard.name)
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != shard.bytes:
        return f"{path}: has {size:,} bytes, but {shard.bytes:,} in its index"
    return "" if index.is_file() else f"{index}: the index file of {shard.name} is missing"


def _locate_files(paths: list[str]) -> Located | None:
    folders: dict[Path, list[str] | None] = {}  # folder → names or patterns, None = all shards
    for path in paths:
        for place in _expanded(os.path.expanduser(path)):
            if os.path.isdir(place):
                folders[Path(place)] = None
                continue
            parent, name = os.path.split(place)
            if name == INDEX_FILE:
                folders[Path(parent)] = None
                continue
            for match in glob.glob(parent) if glob.has_magic(parent) and not os.path.isdir(parent) else [parent]:
                names = folders.setdefault(Path(match), [])
                if names is not None:
                    names.append(name)
    prepared = [folder for folder in folders if (folder / INDEX_FILE).is_file()]
    if not prepared or any(not name.endswith(".tar") for names in folders.values() for name in names or ()):
        return None
    if len(folders) > 1:
        raise InputError(
            f"data.path: lies in several folders ({', '.join(map(str, folders))}); each folder of shards is a source of its own"
        )
    ((folder, names),) = folders.items()
    index = _safe(Index.read(folder), str(folder))
    index, where = _matching(index, names, str(folder))
    return Located(index, where, folder.absolute())


def _locate_urls(paths: list[str], cache: Cache) -> Located | None:
    if any(is_raw_name(redacted_url(path).rpartition("/")[2]) for path in paths if not path.startswith("pipe:")):
        return None
    found = [_template(url) for path in paths for url in _expanded(path)]
    templates = {template for template, _ in found}
    if len(templates) > 1:
        raise InputError(
            f"data.path: lies in several folders ({', '.join(map(redacted_url, sorted(templates)))}); each folder "
            "of shards is a source of its own"
        )
    (template,) = templates
    url = template.replace("{}", INDEX_FILE)
    where = redacted_url(url)
    pipe = url.startswith("pipe:")
    try:
        text = read_address(url).decode()
    except Refused:
        return None
    except InputError as error:
        if not pipe:
            raise
        raise InputError(  # a command's failure has the same form without network and without file
            f"{error}; by a command only prepared shards can be read, with their {INDEX_FILE} beside them"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not an index of shards ({error}); prepare the data again") from None
    index = _safe(Index.from_json(text, where), where)
    remote = Remote(template, index.fingerprint, cache)
    names = None if any(name is None for _, name in found) else [name for _, name in found if name is not None]
    index, where = _matching(index, names, where if pipe else where.replace(INDEX_FILE, ""))
    return Located(index, where, remote)


def _expanded(path: str) -> list[str]:
    """Expand a brace pattern to paths. ``{}`` is kept, and so is the name of an existing file."""
    if "{" not in path or "{}" in path or os.path.exists(path):
        return [path]
    try:
        return list(braceexpand(path))
    except ValueError as error:
        raise InputError(f"data.path: {path!r} is not a brace pattern: {error}") from None


def _template(url: str) -> tuple[str, str | None]:
    """Split a URL into a template with ``{}`` in place of the file's name, and that name or pattern (None if there is none)."""
    if "{}" in url:
        return url, None
    if url.startswith("pipe:"):
        tars = list(_TAR_NAME.finditer(url))
        if len(tars) != 1:
            raise InputError(
                f"data.path: {url!r} has no place for a file's name in the command; write {{}} there, "
                "as in pipe:ssh host cat /data/{}"
            )
        return url[: tars[0].start()] + "{}" + url[tars[0].end() :], tars[0].group()
    base, mark, query = url.partition("?")
    folder, _, name = base.rpartition("/")
    if name.endswith(".tar"):
        return f"{folder}/{{}}{mark}{query}", name
    if name != INDEX_FILE:
        folder = base.rstrip("/")
    return f"{folder}/{{}}{mark}{query}", None


def _matching(index: Index, names: list[str] | None, where: str) -> tuple[Index, str]:
    """Return the index of the shards that match one of the names or patterns, and its name for messages."""
    if names is None:
        return index, where
    known = {shard.name for shards in index.splits.values() for shard in shards}
    patterns = [name for name in names if glob.has_magic(name)]
    chosen = {name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if unknown := [name for name in names if name not in known and name not in patterns]:
        raise InputError(f"{where}: {unknown[0]} is not in its {INDEX_FILE}, which has {_some(known)}")
    chosen |= set(names) & known
    splits = {split: [shard for shard in shards if shard.name in chosen] for split, shards in index.splits.items()}
    if not splits.get("train"):
        raise InputError(f"{where}: none of the chosen shards are of the split train; there are {_some(known)}")
    index = replace(index, splits={split: shards for split, shards in splits.items() if shards})
    return index, f"{where} ({len(chosen)} of {len(known)} shards)"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names if len(names) <= 4 else [*names[:2], "…", names[-1]])


def _safe(index: Index, where: str) -> Index:
    """Return the index after a check that its names are plain file names.

    They become parts of paths and shell commands, and the index may come from an untrusted server.
    """
    names = [shard.name for shards in index.splits.values() for shard in shards]
    for name in [*names, *([] if index.tokenizer is None else [index.tokenizer])]:
        if not _SAFE_NAME.fullmatch(name):
            raise InputError(f"{where}: the name {name!r} is not a plain file name; prepare the data again")
    if len(set(names)) < len(names):
        raise InputError(f"{where}: names a shard twice; prepare the data again")
    return index


def _fetch_if_there(url: str, path: Path) -> bool:
    pipe = url.startswith("pipe:")  # a command's failure may also mean that the file does not exist
    try:
        write_atomic(path, read_address(url, delays=() if pipe else None))
    except Refused:
        return False
    except InputError:
        if not pipe:
            raise
        return False
    return True
