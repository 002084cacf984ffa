"""Resolution of a path (file, folder, glob, brace pattern) to files, with their format and splits."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from jepa_scale.config.values import is_url
from jepa_scale.data.files.cache import Cache, cache_dir
from jepa_scale.data.files.listing import RemoteFolder, expand_braces, find_remote
from jepa_scale.data.files.raw import RawFile
from jepa_scale.data.files.suffixes import OTHER_ARCHIVES, format_of, split_name
from jepa_scale.data.prepare.formats.source import relative
from jepa_scale.utils.errors import InputError

_BESIDE = re.compile(r"(readme|licen[cs]e|copying|citation)(\.\w+)?", re.IGNORECASE)
_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "eval": "valid",
    "evaluation": "valid",
    "dev": "valid",
    "test": "test",
}


def split_of(name: str) -> str | None:
    """Return the split (``train``, ``valid`` or ``test``) in the name of a file, folder or Hugging Face split.

    Examples are ``valid.jsonl``, ``train-00000-of-00004.parquet`` and ``wiki.test.tokens``. Returns None if the name
    contains no split.
    """
    words = re.split(r"[-_.]", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


@dataclass(frozen=True, slots=True)
class Found:
    """Files of one format, by split and in order. ``root`` is the folder (or its address) to which their names are relative."""

    format: str
    splits: dict[str, tuple[RawFile, ...]]
    root: Path | str


def expand(path: str, cache: Cache | None = None) -> list[RawFile | RemoteFolder]:
    """Return the files and folders that a path, address, glob or brace pattern names, in order.

    Returns:
        An empty list if a local path or pattern names none.

    Raises:
        InputError: an address names none, or cannot be listed.
    """
    if is_url(path) and not path.startswith("file://"):
        return list(find_remote(path, cache or Cache(cache_dir())))
    path = os.path.expanduser(url2pathname(urlsplit(path).path) if path.startswith("file://") else path)
    if os.path.exists(path):
        return [Path(path)]
    names = expand_braces(path)
    found: list[RawFile | RemoteFolder] = []
    for name in names:
        if os.path.exists(name):
            found.append(Path(name))
        elif glob.has_magic(name):
            found += [Path(p) for p in sorted(glob.glob(name, recursive=True)) if os.path.isfile(p)]
        elif len(names) > 1:
            raise InputError(f"{name}: no such file, but {path!r} names it")
    return list(dict.fromkeys(found))


def find(paths: Sequence[RawFile | RemoteFolder], by_name: bool = True) -> Found:
    """Find the files of one folder, or of a list of files, and their format and splits.

    In a folder, hidden files and a README, licence or the like are left out; in a list, nothing is.

    Args:
        by_name: files named valid or test become these splits instead of training data. For text files this applies
            only if one of them is named train, or all have a split's name.

    Raises:
        InputError: there is no file, there are files of several formats, or no file belongs to the split ``train``.
    """
    folders = [p for p in paths if isinstance(p, RemoteFolder) or (isinstance(p, Path) and p.is_dir())]
    if folders and len(paths) > 1:
        raise InputError(f"{folders[0]}: is a folder; several paths must all be files, or one folder")
    root: Path | str
    files: list[RawFile]
    if folders:
        root, files = _below(folders[0])
        files = [f for f in files if not _BESIDE.fullmatch(f.name)] or files
    else:
        files = [p for p in paths if not isinstance(p, RemoteFolder)]
        root = _common_folder(files)
    if not files:
        raise InputError(f"{root}: holds no files; choose a folder with data")
    formats: dict[str, RawFile] = {}
    for file in files:
        suffix, compression = split_name(file.name)
        if suffix in OTHER_ARCHIVES and compression is None:
            raise InputError(f"{file}: files with the suffix {suffix} are not unpacked; unpack it first")
        if suffix == ".parquet" and compression is not None:
            raise InputError(f"{file}: unpack it first: Parquet is compressed within, and read from its end")
        formats.setdefault(format_of(file.name), file)
    if len(formats) > 1:
        examples = ", ".join(str(file) for file in formats.values())
        raise InputError(
            f"{root}: holds files of several formats ({examples}); choose by a pattern such as {root}/*.txt"
        )
    (format_,) = formats
    if len(files) == 1 or not by_name:
        return Found(format_, {"train": tuple(files)}, root)
    return Found(format_, _by_split(files, root, format_), root)


def _below(folder: RawFile | RemoteFolder) -> tuple[Path | str, list[RawFile]]:
    """Return a folder's name and the files below it in order, without hidden ones."""
    if isinstance(folder, RemoteFolder):
        names = {file: relative(file, str(folder)) for file in folder.files}
        return str(folder), [f for f, name in names.items() if not any(p.startswith(".") for p in name.split("/"))]
    assert isinstance(folder, Path)
    files: list[Path] = []
    for parent, folders, names_here in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [Path(parent, name) for name in names_here if not name.startswith(".")]
    return folder, list(sorted(files, key=lambda file: relative(file, folder)))


def _common_folder(files: Sequence[RawFile]) -> Path | str:
    """Return the folder in which all files lie: an address, if they are elsewhere."""
    local = [file for file in files if isinstance(file, Path)]
    if not local:
        return os.path.commonpath([str(file).rpartition("/")[0].replace("://", ":", 1) for file in files]).replace(
            ":", "://", 1
        )
    root = Path(os.path.commonpath([file.absolute().parent for file in local]))
    return root if local[0].is_absolute() else Path(os.path.relpath(root))


def _by_split(files: list[RawFile], root: Path | str, format_: str) -> dict[str, tuple[RawFile, ...]]:
    splits: dict[str, list[RawFile]] = {"train": []}
    named = []
    for file in files:
        parts = relative(file, root).split("/")
        whole = (
            _SPLITS.get(part.lower()) for part in reversed(parts[:-1])
        )  # folders count only if the whole name is a split's
        split = split_of(parts[-1]) or next((s for s in whole if s), None)
        named.append(split)
        splits.setdefault(split or "train", []).append(file)
    if format_ == "text" and "train" not in named and None in named:
        return {"train": tuple(files)}
    if not splits["train"]:
        raise InputError(
            f"{root}: holds {' and '.join(s for s in splits if s != 'train')} but nothing named train; to train "
            f"on one of the files, name that file"
        )
    return {split: tuple(found) for split, found in splits.items()}
