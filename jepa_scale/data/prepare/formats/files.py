"""Resolution of a path (file, folder, glob, brace pattern) to files, with their format and splits."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jepa_scale.data.prepare.formats.source import relative
from jepa_scale.utils.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
}
"""Suffix → format; every other file is text."""
_PACKED = (".gz", ".zip", ".zst", ".bz2", ".xz", ".tgz", ".7z")
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
    """Files of one format, by split and in order. ``root`` is the folder to which their names are relative."""

    format: str
    splits: dict[str, tuple[Path, ...]]
    root: Path


def expand(path: str) -> list[Path]:
    """Return the files and folders that a path, glob or brace pattern names, in order; empty if there are none."""
    from braceexpand import braceexpand

    path = os.path.expanduser(path)
    if os.path.exists(path):
        return [Path(path)]
    try:
        names = list(braceexpand(path)) if "{" in path else [path]
    except ValueError:  # its UnbalancedBracesError
        raise InputError(f"data path {path!r}: braces are not closed; add the missing brace") from None
    found: list[Path] = []
    for name in names:
        if os.path.exists(name):
            found.append(Path(name))
        elif glob.has_magic(name):
            found += [Path(p) for p in sorted(glob.glob(name, recursive=True)) if os.path.isfile(p)]
        elif len(names) > 1:
            raise InputError(f"{name}: no such file, but {path!r} names it")
    return list(dict.fromkeys(found))


def find(paths: list[Path], by_name: bool = True) -> Found:
    """Find the files of one folder, or of a list of files, and their format and splits.

    In a folder, hidden files and a README, licence or the like are left out; in a list, nothing is.

    Args:
        by_name: files named valid or test become these splits instead of training data. For text files this applies
            only if one of them is named train, or all have a split's name.

    Raises:
        InputError: there is no file, there are files of several formats, or no file belongs to the split ``train``.
    """
    folders = [p for p in paths if p.is_dir()]
    if folders and len(paths) > 1:
        raise InputError(f"{folders[0]}: is a folder; several paths must all be files, or one folder")
    if folders:
        root, files = paths[0], list(_walk(paths[0]))
        files = [f for f in files if not _BESIDE.fullmatch(f.name)] or files
    else:
        root, files = Path(os.path.commonpath([p.absolute().parent for p in paths])), paths
        if not paths[0].is_absolute():
            root = Path(os.path.relpath(root))
    if not files:
        raise InputError(f"{root}: holds no files; choose a folder with data")
    for file in files:
        if file.suffix.lower() in _PACKED:
            raise InputError(f"{file}: is compressed; unpack it first")
    formats: dict[str, Path] = {}
    for file in files:
        formats.setdefault(FORMATS.get(file.suffix.lower(), "text"), file)
    if len(formats) > 1:
        examples = ", ".join(str(file) for file in formats.values())
        raise InputError(
            f"{root}: holds files of several formats ({examples}); choose by a pattern such as {root}/*.txt"
        )
    (format_,) = formats
    if len(files) == 1 or not by_name:
        return Found(format_, {"train": tuple(files)}, root)
    return Found(format_, _by_split(files, root, format_), root)


def _walk(folder: Path) -> Iterable[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _by_split(files: list[Path], root: Path, format_: str) -> dict[str, tuple[Path, ...]]:
    splits: dict[str, list[Path]] = {"train": []}
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
