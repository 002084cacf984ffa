"""GPT2WithJEPA's files of facts in both directions: rows are passed on unchanged, after a check of all files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.formats.source import Items, Part, Source, Vocabulary, identify_files
from jepa_scale.data.reversal import files as reversal_files


def is_fact_folder(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and any((folder / name).is_file() for name in ("train.json", "valid.json"))


def open_facts(folder: Path) -> Source:
    """Open a folder of facts. A record's value is a row, ``{"input_text", "target_text", …}``.

    Raises:
        InputError: a file is missing or damaged, or a row does not follow the format; see
            :func:`jepa_scale.data.reversal.files.read`.
    """
    data = reversal_files.read(folder)
    parts = {"train": Part(partial(_read, folder / "train.json", None), len(data.train))}
    for name, split in reversal_files.SPLITS.items():
        if len(data.splits[name]):
            parts[split] = Part(partial(_read, folder / "valid.json", name), len(data.splits[name]))
    return Source(
        kind="reversal",
        parts=parts,
        identify=partial(identify_files, {"all": tuple(folder / name for name in reversal_files.FILES)}, folder),
        vocabulary=Vocabulary(data.vocab_size, data.special, folder / "vocab.json"),
    )


def _read(path: Path, part: str | None) -> Items:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    for number, row in enumerate(rows if part is None else rows[part]):
        yield Record(f"{path}#{number}" if part is None else f"{path}#{part}[{number}]", row)
