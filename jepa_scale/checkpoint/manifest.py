"""Manifest of a checkpoint: its description, and the verification of its files."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import lies_within
from jepa_scale.utils.io import sha256_of, write_atomic
from jepa_scale.utils.splits import current_key

FILE = "manifest.json"
TENSORS = "tensors"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of ``manifest.json``, which is written last.

    Attributes:
        step: number of optimizer steps done.
        engine, layout, world_size: the engine that wrote it, e.g. ``"deepspeed"``, ``"ZeRO-2 bf16"``, 4.
        updates: number of optimizer updates; fewer than ``step`` if steps were skipped.
        permanent: whether the retention rules for permanent checkpoints apply; otherwise those for ephemeral ones.
        metrics: ``split/metric`` → value of the evaluation after this step, if there was one; used to keep the best.
        state: state of the run: position and fingerprint of the data, fingerprint of the model, tokens, seconds.
        config: the resolved config. versions: versions of the packages that matter.
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
        """Write the manifest into a folder, atomically."""
        values = asdict(self)
        text = json.dumps({"format": FORMAT, "sha256": _sha256(values), **values}, indent=1)
        write_atomic(folder / FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            InputError: there is no manifest, it is damaged, or it has another format.
        """
        file = folder / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise InputError(
                    f"{file}: has format {found}, this version reads format {FORMAT}; use the version that wrote it"
                )
            if values.pop("sha256") != _sha256(values):
                raise InputError(f"{file}: its checksum is wrong")
            if outside := [name for name in values["files"] if not lies_within(name)]:
                raise InputError(f"{file}: names {outside[0]!r}, which is not in its folder; use another checkpoint")
            values["metrics"] = {current_key(key): value for key, value in values["metrics"].items()}
            return cls(**values)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: not a complete checkpoint: {error}") from None

    def damage(self, folder: Path, part: int = 0, parts: int = 1, hashes: bool = True) -> list[str]:
        """Return one line for each file that is missing or damaged; empty if the checkpoint is whole.

        Args:
            part, parts: check only every ``parts``-th file, from index ``part``, so that ranks can share the work.
            hashes: read the files and compare SHA-256; otherwise compare only sizes.
        """
        wrong = []
        for name, expected in list(sorted(self.files.items()))[part::parts]:
            file = folder / name
            if not file.is_file():
                wrong.append(f"{file}: is missing")
            elif file.stat().st_size != expected["bytes"]:
                wrong.append(f"{file}: has {file.stat().st_size:,} bytes, should have {expected['bytes']:,}")
            elif hashes and describe([file])[file.name]["sha256"] != expected["sha256"]:
                wrong.append(f"{file}: its checksum is wrong")
        return wrong


def _sha256(values: dict[str, Any]) -> str:
    """Checksum of a manifest's values, independent of their layout in the file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe(files: list[Path]) -> dict[str, Any]:
    """Return name → ``bytes`` and ``sha256`` of files; each is read once, up to four at a time."""
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(sha256_of, files))
    return {f.name: {"bytes": f.stat().st_size, "sha256": d} for f, d in zip(files, digests, strict=True)}
