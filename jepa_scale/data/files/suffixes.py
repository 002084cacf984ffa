"""Formats and compressions of raw files, by their suffixes."""

from __future__ import annotations

from pathlib import PurePosixPath

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
}
"""Suffix → format; every other file is text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
OTHER_ARCHIVES = (".zip", ".7z", ".rar", ".lz4", ".lzma", ".lzo", ".br", ".sz", ".z")
"""Suffixes of compressed files that are not read."""
_TARS = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_TEXTS = (".txt", ".md", ".rst", ".csv", ".tsv")


def split_name(name: str) -> tuple[str, str | None]:
    """Return the suffix of a file's format (``.jsonl``; empty if there is none) and that of its compression (``.gz``), or None."""
    path = PurePosixPath(name.lower())
    if path.suffix in _TARS:
        return ".tar", _TARS[path.suffix]
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, None


def format_of(name: str) -> str:
    """Return the format of a file, a value of :data:`FORMATS` or ``text``."""
    return FORMATS.get(split_name(name)[0], "text")


def is_raw_name(name: str) -> bool:
    """Return whether a name is surely that of a raw file: not of prepared shards, of their index or of a folder."""
    suffix, compression = split_name(name)
    if compression is not None or PurePosixPath(name.lower()).suffix in OTHER_ARCHIVES:
        return True
    return suffix in {*FORMATS, *_TEXTS} - {".tar"} and name != "index.json"
