"""Passages of a corpus, labelled with their section, for probes of frozen states."""

from __future__ import annotations

import json
from pathlib import Path

from jepa_scale.data.prepare.section_options import SectionOptions
from jepa_scale.data.prepare.sections import passages
from jepa_scale.utils.io import write_atomic

FILE = "passages.jsonl"


def write(folder: Path, seed: int, *, corpus: str = "python_docs") -> None:
    """Write ``passages.jsonl``, rows of ``text`` and ``label``.

    Raises:
        InputError: there is no such corpus, or it has too few passages.
    """
    rows = passages([corpus], SectionOptions(seed=seed)).rows
    write_atomic(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
