"""SpanJEPA's token files: rows of token ids in NumPy arrays, ``shard_*.npy`` beside ``metadata.json``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa_scale.data.prepare.base import LeftOut, Record
from jepa_scale.data.prepare.formats.source import Items, Part, Source, Vocabulary, identify_files
from jepa_scale.utils.errors import InputError

METADATA = "metadata.json"
PATTERN = "shard_*.npy"
_ROWS = 4096  # rows checked at a time


def is_token_folder(folder: Path) -> bool:
    return any(folder.glob(PATTERN)) or _looks_like_metadata(folder / METADATA)


def _looks_like_metadata(path: Path) -> bool:
    try:
        return "max_seq_len" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def open_tokens(folder: Path) -> Source:
    """Open a folder of token files. A record's value is an (n,) integer array: a row without its padding and EOS.

    Rows of padding and EOS alone, and those with one token beside them, are counted and left out: texts that are cut into
    rows have such ends.

    ``metadata.json`` holds ``vocab_size``, ``max_seq_len``, ``eos_id``, ``pad_id`` and ``mask_id``. All rows are checked
    against it here, before anything is written.

    Raises:
        InputError: a file is missing or damaged, or contradicts the metadata. The message names file, key and row (from 0).
    """
    metadata = folder / METADATA
    values = _read_metadata(metadata)
    files = tuple(sorted(folder.glob(PATTERN)))
    if not files:
        raise InputError(f"{folder}: holds {METADATA} but no {PATTERN}")
    count = sum(_check(file, values, metadata) for file in files)
    special = {name: values[f"{name}_id"] for name in ("eos", "pad", "mask")}
    return Source(
        kind="text",
        parts={"train": Part(partial(_read, files, (special["pad"], special["eos"])), count)},
        identify=partial(identify_files, {"train": (metadata, *files)}, folder),
        vocabulary=Vocabulary(values["vocab_size"], special),
    )


def _read_metadata(path: Path) -> dict[str, int]:
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; it must define the ids of {PATTERN}") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    keys = ("vocab_size", "max_seq_len", "eos_id", "pad_id", "mask_id")
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path}: key {key!r} is missing")
        if type(content[key]) is not int or content[key] < (0 if key.endswith("_id") else 1):
            raise InputError(f"{path}: {key} must be a whole number, got {content[key]!r}")
        if key.endswith("_id") and content[key] >= content["vocab_size"]:
            raise InputError(f"{path}: {key} {content[key]} is not below vocab_size {content['vocab_size']}")
    return {key: content[key] for key in keys}


def _check(path: Path, metadata: dict[str, int], metadata_file: Path) -> int:
    """Check an array against the metadata; returns its number of rows."""
    array = _load(path)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(f"{path}: must be (rows, T) of integers, is {array.shape} of {array.dtype}")
    if array.shape[1] != metadata["max_seq_len"]:
        raise InputError(
            f"{path}: rows have {array.shape[1]} ids, max_seq_len of {metadata_file} is {metadata['max_seq_len']}"
        )
    for start in range(0, len(array), _ROWS):
        rows = array[start : start + _ROWS]
        bad = (rows < 0) | (rows >= metadata["vocab_size"])
        if bad.any():
            row = int(np.flatnonzero(bad.any(axis=1))[0])
            raise InputError(
                f"{path}, row {start + row}: id {int(rows[row][bad[row]][0])} is not in 0 … vocab_size - 1 = "
                f"{metadata['vocab_size'] - 1}, as given by {metadata_file}"
            )
    return len(array)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: is not a complete NumPy array: {error}") from None


def _read(files: tuple[Path, ...], fill: tuple[int, ...]) -> Items:
    for path in files:
        for number, row in enumerate(_load(path)):
            tokens = row[~np.isin(row, fill)]
            where = f"{path}#{number}"
            yield Record(where, tokens) if len(tokens) else LeftOut(where, "empty document")
