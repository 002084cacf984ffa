"""What a checkpoint says of itself, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.io import write_atomic

FILE = "manifest.json"
TENSORS = "tensors"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """``manifest.json``, written last.

    Attributes:
        step: optimizer steps done.
        engine, layout, world_size: who wrote it, e.g. ``"deepspeed"``, ``"ZeRO-2 bf16"``, 4.
        updates: of the optimizer; fewer than ``step`` where steps were skipped.
        permanent: whether only the retention policy for permanent ones may remove it.
        metrics: ``split/metric`` of the evaluation after this step, if there was one, for keeping the best.
        state: of the run: the data's position and fingerprint, tokens, seconds.
        config: the resolved config. versions: of the packages that matter.
        files: path within the checkpoint → ``bytes`` and ``sha256``.
    """

    step: int
    engine: str
    layout: str
    world_size: int
    updates: int
    permanent: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """The file appears whole or not at all."""
        values = asdict(self)
        text = json.dumps({"format": FORMAT, "sha256": _sha256(values), **values}, indent=1)
        write_atomic(folder / FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises:
        InputError: there is none, it is damaged, or of another format.
        """
        file = folder / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise InputError(f"{file}: is of format {found}, this version reads format {FORMAT}")
            if values.pop("sha256") != _sha256(values):
                raise InputError(f"{file}: its checksum is wrong")
            return cls(**values)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a complete checkpoint: {error}") from None

    def damage(self, folder: Path, part: int = 0, parts: int = 1, hashes: bool = True) -> list[str]:
        """What is wrong with the checkpoint's files, one line each; empty if it is whole.

        Args:
            part, parts: look at every ``parts``-th file only, from number ``part``, so that ranks can share the work.
            hashes: read the files and compare SHA-256; otherwise sizes alone.
        """
        wrong = []
        for name, told in list(sorted(self.files.items()))[part::parts]:
            file = folder / name
            if not file.is_file():
                wrong.append(f"{file}: is missing")
            elif file.stat().st_size != told["bytes"]:
                wrong.append(f"{file}: has {file.stat().st_size:,} bytes, should have {told['bytes']:,}")
            elif hashes and describe([file])[file.name]["sha256"] != told["sha256"]:
                wrong.append(f"{file}: its checksum is wrong")
        return wrong


def _sha256(values: dict[str, Any]) -> str:
    """Of what a manifest says, however it is laid out in the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe(files: list[Path]) -> dict[str, Any]:
    """Name → ``bytes`` and ``sha256`` of files, read once each, several at a time."""
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256_of_file, files))
    return {f.name: {"bytes": f.stat().st_size, "sha256": d} for f, d in zip(files, digests, strict=True)}


def _sha256_of_file(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
