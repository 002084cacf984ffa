"""The folder that a conversion fills. Finished files are kept if the conversion is killed, and a restart continues after
them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jepa_scale.checkpoint.store import describe
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import lies_within
from jepa_scale.utils.io import write_atomic
from jepa_scale.utils.lock import JOB_LOCK

JOURNAL = "conversion.json"
FORMAT = 1


@dataclass(slots=True)
class Journal:
    """``conversion.json``: source and options of a conversion, and its finished files.

    Attributes:
        made_by: versions of the packages, e.g. ``jepa_scale 0.1.0, transformers 5.23.0``.
        checkpoint: name of the checkpoint's folder. step: its step.
        plan: SHA-256 of everything that the tensor files' bytes depend on.
        options: options of the command, for the reader only.
        complete: whether all files are finished.
        files: name → ``bytes`` and ``sha256`` of each finished file.
    """

    made_by: str
    checkpoint: str
    step: int
    plan: str
    options: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_journal(folder: Path) -> Journal | None:
    """Return the journal of a folder with a conversion; None if the folder is empty or does not exist.

    Raises:
        InputError: the folder holds something else, or the journal cannot be read.
    """
    file = folder / JOURNAL
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise InputError(f"{file}: was written by another version of jepa_scale; choose another folder")
        journal = Journal(**values)
        for name in (journal.checkpoint, *journal.files):
            if not lies_within(name):
                raise InputError(f"{file}: names {name!r}, which is not in its folder; choose another folder")
        return journal
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise InputError(f"{folder}: is a file; choose a folder that is new or empty") from None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); remove the folder or choose another one") from None
    ours = {JOURNAL + ".partial", JOB_LOCK}  # left by a conversion that was killed before it wrote its journal
    other = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    if other:
        raise InputError(f"{folder}: holds something else ({other[0]}); choose a folder that is new or empty")
    return None


class Folder:
    """A folder that a conversion fills.

    Args:
        journal: the journal of this conversion, without files.

    Raises:
        InputError: the folder holds something else, or another conversion.
    """

    def __init__(self, path: Path, journal: Journal) -> None:
        self.path = path
        found = read_journal(path)
        if found is not None and found.plan != journal.plan:
            raise InputError(
                f"{path}: holds another conversion (of {found.checkpoint}, {found.made_by}, {_text_of(found.options)}; this "
                f"one is of {journal.checkpoint}, {journal.made_by}, {_text_of(journal.options)}); choose another folder"
            )
        self.journal = found or journal
        self.journal.made_by = journal.made_by
        self.kept = self._whole(self.journal.files) if found else set()
        """Files that an earlier start has finished and whose checksums are right."""
        self.journal.complete &= len(self.kept) == len(self.journal.files)
        self.journal.files = {name: entry for name, entry in self.journal.files.items() if name in self.kept}
        self._save()

    def make(self, name: str, write: Callable[[Path], dict[str, Any]]) -> None:
        """Make a file with ``write(path)``, which returns its ``bytes`` and ``sha256``, and record it as finished."""
        self.journal.complete = False
        self.journal.files[name] = write(self.path / name)
        self._save()

    def put(self, name: str, content: str | bytes) -> None:
        """Write a small file; a file of that name is replaced."""
        data = content.encode() if isinstance(content, str) else content
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if self.journal.files.get(name) != entry:
            self.journal.complete = False
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / name, data)
            self.journal.files[name] = entry

    def finish(self) -> None:
        """Record that all files are finished."""
        self.journal.complete = True
        self._save()

    def _whole(self, files: dict[str, dict[str, Any]]) -> set[str]:
        there = {n: self.path / n for n in files if (self.path / n).is_file()}
        return {n for n, path in there.items() if describe([path])[path.name] == files[n]}

    def _save(self) -> None:
        values = asdict(self.journal)
        values["files"] = dict(sorted(values["files"].items()))
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / JOURNAL, (json.dumps({"format": FORMAT, **values}, indent=1) + "\n").encode())


def _text_of(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())
