"""Writer of safetensors files that never holds a whole file in memory. The header depends on shapes and dtypes only, so tensors
are written one by one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import sync_folder

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SLAB = 1 << 20
"""Number of elements that are cast and written at a time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Name, shape and dtype of a tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Write a safetensors file (https://huggingface.co/docs/safetensors, format of 2022). It appears whole or not at all.

    Args:
        entries: tensors of the file. Wider dtypes must come first: readers map the file and need aligned tensors.
        tensors: in the same order; floating-point ones are cast to the entry's dtype.

    Returns:
        ``bytes`` and ``sha256`` of the file.

    Raises:
        InputError: a finite value would be infinite in the entry's dtype.
    """
    widths = [entry.dtype.itemsize for entry in entries]
    assert widths == sorted(widths, reverse=True), "wider dtypes first"
    partial = path.with_name(f"{path.name}.partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(_header(entries))
        stream = iter(tensors)
        for entry in entries:
            flat = _flat(next(stream), entry)
            for start in range(0, len(flat), _SLAB):
                put(_cast(flat[start : start + _SLAB], entry).view(torch.uint8).numpy())
            del flat  # frees its memory before the next tensor is made
        assert next(stream, None) is None
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(partial, path)
    sync_folder(path.parent)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _flat(tensor: Tensor, entry: Entry) -> Tensor:
    assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    return tensor.detach().reshape(-1)


def _cast(slab: Tensor, entry: Entry) -> Tensor:
    if slab.dtype == entry.dtype:
        return slab
    cast = slab.to(entry.dtype)
    if not torch.equal(cast.isfinite(), slab.isfinite()):
        raise InputError(
            f"{entry.name}: holds {float(slab.abs().nan_to_num(0, 0).max()):.4g}, more than {entry.dtype} can; "
            "convert with --dtype bfloat16 or float32"
        )
    return cast
