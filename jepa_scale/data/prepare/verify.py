"""Verification of a folder of shards against its index."""

from __future__ import annotations

import io
import mmap
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jepa_scale.data.shards.format import SAMPLE, Index, ShardInfo, index_name

THREADS = 8
"""Shards read in parallel; hashing and CRC release the interpreter's lock."""
NAMED = 5
"""Largest number of damaged samples named per shard."""


def verify(folder: str | Path, progress: bool = True) -> list[str]:
    """Read every byte of a folder of shards and compare it with the index.

    Returns:
        One line for each damage. It names the file and, where possible, the sample.

    Raises:
        InputError: ``index.json`` is missing or cannot be read.
    """
    folder = Path(folder)
    index = Index.read(folder)
    infos = [info for shards in index.splits.values() for info in shards]
    damage: list[str] = []
    total = sum(info.bytes for info in infos)
    disable = None if progress else True  # None: off if stderr is not a terminal
    with (
        tqdm(total=total, desc="verify", unit="B", unit_scale=True, dynamic_ncols=True, disable=disable) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for info, found in zip(infos, pool.map(lambda info: list(_shard(folder, info)), infos), strict=True):
            damage += found
            bar.update(info.bytes)
    if index.tokenizer is not None and not (folder / index.tokenizer).is_dir():
        damage.append(f"{folder / index.tokenizer}: the tokenizer is missing")
    return damage


def _shard(folder: Path, info: ShardInfo) -> Iterator[str]:
    table, fault = _table(folder / index_name(info.name), info)
    if fault:
        yield fault
    file = folder / info.name
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            with memoryview(data) as view:
                yield from _content(file, info, view, table)
    except FileNotFoundError:
        yield f"{file}: is missing"
    except OSError as error:
        yield f"{file}: cannot be read: {error.strerror}"


def _table(file: Path, info: ShardInfo) -> tuple[np.ndarray | None, str | None]:
    """Return the shard's index and None, or None and the fault of the index."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None, f"{file}: is missing"
    except OSError as error:
        return None, f"{file}: cannot be read: {error.strerror}"
    if sha256(raw).hexdigest() != info.index_sha256:
        return None, f"{file}: SHA-256 differs from the index's"
    table = np.load(io.BytesIO(raw), allow_pickle=False)
    if table.dtype != SAMPLE or (len(table), int(table["tokens"].sum())) != (info.samples, info.tokens):
        return None, f"{file}: contradicts index.json"
    return table, None


def _content(file: Path, info: ShardInfo, data: memoryview, table: np.ndarray | None) -> Iterator[str]:
    whole = len(data) == info.bytes and sha256(data).hexdigest() == info.sha256
    if len(data) != info.bytes:
        yield f"{file}: has {len(data):,} bytes instead of {info.bytes:,}"
    bad = [] if table is None else [n for n, row in enumerate(table) if not _is_whole(data, row)]
    for number in bad[:NAMED]:
        assert table is not None
        start, stop = int(table[number]["start"]), int(table[number]["stop"])
        name = f"{info.name.removesuffix('.tar')}-{number:06d}"
        if stop > len(data):
            yield f"{file}: sample {name} is cut off"
        else:
            yield f"{file}: sample {name} (member {_member(data, start, name)}) is damaged in bytes {start:,} to {stop:,}"
    if len(bad) > NAMED:
        yield f"{file}: {len(bad) - NAMED:,} more of its {info.samples:,} samples are damaged"
    if not whole and not bad and len(data) == info.bytes:
        where = "" if table is None else ", after its last sample"
        yield f"{file}: SHA-256 differs from the index's{where}"


def _is_whole(data: memoryview, row: np.void) -> bool:
    start, stop = int(row["start"]), int(row["stop"])
    return stop <= len(data) and zlib.crc32(data[start:stop]) == row["crc"]


def _member(data: memoryview, start: int, key: str) -> str:
    """Return the name of the sample's first member in the tar, or ``key.*`` if the name is damaged."""
    name = bytes(data[start : start + 100]).rstrip(b"\0").decode(errors="replace")
    return name if name.startswith(f"{key}.") else f"{key}.*"
